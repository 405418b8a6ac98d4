"""One training run: from a folder of labelled images to a file of weights."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from bcoskit._random import random_from
from bcoskit.convert import BcosConfig, GradualConversion, bcosify
from bcoskit.data import InMemoryImages
from bcoskit.models import ModelRow, Network
from bcoskit.training._augment import after_cropping
from bcoskit.training._engine import Machinery, can_compile, fit
from bcoskit.training._finetune import FineTuning, Freezing, check_frozen
from bcoskit.training._folder import EXPLANATIONS, RunFolder, check_ranges
from bcoskit.training._loading import Images, Unreadable, open_images
from bcoskit.training._module import Classifier
from bcoskit.training._options import Augmentation, Hardware, Loading, Loss, Optimization, check_kinds, check_whole
from bcoskit.training._start import begin, row_before, shown, weights_of
from bcoskit.training._watch import Watch

_OPTIMIZATION, _LOSS, _AUGMENTATION, _FINE_TUNING = Optimization(), Loss(), Augmentation(), FineTuning()
_LOADING, _HARDWARE = Loading(), Hardware()

Conversion: TypeAlias = Literal["bcosification", "v2", "v1", "none"]


def train(
    data: str | Path | None = None,
    *,
    out: str | Path,
    model: str = "resnet20.bcos_cifar10",
    from_: str | None = None,
    weights: str | None = None,
    size: int | None = None,
    channels: Literal[1, 3] | None = None,
    convert: Conversion = "bcosification",
    b: float | None = None,
    max_out: int | None = None,
    learnable_b: bool = False,
    gradual: float = 0.0,
    epochs: int = 100,
    batch_size: int = 64,
    learning_rate: float | None = None,
    optimization: Optimization = _OPTIMIZATION,
    loss: Loss = _LOSS,
    augmentation: Augmentation = _AUGMENTATION,
    fine_tuning: FineTuning = _FINE_TUNING,
    loading: Loading = _LOADING,
    hardware: Hardware = _HARDWARE,
    watch_every: int = 0,
    checkpoint_every: int = 0,
    seed: int = 42,
    compile_step: bool = True,
    resume: bool = False,
    download: bool = False,
    wandb: str | None = None,
) -> dict[str, float]:
    """Train a network on images, as the second B-cos paper does on CIFAR-10, or fine-tune one that has weights.

    By default Adam without weight decay, a cosine from `learning_rate` to 0, random crops and flips, and the loss
    of the model's row, for B-cos networks binary cross-entropy (Böhle et al., TPAMI 2024, CIFAR-10 experiments; Arya
    et al., NeurIPS 2024, for converted networks); `recipes/` has those of the papers. In `out` appear `settings.json`,
    `checkpoints/` (the last one), `csv/` and `tensorboard/` logs, and in the end
    `model.safetensors`, which `create_model` and `bcoskit explain --model` open.

    Args:
        data: Folder with training and test images: parquet shards, tar files in the layout of WebDataset, the original
            CIFAR-10 files, or class folders in `train` and `test`; `torchvision:NAME` or `hf:NAME` for datasets that
            these libraries know. None is CIFAR-10 in the folder in which torch keeps downloads. Where images may be of
            several classes, their accuracy is that of all decisions at a probability of ½, and the mean average
            precision is measured as well.
        out: Folder of the run.
        model: Name of the network, or a `.safetensors` file of one that is fine-tuned; its classes become those of
            the data. Of no account if `from_` is given.
        from_: Name of an ordinary network that is converted and fine-tuned: `timm/NAME`, or one of this package; or a
            `.safetensors` file of one.
        weights: With which a network by name begins: "pretrained" for the ones that go with its name, "fresh" for
            none, or a file. By default "fresh" for `model`, "pretrained" for `from_`. The classifier is fresh where
            the number of classes is another one, or `fine_tuning` says so.
        size: Side in pixels of the images that the network sees, to which their shorter side is brought; by default
            as with the network's own transform.
        channels: 3 for colour and 1 for grey images, if the network is to see others than usual and its weights are
            fresh, or timm's; without it grey images are shown to a network for colour as colour.
        convert: The preset by which `from_` is converted, or "none" to fine-tune the ordinary network.
        b: Exponent of the converted network; that of the preset if None.
        max_out: Filters that compete for each output of the converted network, copies of one at first; that of the
            preset if None.
        learnable_b: Whether every layer of the converted network learns its exponent.
        gradual: Part of the training, from 0 to 1, in which exponents and biases of the converted network move from
            those of the ordinary one; with 0 they do at once.
        epochs: Passes over the training images.
        batch_size: Images per step, of all processes together; the rest of an epoch that fills no batch is left out.
        learning_rate: At the start, after a warm-up; by default 1e-3, and 1e-4 with `from_` or weights.
        optimization: Optimiser, schedule, clipping and averages.
        loss: What is minimised.
        augmentation: Of training images.
        fine_tuning: Which layers are fresh or stay as they are, and how the learning rates of the others differ.
        loading: Where images are, and what happens to those that cannot be read.
        hardware: Devices, processes, precision. A run may be resumed on others.
        watch_every: Epochs from one look at explanations of test images to the next, 0 for none: figures in the logs
            (pointing game, alignment of `W(x)` with `x`, residual), and pictures in `explanations/`.
        checkpoint_every: Steps of the optimiser from one checkpoint within an epoch to the next, 0 for none: then a run
            that was broken off goes on from the end of its last epoch.
        seed: Of weights, order and augmentation. A run that was broken off and resumed sees what it would have seen.
        compile_step: Compile the network for training, where a compiler is at hand and nothing is recomputed.
        resume: Go on from the last checkpoint in `out`, if there is one.
        download: Download CIFAR-10 to `data`, or a dataset of torchvision, if it is not there.
        wandb: Project of Weights & Biases to log to as well; its own environment variables apply.

    Returns:
        Loss and accuracy on the test images after the last epoch.

    Raises:
        ValueError: If an argument is out of its range, the data do not fit, or `out` holds another run, a damaged
            one, or one that is not to be resumed.
        ImageError: If more images cannot be read than are allowed.
        ConnectionError: If weights cannot be downloaded.
        TypeError: If a group of options is none.
        OSError: If a checkpoint, or something else in `out`, cannot be written; the checkpoint before it stays.
        RuntimeError: If the loss is not finite; the last checkpoint is from before.
    """
    name, out = model if from_ is None else from_, Path(out)
    check_kinds(
        model=(name, str),
        optimization=(optimization, Optimization),
        loss=(loss, Loss),
        augmentation=(augmentation, Augmentation),
        fine_tuning=(fine_tuning, FineTuning),
        loading=(loading, Loading),
        hardware=(hardware, Hardware),
    )
    weights = weights_of(name, weights, "fresh" if from_ is None else "pretrained")
    start = False if weights == name else given(weights)
    row = shown(row_before(name, start), size, channels)
    if row.loss == "none":
        raise ValueError(f"`model` (={name!r}) has embeddings for outputs, not classes that could be trained")
    if learning_rate is None:
        learning_rate = 1e-3 if from_ is None and weights == "fresh" else 1e-4
    check_ranges(epochs, batch_size, learning_rate, seed)
    config, converting = _converting(from_, convert, b, max_out, learnable_b, gradual)
    check_frozen(fine_tuning, weights, gradual)
    _check_together(hardware, optimization, augmentation, row, epochs, gradual, learnable_b)
    for given_as, every in {"watch_every": watch_every, "checkpoint_every": checkpoint_every}.items():
        if every != 0:
            check_whole(given_as, every, 1)
    settings: dict[str, Any] = {
        "model": row.name,
        "weights": weights,
        "size": row.transform.size,
        "channels": row.transform.channels,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "optimization": asdict(optimization),
        "loss": asdict(loss),
        "augmentation": asdict(augmentation),
        "fine_tuning": asdict(fine_tuning),
        "precision": hardware.precision,
        "seed": seed,
    }
    folder = RunFolder(out, settings | converting, resume=resume)
    unreadable = Unreadable(loading.max_unreadable, out, folder.resumed)
    train_images, test_images = (
        open_images(
            data,
            split,
            row.transform,
            loading=loading,
            augmentation=augmentation,
            seed=seed,
            unreadable=unreadable,
            download=download,
        )
        for split in ("train", "test")
    )
    classes, in_memory = train_images.classes, isinstance(train_images, InMemoryImages)
    folder.settle(classes=list(classes), images="memory" if in_memory else "disk")
    folder.settle_data(train_images, test_images)
    if loss.kind == "model":
        loss = replace(loss, kind=row.loss if config is None and not train_images.multi_label else "bce")
    _check_images(data, train_images, test_images, batch_size, augmentation, loss)
    _check_updates(len(train_images) // batch_size, epochs, optimization)
    network, moving = _network(name, start, row, classes, fine_tuning, config, gradual, seed)
    network.loss = "cross_entropy" if loss.kind == "cross_entropy" else "bce"
    if hardware.strategy == "fsdp":
        _check_shareable(network)
    freezing = Freezing(network, fine_tuning)
    learner = Classifier(
        network.train(),
        network.transform,
        len(classes),
        multi_label=train_images.multi_label,
        loss=loss,
        augmentation=augmentation if in_memory else after_cropping(augmentation),
        optimization=optimization,
        compile_step=compile_step and not hardware.recompute and can_compile(),
        learning_rate=learning_rate,
        seed=seed,
        fine_tuning=fine_tuning,
        gradual=moving,
        gradual_part=gradual,
    )
    watches = [Watch(test_images, network.transform, out / EXPLANATIONS, watch_every)] if watch_every else []
    folder.begin()
    figures = fit(
        learner,
        train_images,
        test_images,
        batch_size=batch_size,
        out=out,
        epochs=epochs,
        resumed=folder.resumed,
        unreadable=unreadable,
        machinery=Machinery(hardware, loading, wandb, checkpoint_every),
        callbacks=[freezing, *watches],
    )
    folder.finish(network, classes, figures)
    return figures


def _converting(
    from_: str | None, convert: Conversion, b: float | None, max_out: int | None, learnable_b: bool, gradual: float
) -> tuple[BcosConfig | None, dict[str, Any]]:
    """What becomes of an ordinary network, and the settings that say so."""
    settings = {"convert": convert, "b": b, "max_out": max_out, "learnable_b": learnable_b, "gradual": gradual}
    if from_ is not None:
        return conversion(convert, b, learnable_b, gradual, max_out), settings
    usual = ("bcosification", None, None, False, 0.0)
    for (name, value), default in zip(settings.items(), usual, strict=True):
        if value != default:
            raise ValueError(f"`{name}` (={value}) is for a network that is converted: give `from_` as well")
    return None, {}


def _check_together(
    hardware: Hardware,
    optimization: Optimization,
    augmentation: Augmentation,
    row: ModelRow,
    epochs: int,
    gradual: float,
    learnable_b: bool,
) -> None:
    """What does not go together."""
    if optimization.warmup_epochs >= epochs:
        warmup = f"`warmup_epochs` (={optimization.warmup_epochs})"
        raise ValueError(f"{warmup} must be below `epochs` (={epochs}): the learning rate would never be reached")
    if hardware.strategy == "fsdp" and (learnable_b or gradual):
        name = "learnable_b" if learnable_b else "gradual"
        raise ValueError(f"`{name}` makes exponents numbers, which 'fsdp' cannot share out: take 'ddp'")
    if hardware.strategy == "fsdp" and optimization.ema is not None:
        raise ValueError(f"`ema` (={optimization.ema}) needs whole weights, which 'fsdp' shares out: take 'ddp'")
    if gradual and optimization.ema is not None:
        raise ValueError(f"`gradual` (={gradual}) changes the network, of which there can be no average (`ema`) then")
    if augmentation.lighting and row.transform.channels != 3:
        raise ValueError(f"`augmentation.lighting` (={augmentation.lighting}) is for images in colour, these are grey")


def _check_updates(batches: int, epochs: int, optimization: Optimization) -> None:
    """Whether there are as many batches in an epoch, and steps in all, as options need."""
    updates = epochs * (batches // optimization.accumulate)
    if not updates:
        raise ValueError(f"`accumulate` (={optimization.accumulate}) is above the number of batches, {batches}")
    if optimization.ema is not None and optimization.ema_every > updates:
        raise ValueError(f"`ema_every` (={optimization.ema_every}) is above the number of steps, {updates}")


def _check_shareable(network: nn.Module) -> None:
    """Whether all parameters can be shared out between processes."""
    numbers = [name for name, parameter in network.named_parameters() if not parameter.ndim]
    if numbers:
        raise ValueError(f"`strategy` (='fsdp') cannot share out numbers such as {numbers[0]!r}: take 'ddp'")


def _check_images(
    data: str | Path | None,
    train_images: Images,
    test_images: Images,
    batch_size: int,
    augmentation: Augmentation,
    loss: Loss,
) -> None:
    """Whether they go together, and with how they are trained on."""
    if test_images.classes != train_images.classes:
        apart = set(train_images.classes) ^ set(test_images.classes)
        what = f"{min(apart)!r} is in one split only" if apart else "their order differs"
        raise ValueError(f"`data` (={data}) has other classes for testing than for training: {what}")
    if train_images.multi_label != test_images.multi_label:
        raise ValueError(f"`data` (={data}) has images of several classes in one split only")
    if len(train_images.classes) == 1 and not train_images.multi_label:
        raise ValueError(f"`data` (={data}) has one class, {train_images.classes[0]!r}: there is nothing to tell apart")
    if len(train_images) < batch_size:
        raise ValueError(f"`batch_size` (={batch_size}) is above the number of images, {len(train_images)}")
    if batch_size % 2 and (augmentation.mixup or augmentation.cutmix):
        raise ValueError(f"`batch_size` (={batch_size}) must be even for mixup and cutmix, which take images in pairs")
    if train_images.multi_label and loss.kind != "bce":
        raise ValueError(f"`loss.kind` (={loss.kind!r}) is for images of one class, these have several: take 'bce'")


def _network(
    name: str,
    start: bool | str,
    row: ModelRow,
    classes: tuple[str, ...],
    fine_tuning: FineTuning,
    config: BcosConfig | None,
    gradual: float,
    seed: int,
) -> tuple[Network, GradualConversion | None]:
    """The network that is trained, and its conversion if that is gradual."""
    with random_from(seed):
        network: nn.Module = begin(name, start, row, classes, fine_tuning.fresh_head)
        moving = GradualConversion(network, config) if config is not None and gradual else None
        if moving is not None:
            network = moving.model
        elif config is not None:
            network = bcosify(network, config, inplace=True)
    return as_network(network, name), moving


def given(weights: str) -> bool | str:
    """What `create_model` takes for the word or the file of a command line."""
    return {"pretrained": True, "fresh": False}.get(weights, weights)


def conversion(
    name: Conversion, b: float | None, learnable_b: bool, gradual: float, max_out: int | None = None
) -> BcosConfig | None:
    """What an ordinary network is to become, None if it stays one."""
    if not 0 <= gradual <= 1:
        raise ValueError(f"`gradual` (={gradual}) must be a part of the training, from 0 to 1")
    if name == "none":
        wanted = {"b": b is not None, "max_out": max_out is not None, "learnable_b": learnable_b, "gradual": gradual}
        for given in (option for option, value in wanted.items() if value):
            raise ValueError(f"`{given}` needs a network that is converted, and `convert` is 'none'")
        return None
    if learnable_b and gradual:
        raise ValueError(f"`gradual` (={gradual}) moves the exponents, which cannot be learnt then (`learnable_b`)")
    config = BcosConfig.preset(name)
    return replace(
        config,
        b=config.b if b is None else b,
        max_out=config.max_out if max_out is None else max_out,
        learnable_b=learnable_b,
    )


def as_network(network: nn.Module, name: str | None) -> Network:
    """The network, if its conversion is a network by name as well."""
    if not isinstance(network, Network):
        raise ValueError(f"{name!r} cannot be trained after its conversion: no layer reads its image")  # noqa: TRY004
    return network
