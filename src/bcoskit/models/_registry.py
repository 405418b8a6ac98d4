"""Networks by name: one table of rows, and what makes a network out of a row or a file."""

import difflib
import fnmatch
import math
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bcoskit._files import read_tensors, write_tensors
from bcoskit.data import ImageTransform
from bcoskit.models.cifar import DEPTHS, bcos_cifar_resnet, cifar_resnet

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_LARGEST_SIDE = 10_000
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Loss: TypeAlias = Literal["bce", "cross_entropy"]


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class ModelRow:
    """What is known of a named network.

    Attributes:
        name: `arch.tag`, the architecture as timm spells it and the recipe of the weights.
        build: Makes the network with fresh weights from the number of classes.
        transform: From a picture to the network's input, as at test time.
        classes: Names of the classes.
        loss: What the network is trained with: binary or softmax cross-entropy.
        weights: File in the package with trained weights, if it has them.
        accuracy: Measured top-1 accuracy of those weights, in percent, and on what.
    """

    name: str
    build: Callable[[int], nn.Module]
    transform: ImageTransform
    classes: tuple[str, ...]
    loss: Loss
    weights: str | None = None
    accuracy: str | None = None


# Weights in the package, and their top-1 accuracy.
_TRAINED = {"resnet20.bcos_cifar10": ("resnet20.bcos_cifar10.safetensors", "85.9 % on CIFAR-10 (JPEG q75)")}


def _cifar10_row(name: str, build: Callable[[int], nn.Module], transform: ImageTransform, loss: Loss) -> ModelRow:
    weights, accuracy = _TRAINED.get(name, (None, None))
    return ModelRow(name, build, transform, CIFAR10_CLASSES, loss, weights, accuracy)


def _cifar10_rows(depth: int) -> tuple[ModelRow, ModelRow]:
    plain = ImageTransform(32)
    normalized = ImageTransform(32, encoding="normalized", mean=_CIFAR10_MEAN, std=_CIFAR10_STD)
    bcos, standard = partial(bcos_cifar_resnet, depth, max_out=2), partial(cifar_resnet, depth)
    return (
        _cifar10_row(f"resnet{depth}.bcos_cifar10", bcos, plain, "bce"),
        _cifar10_row(f"resnet{depth}.standard_cifar10", standard, normalized, "cross_entropy"),
    )


_ROWS = {row.name: row for depth in DEPTHS for row in _cifar10_rows(depth)}


def list_models(pattern: str = "*", *, weights: bool = False) -> list[str]:
    """The names of all networks, in alphabetical order.

    Args:
        pattern: Shell pattern that names must match, as in `"*resnet*"`.
        weights: Whether only networks are listed whose trained weights are at hand.

    Returns:
        The names.
    """
    names = sorted(fnmatch.filter(_ROWS, pattern))
    return [name for name in names if _ROWS[name].weights is not None] if weights else names


def model_row(name: str) -> ModelRow:
    """What is known of a named network.

    Args:
        name: One of `list_models()`.

    Returns:
        The row of the table.

    Raises:
        ValueError: If there is no network of that name; the message names the nearest ones.
    """
    if name not in _ROWS:
        near = difflib.get_close_matches(name, _ROWS, n=3, cutoff=0.3)
        hint = f"near: {', '.join(near)}" if near else "`list_models()` lists all"
        raise ValueError(f"{name!r} is neither the name of a model nor a .safetensors file of weights; {hint}")
    return _ROWS[name]


def create_model(
    name: str | os.PathLike[str],
    weights: bool | str | os.PathLike[str] = False,
    *,
    num_classes: int | None = None,
) -> nn.Module:
    """Make a network by its name, or from a file that training has written.

    The network is in evaluation mode and has three attributes more: `transform`, from a picture to its input,
    `classes`, the names of its classes, and `loss`, which tells how its logits become probabilities: by a sigmoid
    (`"bce"`) or a softmax (`"cross_entropy"`).

    Args:
        name: One of `list_models()`, or a `.safetensors` file that `bcoskit train` or `save_model` has written:
            it says itself which network it holds, and its weights are loaded.
        weights: Whether to load the trained weights of that name, or a `.safetensors` file to load. If the file was
            written by `save_model`, classes and transform are those of the file.
        num_classes: Number of classes, if it is not that of the row; classes then have numbers for names.

    Returns:
        The network.

    Raises:
        ValueError: If there is no such name, it has no trained weights, or an argument contradicts the weights.
        WeightsError: If the file is missing or corrupt, or does not hold finite weights of this network.
    """
    if isinstance(name, os.PathLike) or (name not in _ROWS and Path(name).suffix == ".safetensors"):
        if not isinstance(weights, bool):
            raise ValueError(f"`weights` (={str(weights)!r}) must not be given: {name} is a file of weights itself")
        return _from_file(Path(name), None, num_classes)
    row = model_row(name)
    if weights is False:
        return _make(_with_classes(row, num_classes))
    if weights is True:
        if row.weights is None:
            having = ", ".join(list_models(weights=True)) or "none"
            raise ValueError(f"{name!r} has no trained weights here; networks that have some: {having}")
        with resources.as_file(resources.files("bcoskit.assets") / row.weights) as path:
            return _from_file(path, row, num_classes)
    return _from_file(Path(weights), row, num_classes)


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    *,
    classes: Sequence[str],
    transform: ImageTransform,
    training: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write weights with all that is needed to use them, as one `.safetensors` file that `create_model` opens.

    The file appears complete or not at all.

    Args:
        model: A network that was made by `create_model(name)`, in its original or another state.
        path: The file, which ends in `.safetensors`.
        name: The name of the network.
        classes: Names of its classes.
        transform: Its test-time transform.
        training: Plain values on how the weights came about.
        half: Store filters and matrices in half precision, in half of the bytes; they are rounded to 11 bits, and
            networks compute with them in single precision as ever.

    Raises:
        TypeError: If `classes` is a single string.
        ValueError: If there is no network of that name, `model` is another one or has another number of classes, a
            weight is not finite, classes or transform are of no use to it, or `path` has another suffix.
    """
    row, path = model_row(name), Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` (={str(path)!r}) must end in .safetensors")
    if isinstance(classes, str):
        raise TypeError(f"`classes` (={classes!r:.200}) must be a list of names")
    description = {
        "model": name,
        "classes": list(classes),
        "transform": asdict(transform),
        "training": dict(training or {}),
    }
    tensors = model.state_dict()
    _described(path, tensors, description)  # as it will be read
    with torch.random.fork_rng(devices=()):
        expected = row.build(len(classes)).state_dict()
    if half:
        tensors = {key: tensor.half() if tensor.ndim > 1 else tensor for key, tensor in tensors.items()}
    fault = _fault(tensors, expected)
    if fault is not None:
        raise ValueError(f"`model` is not {name} with {len(classes)} classes of finite weights: it {fault}")
    write_tensors(path, tensors, description)


def _make(row: ModelRow) -> nn.Module:
    model = row.build(len(row.classes)).eval()
    setattr(model, "transform", row.transform)  # noqa: B010 - attributes that the class does not declare
    setattr(model, "classes", row.classes)  # noqa: B010
    setattr(model, "loss", row.loss)  # noqa: B010
    return model


def _with_classes(row: ModelRow, num_classes: int | None) -> ModelRow:
    if num_classes is None or num_classes == len(row.classes):
        return row
    if num_classes < 1:
        raise ValueError(f"`num_classes` (={num_classes}) must be at least 1")
    return replace(row, classes=tuple(str(index) for index in range(num_classes)))


def _from_file(path: Path, row: ModelRow | None, num_classes: int | None) -> nn.Module:
    """The network whose weights a file holds: the one that the file describes, which must be `row` if that is given.

    Only a file of bare weights, without description, leaves all to `row`.
    """
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: is no .safetensors file")
    try:
        tensors, description = read_tensors(path)
    except ValueError as error:
        raise WeightsError(str(error)) from error
    if row is None or "model" in description:
        described = _described(path, tensors, description)
        if row is not None and row.name != described.name:
            raise WeightsError(f"{path}: holds weights of {described.name}, not of {row.name}")
        if num_classes is not None and num_classes != len(described.classes):
            raise ValueError(
                f"`num_classes` (={num_classes}) contradicts the {len(described.classes)} classes of the weights"
            )
        row = described
    model = _make(_with_classes(row, num_classes))
    fault = _fault(tensors, model.state_dict())
    if fault is not None:
        raise WeightsError(f"{path}: does not fit {row.name} with {len(row.classes)} classes, it {fault}")
    model.load_state_dict(tensors)
    return model


def _described(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> ModelRow:
    """The row that a file's description stands for; every value of it is checked, since anyone may have written it."""
    name, classes = description.get("model"), description.get("classes")
    if name is None:
        raise WeightsError(
            f"{path}: does not say which network it holds; give the name of the network, and the file as `weights`"
        )
    if not isinstance(name, str) or name not in _ROWS:
        raise WeightsError(f"{path}: holds weights of an unknown network, {reprlib.repr(name)}")
    if not isinstance(classes, list) or not classes or not all(isinstance(each, str) for each in classes):
        raise WeightsError(f"{path}: its `classes` (={reprlib.repr(classes)}) must be a list of names")
    if len(classes) > max((len(tensor) for tensor in tensors.values() if tensor.ndim and tensor.numel()), default=0):
        # Seen before a network is built, which might be far larger than the file.
        raise WeightsError(f"{path}: names {len(classes)} classes, but no weight has as many rows")
    row = _ROWS[name]
    try:
        transform = _transform(description.get("transform"), row.transform)
    except (TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"{path}: its `transform` is of no use ({error})") from error
    return replace(row, classes=tuple(classes), transform=transform)


def _transform(values: Any, usual: ImageTransform) -> ImageTransform:
    """The transform with values from a file, which must yield what `usual` yields, perhaps of another size."""
    transform = ImageTransform(**values)
    sizes = (transform.size, transform.channels, transform.size if transform.resize is None else transform.resize)
    if not all(type(size) is int and size <= _LARGEST_SIDE for size in sizes):
        raise ValueError(f"size, channels and resize must be integers up to {_LARGEST_SIDE}: {reprlib.repr(sizes)}")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (*transform.mean, *transform.std)):
        raise ValueError("mean and std must be finite numbers")
    if (transform.encoding, transform.channels) != (usual.encoding, usual.channels):
        raise ValueError(f"the network needs encoding {usual.encoding!r} and {usual.channels} channels")
    return transform


def _fault(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Why the tensors are not those of a network, in words that follow "it"; None if they are."""
    for kind, keys in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if keys:
            listed = ", ".join(f"{key!r:.80}" for key in sorted(keys)[:3])
            listed += f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            return f"{kind} weights: {listed}"
    for key, tensor in tensors.items():
        needed = expected[key]
        if tensor.shape != needed.shape:
            return f"has `{key}` of shape {tuple(tensor.shape)} instead of {tuple(needed.shape)}"
        if tensor.is_floating_point() != needed.is_floating_point() or tensor.is_complex():
            return f"has `{key}` of dtype {tensor.dtype} instead of {needed.dtype}"
        # As the network would hold it: a large number may be finite in double precision only.
        if not bool(torch.isfinite(tensor.to(needed.dtype)).all()):
            return f"has values in `{key}` that are not finite"
    return None
