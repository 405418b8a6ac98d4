"""One training run: from a folder of images to a file of weights."""

import json
import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader, Sampler, default_convert

from bcoskit.data import ImageTransform, InMemoryImages, cifar10, in_memory, open_dataset
from bcoskit.models import create_model, model_row, save_model
from bcoskit.training._module import Classifier, seeded

_CHECKPOINT, _SETTINGS, _MODEL = Path("checkpoints", "last.ckpt"), "settings.json", "model.safetensors"


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

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=seeded(self.seed, self.epoch)).tolist())


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
        seed: Of weights, order and augmentation. A run that was broken off and resumed sees what it would have seen.
        compile_step: Compile the network for training, where a compiler is at hand.
        resume: Go on from the last checkpoint in `out`, if there is one.
        download: Download CIFAR-10 to `data` if it is not there.

    Returns:
        Loss and accuracy on the test images after the last epoch.

    Raises:
        ValueError: If an argument is out of its range, the data do not fit, or `out` holds another run, a damaged
            one, or one that is not to be resumed.
        RuntimeError: If the loss is not finite; the last checkpoint is from before.
    """
    row = model_row(model)
    if row.loss == "none":
        raise ValueError(f"`model` (={model!r}) has embeddings for outputs, not classes that could be trained")
    settings: dict[str, Any] = {
        "model": model,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    _check_ranges(epochs, batch_size, learning_rate, seed)
    before = _settings_before(out, resume)
    _check_unchanged(settings, before, out)
    train_images, test_images = (_images(data, split, row.transform, download) for split in ("train", "test"))
    settings["classes"] = list(train_images.classes)
    _check_unchanged(settings, before, out)
    if test_images.classes != train_images.classes:
        raise ValueError(f"`data` (={data}) has other classes for testing than for training")
    if len(train_images) < batch_size:
        raise ValueError(f"`batch_size` (={batch_size}) is above the number of images, {len(train_images)}")

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = create_model(model, num_classes=len(train_images.classes)).train()
    classifier = Classifier(
        network,
        row.transform,
        len(train_images.classes),
        loss=row.loss,
        learning_rate=learning_rate,
        seed=seed,
        compile_step=compile_step and _can_compile(),
    )
    order = EpochShuffle(len(train_images), seed)
    train_batches = DataLoader(train_images, batch_size, sampler=order, drop_last=True, collate_fn=default_convert)
    test_batches = DataLoader(test_images, 4 * batch_size, collate_fn=default_convert)
    out.mkdir(parents=True, exist_ok=True)
    (out / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    with torch.random.fork_rng(devices=()), _quiet(), _interruptible():
        trainer = _trainer(out, epochs, len(train_batches))
        checkpoint = out / _CHECKPOINT if before else None
        trainer.fit(classifier, train_batches, test_batches, ckpt_path=checkpoint, weights_only=True)
        measured = trainer.callback_metrics
        if not measured:  # of a run that had reached its last epoch before
            measured = trainer.validate(classifier, test_batches, verbose=False)[0]
    figures = {name: float(measured[name]) for name in ("test_loss", "test_accuracy")}
    training = {**settings, **figures}
    save_model(network, out / _MODEL, model, classes=train_images.classes, transform=row.transform, training=training)
    return figures


def _check_ranges(epochs: int, batch_size: int, learning_rate: float, seed: int) -> None:
    for name, value in {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"`{name}` (={value}) must be above 0 and finite")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` (={seed}) must be at least 0 and below 2**63")


def _settings_before(out: Path, resume: bool) -> dict[str, Any]:
    """The settings of the run in `out` that is to be resumed; empty if there is nothing to go on from."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` (={str(out)!r}) must be a folder")
    checkpoint, settings = out / _CHECKPOINT, out / _SETTINGS
    if not resume and (checkpoint.exists() or (out / _MODEL).exists()):
        raise ValueError(f"`out` (={str(out)!r}) holds a run already; `resume` it, or choose another folder")
    if not checkpoint.exists():
        if (out / _MODEL).exists():
            raise ValueError(f"`out` (={str(out)!r}) holds a trained model, and no checkpoint; choose another folder")
        return {}
    try:
        parts = torch.load(checkpoint, map_location="cpu", weights_only=True).keys()
    except Exception as error:  # damaged files are answered with nearly every kind of exception
        raise ValueError(f"{checkpoint}: is no intact checkpoint, the run cannot be resumed") from error
    if not parts >= {"state_dict", "optimizer_states", "lr_schedulers", "loops"}:
        raise ValueError(f"{checkpoint}: is no checkpoint of a training run")
    try:
        before = json.loads(settings.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{settings}: cannot be read, so that the run cannot be resumed ({error})") from error
    if not isinstance(before, dict) or not before:
        raise ValueError(f"{settings}: holds no settings, so that the run cannot be resumed")
    return before


def _check_unchanged(settings: dict[str, Any], before: dict[str, Any], out: Path) -> None:
    # A run of an older version may have had fewer settings.
    changed = [name for name in settings if before.get(name, settings[name]) != settings[name]]
    if changed:
        raise ValueError(
            f"`{changed[0]}` (={settings[changed[0]]}) was {before[changed[0]]} in the run in {out}; "
            "resume it with the same settings, or choose another folder"
        )


def _images(
    data: Path | None, split: Literal["train", "test"], transform: ImageTransform, download: bool
) -> InMemoryImages:
    if data is None or download:
        dataset = cifar10(data, split == "train", transform.view, download)
    else:
        dataset = open_dataset(data, split, transform.view)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Reading {split} images", total=len(dataset))
        return in_memory(dataset, lambda done, _: progress.update(task, completed=done))


def _can_compile() -> bool:
    """Whether a compiler is at hand, found out by compiling something small."""
    try:
        torch.compile(torch.sin)(torch.zeros(1))
    except Exception as error:  # every backend has failures of its own, and all mean the same
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warnings.warn(f"the training step is not compiled: {reason}", stacklevel=3)
        return False
    return True


def _trainer(out: Path, epochs: int, steps: int) -> lightning.Trainer:
    return lightning.Trainer(
        devices=1,
        max_epochs=epochs,
        logger=[CSVLogger(out, "csv"), TensorBoardLogger(out, "tensorboard", "")],
        callbacks=[
            ModelCheckpoint((out / _CHECKPOINT).parent, _CHECKPOINT.stem, enable_version_counter=False),
            LearningRateMonitor("epoch"),
        ],
        log_every_n_steps=min(50, steps),
        num_sanity_val_steps=0,
        enable_model_summary=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice on other products, on workers, and on the folder of a run, which may have moved."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", "The dirpath has changed")
        # Lightning 2.6 with torch 2.14
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.pytorch\.utilities\._pytree")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises as anywhere else; Lightning would end the process, and leave it deaf to another one."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop
