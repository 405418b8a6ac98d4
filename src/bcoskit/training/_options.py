"""How a network is trained, as plain values: optimiser, schedule, loss, augmentation, data, hardware."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal


def check(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise a `ValueError` for a value that is no number, or out of its range."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"`{name}` (={value!r}) must be a number")  # noqa: TRY004
    if not low <= value <= high or not math.isfinite(value):
        upper = "" if high == math.inf else f" and at most {high}"
        raise ValueError(f"`{name}` (={value}) must be at least {low}{upper}")


def check_whole(name: str, value: int, low: int, high: float = math.inf) -> None:
    """Raise a `ValueError` for a value that is no whole number, or out of its range."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"`{name}` (={value!r}) must be a whole number")  # noqa: TRY004
    check(name, value, low, high)


def check_switches(options: object, *names: str) -> None:
    """Raise a `ValueError` for one of these that is neither True nor False."""
    for name in names:
        if not isinstance(value := getattr(options, name), bool):
            raise ValueError(f"`{name}` (={value!r}) must be True or False")  # noqa: TRY004


def check_kinds(**options: tuple[object, type]) -> None:
    """Raise a `TypeError` for the first of these that is of another class than it must be."""
    for name, (value, kind) in options.items():
        if not isinstance(value, kind):
            raise TypeError(f"`{name}` (={value!r}) must be a {kind.__name__}")


def check_used(options: Any, needed: dict[str, tuple[bool, str]]) -> None:
    """Raise a `ValueError` for a changed value that has no effect, with what it would need."""
    usual = {field.name: field.default for field in fields(options)}
    for name, (used, need) in needed.items():
        if not used and getattr(options, name) != usual[name]:
            raise ValueError(f"`{name}` (={getattr(options, name)!r}) needs {need}")


