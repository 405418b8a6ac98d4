"""Alignment: a converted network learns what its teacher does, from images without labels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchvision.transforms import v2

from bcoskit._random import random_from
from bcoskit.convert import GradualConversion, bcosify
from bcoskit.data import ImageDataset, ImageTransform, InMemoryImages, find_images, open_dataset
from bcoskit.data._datasets import NoSplitError
from bcoskit.data._parquet import SPLITS
from bcoskit.models import Network, create_model
from bcoskit.training._augment import one_by_one
from bcoskit.training._engine import Machinery, can_compile, fit
from bcoskit.training._folder import RunFolder, check_ranges
from bcoskit.training._loading import Unreadable, loaded
from bcoskit.training._module import Batch, Learner, encoded, seeded
from bcoskit.training._options import Hardware, Loading, check_kinds, check_whole
from bcoskit.training._run import Conversion, as_network, conversion, given
from bcoskit.training._start import row_before, weights_of

_HARDWARE = Hardware()
_EVERY = 10  # of images without splits, every tenth is held out to measure on


class WithStages(nn.Module):
    """A network that returns its logits and the outputs of some layers.

    Args:
        model: The network.
        stages: Paths of the layers.
    """

    def __init__(self, model: nn.Module, stages: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._outputs: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(path).register_forward_hook(self._keeper(path)) for path in stages]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(N, C, H, W) to logits (N, num_classes) and outputs of stages, in their order."""
        self._outputs.clear()
        logits = self.model(x)
        outputs = list(self._outputs.values())
        self._outputs.clear()
        return logits, outputs

    def remove(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()

    def _keeper(self, path: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self._outputs[path] = output

        return keep


class Aligner(Learner):
    """Trains a converted network to reproduce features and outputs of the ordinary one.

    The loss is the mean of `|s - t|² / |t|²` over the stages and the logits, `s` of the student, `t` of the teacher,
    each sample by itself; of the logits their mean over the classes is subtracted, since a constant of all classes
    changes no prediction.

    Args:
        student: The network that learns.
        teacher: The one that it learns from.
        stages: From the student's layers to the teacher's.
        size: Side of the images that both see.
        has_labels: Whether the labels of test images are classes of both.
        compile_step: Whether both are compiled for training.
        arguments: Of `Learner`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        stages: dict[str, str],
        *,
        size: int,
        has_labels: bool,
        compile_step: bool,
        **arguments: Any,
    ) -> None:
        super().__init__(student, **arguments)
        self.has_labels = has_labels
        self._transforms = student.transform, teacher.transform
        teacher = teacher.to(memory_format=torch.channels_last).requires_grad_(False).eval()
        # In lists, so that neither is registered, and saved, a second time.
        self._hooked = [WithStages(student, tuple(stages)), WithStages(teacher, tuple(stages.values()))]
        self._both: list[Any] = [torch.compile(network) if compile_step else network for network in self._hooked]
        self._augment = augmentation(size)
        self.agreement, self.accuracy, self.distance = MeanMetric(), MeanMetric(), MeanMetric()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._hooked[1]._apply(fn, recurse)  # the teacher goes where the student goes
        return super()._apply(fn, recurse)

    def uncompile(self) -> None:
        """Go on with the networks as they are."""
        self._both = list(self._hooked)

    def batch_loss(self, batch: Batch, batch_index: int) -> Tensor:
        """The loss of one augmented batch.

        Raises:
            RuntimeError: If it is not finite, before the step that it would spoil.
        """
        images, _ = batch
        generator = seeded(self.seed, self.current_epoch, batch_index)
        augmented = one_by_one(images, self._augment, generator, self._part)
        student, teacher = self._outputs(augmented)
        return self.checked(alignment_loss(student, teacher))

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """How often the student names what the teacher names, and what the label is; and the loss."""
        images, labels = batch
        size = self._transforms[0].size
        top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
        student, teacher = self._outputs(images[..., top : top + size, left : left + size], compiled=False)
        named = student[0].argmax(1)
        self.agreement.update((named == teacher[0].argmax(1)).float())
        self.distance.update(alignment_loss(student, teacher), len(images))
        self.log("test_loss", self.distance, on_step=False, on_epoch=True)
        self.log("test_agreement", self.agreement, prog_bar=True, on_step=False, on_epoch=True)
        if self.has_labels:
            self.accuracy.update((named == labels).float())
            self.log("test_accuracy", self.accuracy, prog_bar=True, on_step=False, on_epoch=True)

    def release(self) -> None:
        """After a run and its last measurement: both networks without hooks."""
        super().release()
        for network in self._hooked:
            network.remove()

    def _outputs(self, images: Tensor, compiled: bool = True) -> list[tuple[Tensor, list[Tensor]]]:
        student, teacher = self._both if compiled else self._hooked
        with torch.no_grad():
            expected = teacher(encoded(images, self._transforms[1]))
        return [student(encoded(images, self._transforms[0])), expected]


def alignment_loss(student: tuple[Tensor, list[Tensor]], teacher: tuple[Tensor, list[Tensor]]) -> Tensor:
    """Mean over stages and logits of `|s - t|² / |t|²`, in single precision at least."""
    pairs = [*zip(student[1], teacher[1], strict=True)]
    logits = [_not_half(each[0]) for each in (student, teacher)]
    ours, theirs = (each - each.mean(1, keepdim=True) for each in logits)
    pairs.append((ours, theirs))
    return torch.stack([_relative_error(ours, theirs) for ours, theirs in pairs]).mean()


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    ours, theirs = _not_half(ours), _not_half(theirs)  # squares leave the range of half precision
    energy = theirs.flatten(1).square().sum(1)
    error = (ours - theirs).flatten(1).square().sum(1)
    return (error / energy.clamp_min(torch.finfo(energy.dtype).tiny)).mean()


def _not_half(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def augmentation(size: int) -> Any:
    """Heavy augmentation of uint8 images, each by itself: crops, flips, rotations, colours."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR),
        ]
    )


def align(
    data: str | Path,
    *,
    out: str | Path,
    teacher: str,
    weights: str | None = None,
    convert: Conversion = "bcosification",
    b: float | None = None,
    gradual: float = 0.5,
    epochs: int = 100,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    train_size: int | None = None,
    measure_every: int = 1,
    max_unreadable: int = 0,
    hardware: Hardware = _HARDWARE,
    seed: int = 42,
    compile_step: bool = True,
    resume: bool = False,
) -> dict[str, float]:
    """Convert a network and let it learn, from images without labels, to do what the original does.

    The converted network starts with the teacher's weights, and learns to reproduce the teacher's features at several
    depths and its logits, on images that are heavily augmented (the way of ALOE, CVPR 2026, with relative squared
    errors in the place of cosines, since magnitudes matter to what follows). In `out` appear the files of
    `bcoskit train`.

    Args:
        data: Folder of images, at any depth; or a folder of parquet shards, class folders or images with splits, whose
            test split is measured on. Of images without splits every tenth is held out for that. Labels are never
            learnt from; where they are those of the teacher's classes, the accuracy is measured.
        out: Folder of the run.
        teacher: Name of an ordinary network: `timm/NAME`, or one of this package; or a `.safetensors` file of one.
        weights: Those of a network by name: "pretrained", the default, for the ones that go with its name, "fresh" for
            none, or a file.
        convert: The preset by which the student is made.
        b: Exponent of the student; that of the preset if None.
        gradual: Part of the training, from 0 to 1, in which exponents and biases move from those of the teacher; with
            0 they do at once.
        epochs: Passes over the training images.
        batch_size: Images per step; the rest of an epoch that fills no batch is left out.
        learning_rate: Of Adam at the start; a cosine takes it to 0.
        train_size: Side of the augmented images; by default that of the network. Smaller ones are quicker.
        measure_every: Epochs from one measurement to the next.
        max_unreadable: As of `Loading`.
        hardware: Devices, processes, precision.
        seed: Of order and augmentation. A run that was broken off and resumed sees what it would have seen.
        compile_step: Compile both networks, where a compiler is at hand.
        resume: Go on from the last checkpoint in `out`, if there is one.

    Returns:
        After the last epoch on the test images: the loss, the agreement (how often student and teacher name the same
        class), and the accuracy if they have labels.

    Raises:
        ValueError: If an argument is out of its range, the data do not fit, or `out` holds another run, a damaged
            one, or one that is not to be resumed.
        ConnectionError: If weights cannot be downloaded.
        RuntimeError: If the loss is not finite; the last checkpoint is from before.
    """
    data, out = Path(data), Path(out)
    check_kinds(teacher=(teacher, str), hardware=(hardware, Hardware))
    weights = weights_of(teacher, weights, "pretrained")
    start = False if weights == teacher else given(weights)
    row = row_before(teacher, start)
    if cast("str", convert) == "none":
        raise ValueError("`convert` (='none') leaves nothing to be learnt: the student would be the teacher")
    config = conversion(convert, b, False, gradual)
    assert config is not None
    config = replace(config, logit_bias=None)  # the logits are to be those of the teacher
    if train_size is None:
        train_size = row.transform.size
    settings: dict[str, Any] = {
        "teacher": teacher,
        "weights": weights,
        "convert": convert,
        "b": b,
        "gradual": gradual,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "train_size": train_size,
        "precision": hardware.precision,
        "seed": seed,
    }
    check_ranges(epochs, batch_size, learning_rate, seed)
    if hardware.recompute or hardware.strategy == "fsdp":
        raise ValueError(f"`hardware` (={hardware}): `recompute` and 'fsdp' are for `train` alone")
    for name, value in {"train_size": train_size, "measure_every": measure_every}.items():
        check_whole(name, value, 1)
    folder = RunFolder(out, settings, resume=resume)
    with random_from(seed):
        original = create_model(teacher, weights=start)
        moving = GradualConversion(original, config) if gradual else None
        student = as_network(bcosify(original, config) if moving is None else moving.model, teacher)
    student.loss = original.loss
    unreadable = Unreadable(max_unreadable, out, folder.resumed)
    train_images, test_images, has_labels = _splits(data, row.transform, original.classes, unreadable)
    folder.settle_data(train_images, test_images)
    if len(train_images) < batch_size:
        raise ValueError(f"`batch_size` (={batch_size}) is above the number of images, {len(train_images)}")
    learner = Aligner(
        student.train(),
        original,
        stages_of(student, original),
        size=train_size,
        has_labels=has_labels,
        compile_step=compile_step and can_compile(),
        learning_rate=learning_rate,
        seed=seed,
        gradual=moving,
        gradual_part=gradual,
    )
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
        machinery=Machinery(hardware, Loading("memory", max_unreadable=max_unreadable)),
        measure_every=measure_every,
    )
    folder.finish(student, original.classes, figures)
    return figures


def stages_of(student: Network, teacher: Network) -> dict[str, str]:
    """The layers whose outputs are compared, from the student's paths to the teacher's."""
    known = {path for path, _ in student.named_modules()}
    return {path: path for path in teacher.stage_names if path in known}


def _splits(
    data: Path, transform: ImageTransform, classes: tuple[str, ...], unreadable: Unreadable
) -> tuple[InMemoryImages, InMemoryImages, bool]:
    """Images to learn from and to measure on, larger than the network's, and whether the labels are its classes."""
    shorter = transform.resize or transform.size
    view = replace(transform, size=shorter, resize=shorter).view
    try:
        splits = [open_dataset(data, "train", view), open_dataset(data, "test", view)]
    except NoSplitError:
        splits = [ImageDataset(part, [0] * len(part), ("image",), view) for part in _without_labels(data)]
        has_labels = False
    else:
        has_labels = not splits[1].multi_label
        try:
            splits[1].match(classes)
        except ValueError:  # they are of other classes
            has_labels = False
    train_images = loaded(splits[0], "train", unreadable)
    return train_images, loaded(splits[1], "test", unreadable), has_labels


def _without_labels(data: Path) -> tuple[list[Path], list[Path]]:
    """The files of images to learn from and to measure on: those of folders named after the splits, or every tenth."""
    parts = [next((data / name for name in SPLITS[split] if (data / name).is_dir()), None) for split in SPLITS]
    if all(parts):
        learnt, measured = (sorted(find_images([part])) for part in parts if part is not None)
        return learnt, measured
    files = sorted(find_images([data]))
    if len(files) < _EVERY:
        raise ValueError(f"`data` (={str(data)!r}) holds {len(files)} images, fewer than {_EVERY}") from None
    return [file for index, file in enumerate(files) if index % _EVERY], files[::_EVERY]
