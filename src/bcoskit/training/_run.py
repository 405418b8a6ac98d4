"""One training run: from a folder of images to a file of weights."""

import json
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.progress import Progress
from torch.utils.data import DataLoader, Sampler, default_convert

from bcoskit.data import InMemoryImages, cifar10, in_memory, open_dataset
from bcoskit.models import create_model, model_row, save_model
from bcoskit.training._module import Classifier


class EpochShuffle(Sampler[int]):
    """A permutation of the indices that seed and epoch determine, so that a resumed run sees the same order.

    Args:
        length: Number of indices.
        seed: Of the permutations.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch)))
        return iter(torch.randperm(self.length, generator=generator).tolist())


def train(
    data: Path | None = None,
    *,
    out: Path,
    model: str = "resnet20.bcos_cifar10",
    epochs: int = 100,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 42,
    compile_step: bool = True,
    resume: bool = False,
    download: bool = False,
) -> dict[str, float]:
    """Train a network on images, as the second B-cos paper does on CIFAR-10.

    Adam without weight decay, a cosine from `learning_rate` to 0, random crops and flips; the loss is that of the
    model's row, for B-cos networks binary cross-entropy (Böhle et al., TPAMI 2024, CIFAR-10 experiments). In `out`
    appear `settings.json`, `checkpoints/` (one per epoch, the last is kept), `csv/` and `tensorboard/` logs, and in
    the end `model.safetensors`, which `create_model` and `bcoskit explain --model` open.

    Args:
        data: Folder with training and test images: parquet shards, the original CIFAR-10 files, or class folders in
            `train` and `test`. None is the folder in which torch keeps downloads.
        out: Folder of the run.
        model: Name of the network; its classes are those of the data.
        epochs: Passes over the training images.
        batch_size: Images per step; the rest of an epoch that fills no batch is left out.
        learning_rate: Of Adam at the start.
        seed: Of weights, order and augmentation.
        compile_step: Compile the network for training, where a compiler is at hand.
        resume: Go on from the last checkpoint in `out`, if there is one.
        download: Download CIFAR-10 to `data` if it is not there.

    Returns:
        Loss and accuracy on the test images after the last epoch.

    Raises:
        ValueError: If an argument is out of its range, the data do not fit, or `out` holds another run.
    """
    row = model_row(model)
    for name, value in {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"`{name}` (={value}) must be above 0")
    settings: dict[str, Any] = {
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    checkpoint = _checkpoint_to_resume(out, settings, resume)
    lightning.seed_everything(seed, workers=True, verbose=False)
    images = {split: _images(data, split, row.transform.view, download) for split in ("train", "test")}
    classes = images["train"].classes
    if images["test"].classes != classes:
        raise ValueError(f"`data` (={data}) has other classes for testing than for training")
    if len(images["train"]) < batch_size:
        raise ValueError(f"`batch_size` (={batch_size}) is above the number of images, {len(images['train'])}")

    network = create_model(model, num_classes=len(classes)).train()
    classifier = Classifier(
        network,
        row.transform,
        len(classes),
        loss=row.loss,
        learning_rate=learning_rate,
        seed=seed,
        compile_step=compile_step and _can_compile(),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
    trainer = lightning.Trainer(
        max_epochs=epochs,
        logger=[CSVLogger(out, "csv"), TensorBoardLogger(out, "tensorboard", "")],
        callbacks=[
            ModelCheckpoint(out / "checkpoints", "last", save_top_k=1, monitor=None, enable_version_counter=False),
            LearningRateMonitor("epoch"),
        ],
        log_every_n_steps=max(1, min(50, len(images["train"]) // batch_size)),
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )
    sampler = EpochShuffle(len(images["train"]), seed)
    loaders = (
        DataLoader(images["train"], batch_size, sampler=sampler, drop_last=True, collate_fn=default_convert),
        DataLoader(images["test"], 4 * batch_size, collate_fn=default_convert),
    )
    trainer.fit(classifier, *loaders, ckpt_path=checkpoint, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test_")}
    if trainer.is_global_zero:
        save_model(
            network,
            out / "model.safetensors",
            model,
            classes=classes,
            transform=row.transform,
            training={**settings, **metrics},
        )
    return metrics


def _checkpoint_to_resume(out: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to go on from, if the run in `out` is the one that is asked for."""
    checkpoint, written = out / "checkpoints" / "last.ckpt", out / "settings.json"
    if not checkpoint.is_file():
        return None
    if not resume:
        raise ValueError(f"`out` (={out}) holds a run already; go on with it by `resume`, or choose another folder")
    if not written.is_file():
        raise ValueError(f"`out` (={out}) holds a checkpoint without settings.json, so that it cannot be resumed")
    before = json.loads(written.read_text())
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        raise ValueError(
            f"`{changed[0]}` (={settings[changed[0]]}) was {before.get(changed[0])} in the run in {out}; "
            "resume it with the same settings, or choose another folder"
        )
    return checkpoint


def _images(data: Path | None, split: Literal["train", "test"], view: Any, download: bool) -> InMemoryImages:
    if data is None or download:
        dataset = cifar10(data, split == "train", view, download)
    else:
        dataset = open_dataset(data, split, view)
    with Progress(transient=True) as progress:
        task = progress.add_task(f"Reading {split} images", total=len(dataset))
        return in_memory(dataset, lambda done, _: progress.update(task, completed=done))


def _can_compile() -> bool:
    """Whether a compiler is at hand, found out by compiling something small."""
    try:
        torch.compile(torch.sin)(torch.zeros(1))
    except Exception as error:  # noqa: BLE001 - every backend has failures of its own, and all mean the same
        warnings.warn(f"the training step is not compiled: {str(error).splitlines()[0]}", stacklevel=3)
        return False
    return True