@dataclass(frozen=True)
class Optimization:
    """Optimiser, schedule of the learning rate, clipping of gradients, averages of weights.

    The learning rate at step `t` is that of the start times a factor: from `warmup_start` to 1 linearly during the
    warm-up, then down by a cosine, by steps, or not at all.

    Attributes:
        optimizer: "adam" or "adamw" or "sgd".
        weight_decay: Of all parameters: decoupled with "adamw", else part of the gradient.
        momentum: Of "sgd".
        schedule: "cosine" (half a cosine, from 1 to `final`), "quarter_cosine" (the first quarter of one, plus
            `final`), "step" (times `decay` every `decay_epochs`) or "constant".
        per: Whether the factor changes with every "step" or every "epoch".
        final: Factor at the end of a cosine.
        decay: Factor of the schedule "step".
        decay_epochs: Epochs between its steps.
        warmup_epochs: Length of the warm-up.
        warmup_start: Factor at its beginning.
        clip: "none", "agc" (adaptive, each row of a weight by its own norm: Brock et al., ICML 2021) or "norm" (of all
            gradients together).
        clip_at: Largest norm of a gradient, with "agc" relative to that of its weights.
        accumulate: Batches whose gradients are averaged before a step; what is left of an epoch is left out.
        ema: Decay of an exponential average of the weights, which then is what is measured and saved; None for none.
        ema_every: Steps from one update of the average to the next.

    Raises:
        ValueError: If a value is out of its range.
    """

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Literal["cosine", "quarter_cosine", "step", "constant"] = "cosine"
    per: Literal["step", "epoch"] = "step"
    final: float = 0.0
    decay: float = 0.1
    decay_epochs: int = 30
    warmup_epochs: float = 0.0
    warmup_start: float = 0.01
    clip: Literal["none", "agc", "norm"] = "none"
    clip_at: float = 0.01
    accumulate: int = 1
    ema: float | None = None
    ema_every: int = 1

    def __post_init__(self) -> None:
        choices = {
            "optimizer": ("adam", "adamw", "sgd"),
            "schedule": ("cosine", "quarter_cosine", "step", "constant"),
            "per": ("step", "epoch"),
            "clip": ("none", "agc", "norm"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}")
        for name in ("weight_decay", "warmup_epochs"):
            check(name, getattr(self, name), 0)
        for name in ("momentum", "final", "decay", "warmup_start"):
            check(name, getattr(self, name), 0, 1)
        for name in ("decay_epochs", "accumulate", "ema_every"):
            check_whole(name, getattr(self, name), 1)
        check("clip_at", self.clip_at, 1e-12)
        if self.ema is not None:
            check("ema", self.ema, 0, 1)
            if self.ema == 1:
                raise ValueError("`ema` (=1) must be below 1: the average would stay what it is at first")
        cosine = self.schedule in ("cosine", "quarter_cosine")
        needed = {
            "momentum": (self.optimizer == "sgd", "`optimizer` 'sgd'"),
            "final": (cosine, "a cosine for `schedule`"),
            "decay": (self.schedule == "step", "`schedule` 'step'"),
            "decay_epochs": (self.schedule == "step", "`schedule` 'step'"),
            "clip_at": (self.clip != "none", "`clip` 'agc' or 'norm'"),
            "ema_every": (self.ema is not None, "`ema`"),
        }
        check_used(self, needed)

    def factor(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """What the learning rate is multiplied by at a step.

        Args:
            step: From 0.
            steps_per_epoch: Steps of the optimiser in an epoch.
            epochs: Of the whole run.
        """
        if self.per == "epoch":
            step = step // steps_per_epoch * steps_per_epoch
        warmup = self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.warmup_start + (1 - self.warmup_start) * step / warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "step":
            return self.decay ** (step // (self.decay_epochs * steps_per_epoch))
        done = min((step - warmup) / max(epochs * steps_per_epoch - warmup, 1), 1.0)
        if self.schedule == "quarter_cosine":
            return math.cos(math.pi / 2 * done) + self.final
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Loss:
    """What is minimised, of logits and labels.

    Targets are 1 for the label and 0 for all other classes, or mixed by mixup and cutmix; then, in this order,
    `t (1 - smoothing) + smoothing / N`, `max(t, 1/N)` if off-labels are uniform, and 1 above the threshold, else 0.

    Attributes:
        kind: "bce" (binary cross-entropy, the mean over samples and classes), "cross_entropy", or "model" for the one
            that goes with the model.
        off_labels: "zero", or "uniform" (Böhle et al., TPAMI 2024, ImageNet experiments).
        smoothing: Share of a target that is spread over all classes.
        threshold: Above which a target counts as 1; None to take targets as they are.
        auxiliary: Weight of the loss of an auxiliary classifier.

    Raises:
        ValueError: If a value is out of its range.
    """

    kind: Literal["model", "bce", "cross_entropy"] = "model"
    off_labels: Literal["zero", "uniform"] = "zero"
    smoothing: float = 0.0
    threshold: float | None = None
    auxiliary: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("model", "bce", "cross_entropy"):
            raise ValueError(f"`kind` (={self.kind!r}) must be 'model', 'bce' or 'cross_entropy'")
        if self.off_labels not in ("zero", "uniform"):
            raise ValueError(f"`off_labels` (={self.off_labels!r}) must be 'zero' or 'uniform'")
        check("smoothing", self.smoothing, 0, 1)
        check("auxiliary", self.auxiliary, 0)
        if self.threshold is not None:
            check("threshold", self.threshold, 0, 1)
            if self.threshold == 1:
                raise ValueError("`threshold` (=1) must be below 1: no target is above it")


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images, all of it at random.

    Attributes:
        crop: "padded" (shifted by up to an eighth of the side, zeros around), "resized" (a part of the image, brought
            to its size) or "none".
        smallest: Smallest share of the image in a resized crop.
        size: Side in pixels of resized crops, that of the network if None.
        flip: Whether images are mirrored.
        policy: "none", "randaugment" (two operations of `magnitude`: Cubuk et al., NeurIPS 2020) or "trivialaugment"
            (one of any strength: Müller and Hutter, ICCV 2021).
        magnitude: Of RandAugment, up to 30.
        jitter: Largest relative change of brightness, contrast and saturation.
        lighting: Standard deviation of the shifts along the principal axes of ImageNet's colours, each as a multiple of
            the axis' own deviation (Krizhevsky et al., NeurIPS 2012, section 4.1); for images in colour.
        erasing: Probability that a rectangle is erased.
        mixup: Parameter of the Beta distribution by which two images are mixed, 0 for never (Zhang et al., ICLR 2018).
        cutmix: Likewise for rectangles of another image (Yun et al., ICCV 2019); with both, each is taken half of
            the time.
        repeats: How often each image of a batch appears in it, augmented anew (Hoffer et al., CVPR 2020); an epoch
            sees as many different images less.

    Raises:
        ValueError: If a value is out of its range.
    """

    crop: Literal["padded", "resized", "none"] = "padded"
    smallest: float = 0.08
    size: int | None = None
    flip: bool = True
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    magnitude: int = 9
    jitter: float = 0.0
    lighting: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1

    def __post_init__(self) -> None:
        if self.crop not in ("padded", "resized", "none"):
            raise ValueError(f"`crop` (={self.crop!r}) must be 'padded', 'resized' or 'none'")
        if self.policy not in ("none", "randaugment", "trivialaugment"):
            raise ValueError(f"`policy` (={self.policy!r}) must be 'none', 'randaugment' or 'trivialaugment'")
        if self.crop == "padded" and not self.flip:
            raise ValueError("`flip` (=False) needs another `crop` than 'padded', which flips")
        check("smallest", self.smallest, 1e-3, 1)
        if self.size is not None:
            check_whole("size", self.size, 8)
            if self.crop != "resized":
                raise ValueError(f"`size` (={self.size}) needs `crop` 'resized', not {self.crop!r}")
        check_whole("magnitude", self.magnitude, 0, 30)
        for name in ("jitter", "erasing"):
            check(name, getattr(self, name), 0, 1)
        for name in ("lighting", "mixup", "cutmix"):
            check(name, getattr(self, name), 0)
        check_whole("repeats", self.repeats, 1)
        check_switches(self, "flip")
        needed = {
            "smallest": (self.crop == "resized", f"`crop` 'resized', not {self.crop!r}"),
            "magnitude": (self.policy == "randaugment", f"`policy` 'randaugment', not {self.policy!r}"),
        }
        check_used(self, needed)


@dataclass(frozen=True)
class Loading:
    """Where the images of a run are, and what happens to those that cannot be read.

    Attributes:
        images: Where they are: in "memory", decoded once in the size that the network sees; on "disk", decoded by the
            batch, of which resized crops are then parts of the whole image; or "auto", in memory if all images of a
            split take at most 4 GiB.
        workers: Processes that decode images from disk; by default as many as there are cores for each process that
            trains, at most 8. With 0 the process that trains does it.
        max_unreadable: How many images each process may leave out since they cannot be read; each is named in
            `unreadable.txt` in the folder of the run. One more stops it.

    Raises:
        ValueError: If a value is out of its range.
    """

    images: Literal["auto", "memory", "disk"] = "auto"
    workers: int | None = None
    max_unreadable: int = 0

    def __post_init__(self) -> None:
        if self.images not in ("auto", "memory", "disk"):
            raise ValueError(f"`images` (={self.images!r}) must be 'auto', 'memory' or 'disk'")
        if self.workers is not None:
            check_whole("workers", self.workers, 0)
        check_whole("max_unreadable", self.max_unreadable, 0)


@dataclass(frozen=True)
class Hardware:
    """On what a run is computed; Lightning and `torchrun` do it.

    A batch is shared out to all processes. Uncentred and other batch norms of this package take the statistics of the
    whole batch then, so that a run gives the same network on any number of processes, to rounding; only mixup and
    cutmix mix other pairs.

    Attributes:
        accelerator: "auto", "cpu", "gpu", "mps" or "tpu".
        devices: Devices of one machine, -1 for all; a process each.
        nodes: Machines. Each starts the same command, by `torchrun`, SLURM, or with the variables of Lightning.
        strategy: "auto", "ddp" (a copy of the network in each process) or "fsdp" (weights, gradients and moments
            shared out).
        precision: "32", or mixed with "bf16" or "16": then convolutions and products are in half precision, while
            norms, cosines, losses, weights and moments stay in single precision.
        recompute: Whether the stages of the network are computed once more in the backward pass, instead of being
            kept in memory. Gradients are the same, running statistics count each batch once.

    Raises:
        ValueError: If a value is out of its range.
    """

    accelerator: Literal["auto", "cpu", "gpu", "mps", "tpu"] = "auto"
    devices: int = 1
    nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["32", "bf16", "16"] = "32"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, known in {
            "accelerator": ("auto", "cpu", "gpu", "mps", "tpu"),
            "strategy": ("auto", "ddp", "fsdp"),
            "precision": ("32", "bf16", "16"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(map(repr, known))}")
        if self.devices != -1:
            check_whole("devices", self.devices, 1)
        check_whole("nodes", self.nodes, 1)
        check_switches(self, "recompute")
