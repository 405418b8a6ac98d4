"""Networks by name: one table of rows, and what makes a network out of a row or a file."""

import difflib
import fnmatch
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bcoskit._files import read_tensors, write_tensors
from bcoskit.data import ImageTransform
from bcoskit.models.cifar import DEPTHS, bcos_cifar_resnet, cifar_resnet

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


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
    loss: Literal["bce", "cross_entropy"]
    weights: str | None = None
    accuracy: str | None = None


def _cifar_rows(depth: int) -> tuple[ModelRow, ModelRow]:
    plain = ImageTransform(32)
    normalized = ImageTransform(32, encoding="normalized", mean=_CIFAR10_MEAN, std=_CIFAR10_STD)
    bcos, standard = partial(bcos_cifar_resnet, depth), partial(cifar_resnet, depth)
    return (
        ModelRow(f"resnet{depth}.bcos_cifar10", bcos, plain, CIFAR10_CLASSES, "bce"),
        ModelRow(f"resnet{depth}.standard_cifar10", standard, normalized, CIFAR10_CLASSES, "cross_entropy"),
    )


# Weights in the package, and their top-1 accuracy.
_TRAINED = {"resnet20.bcos_cifar10": ("resnet20.bcos_cifar10.safetensors", None)}
_ROWS = {row.name: row for depth in DEPTHS for row in _cifar_rows(depth)}
for _name, (_file, _accuracy) in _TRAINED.items():
    _ROWS[_name] = replace(_ROWS[_name], weights=_file, accuracy=_accuracy)


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
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"`name` (={name!r}) is neither a model nor a file of weights{hint}")
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
            it says itself which network it holds.
        weights: Whether to load the trained weights of that name, or a `.safetensors` file to load.
        num_classes: Number of classes, if it is not that of the row; classes then have numbers for names.

    Returns:
        The network.

    Raises:
        ValueError: If there is no such name, it has no trained weights, or `num_classes` contradicts them.
        WeightsError: If the file is missing or corrupt, or does not hold finite weights of this network.
    """
    if isinstance(name, os.PathLike) or name not in _ROWS and Path(name).suffix == ".safetensors":
        tensors, description = _read(Path(name))
        return _from_description(Path(name), tensors, description)
    row = model_row(name)
    if num_classes is not None and num_classes != len(row.classes):
        if num_classes < 1:
            raise ValueError(f"`num_classes` (={num_classes}) must be at least 1")
        if weights is True:
            raise ValueError(
                f"`num_classes` (={num_classes}) contradicts the {len(row.classes)} classes of the trained weights"
            )
        row = replace(row, classes=tuple(str(index) for index in range(num_classes)))
    if weights is False:
        return _make(row)
    if weights is True:
        if row.weights is None:
            having = ", ".join(list_models(weights=True))
            raise ValueError(f"`name` (={name!r}) has no trained weights here; there are some of: {having}")
        with resources.as_file(resources.files("bcoskit.assets") / row.weights) as path:
            return _loaded(_make(row), path, _read(path)[0])
    return _loaded(_make(row), Path(weights), _read(Path(weights))[0])


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str,
    *,
    classes: tuple[str, ...],
    transform: ImageTransform,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write weights with all that is needed to use them, as one `.safetensors` file that `create_model` opens.

    The file appears complete or not at all.

    Args:
        model: A network that was made by `create_model(name)`.
        path: Where to write.
        name: The name of the network.
        classes: Names of its classes.
        transform: Its test-time transform.
        training: Plain values on how the weights came about.

    Raises:
        ValueError: If there is no network of that name.
    """
    description = {
        "model": model_row(name).name,
        "classes": list(classes),
        "transform": asdict(transform),
        "training": dict(training or {}),
    }
    write_tensors(Path(path), model.state_dict(), description)


def _make(row: ModelRow) -> nn.Module:
    model = row.build(len(row.classes)).eval()
    setattr(model, "transform", row.transform)  # noqa: B010 - attributes that the class does not declare
    setattr(model, "classes", row.classes)  # noqa: B010
    setattr(model, "loss", row.loss)  # noqa: B010
    return model


def _from_description(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> nn.Module:
    try:
        row = replace(
            _ROWS[description["model"]],
            classes=tuple(str(name) for name in description["classes"]),
            transform=ImageTransform(**description["transform"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: does not say which network it holds ({error!r}); give the name as model and the file as weights"
        ) from error
    return _loaded(_make(row), path, tensors)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and its description (empty if it has none)."""
    try:
        return read_tensors(path)
    except ValueError as error:
        raise WeightsError(str(error)) from error


def _loaded(model: nn.Module, path: Path, tensors: dict[str, Tensor]) -> nn.Module:
    expected = model.state_dict()
    for kind, keys in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if keys:
            listed = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise WeightsError(f"{path}: does not fit the network, it {kind} weights: {listed}")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise WeightsError(
                f"{path}: `{key}` has shape {tuple(tensor.shape)}, the network needs {tuple(expected[key].shape)}"
            )
        if tensor.dtype.is_floating_point != expected[key].dtype.is_floating_point:
            raise WeightsError(f"{path}: `{key}` has dtype {tensor.dtype}, the network needs {expected[key].dtype}")
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{path}: `{key}` holds values that are not finite")
    model.load_state_dict(tensors)
    return model
