"""From what a caller asks to be explained to the values of an output."""

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Classes: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]] | Tensor | npt.NDArray[np.integer[Any]]
Target: TypeAlias = (
    Classes | tuple[int | slice, ...] | list[tuple[int | slice, ...]] | Callable[[Tensor], Tensor] | None
)
"""What of an output is explained; see `bcoskit.explain`."""
Versus: TypeAlias = Classes | None
"""Which class a class is compared with; see `bcoskit.explain`."""


def select(output: Tensor, target: Target, versus: Versus) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The values that are explained, and the classes they belong to.

    Args:
        output: (N, C), (N,) or with more axes.
        target: As of `explain`.
        versus: As of `explain`.

    Returns:
        The values (N,) or (N, K); the classes of `target` and of `versus` in the same shape, None where the target
        is no class.

    Raises:
        TypeError: If a target is of another kind.
        ValueError: If it is out of range or does not fit the output.
    """
    if callable(target):
        chosen: Any = target(output.detach().clone())  # which it may write to
        if chosen is None:  # not the class with the largest value, for which nobody writes a function
            raise TypeError("`target` is a function that returned None, must return class indices or a position")
        target = chosen
    positions = isinstance(target, tuple) or (isinstance(target, list) and any(isinstance(t, tuple) for t in target))
    if not positions and output.ndim == 2:
        classes = _classes(output, target, "target") if target is not None else output.detach().argmax(1)
        values = picked(output, classes)
        if versus is None:
            return values, classes, None
        others = _broadcast(_classes(output, versus, "versus"), classes)
        return values - picked(output, others), classes, others
    if versus is not None:
        raise ValueError(
            f"`versus` (={versus!r}) compares classes, but a target of {tuple(output.shape)} is a position"
        )
    if output.ndim == 1:
        if target is not None:
            raise ValueError(f"`target` (={target!r}) must be None for an output of one value per sample")
        return output, None, None
    if not positions:
        raise ValueError(
            f"`target` (={target!r}) does not fit the output of shape {tuple(output.shape)}: give a position after the "
            f"batch axis as a tuple of {output.ndim - 1} indices or slices, such as {(0,) * (output.ndim - 1)}"
        )
    if isinstance(target, tuple):
        return _at(output, target), None, None
    assert isinstance(target, list)
    return torch.stack([_at(output, position) for position in target], 1), None, None


def class_index(classes: Sequence[str], given: str | int, name: str) -> int:
    """The index of a class that the argument `name` gives by its name or its index.

    Raises:
        ValueError: If there is no such class, or there are several of that name.
    """
    shown = given[:60] if isinstance(given, str) else given
    places = [place for place, known in enumerate(classes) if known == given]
    if len(places) > 1:
        listed = ", ".join(map(str, places))
        raise ValueError(f"`{name}` (={shown!r}) names several classes: give one of {listed}")
    if places:
        return places[0]
    text = str(given)
    if text.isascii() and text.isdecimal() and int(text) < len(classes):
        return int(text)
    listed = ", ".join(classes[:20]) + (" …" if len(classes) > 20 else "")
    raise ValueError(f"`{name}` (={shown!r}) is neither a class nor an index below {len(classes)}: {listed}")


def _classes(output: Tensor, indices: Any, name: str) -> Tensor:
    """Class indices (N,) or (N, K), checked."""
    samples, count = output.shape
    if isinstance(indices, (bool, str)) or not isinstance(indices, (Integral, Sequence, Tensor, np.ndarray)):
        raise TypeError(f"`{name}` (={indices!r}) must be a class index, or a list or tensor of class indices")
    try:
        chosen = torch.as_tensor(indices, device=output.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`{name}` (={indices!r}) must be a list of class indices, all rows of one length") from error
    if chosen.numel() and (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool):
        raise TypeError(f"`{name}` has dtype {chosen.dtype}, class indices must be integers")
    if chosen.ndim > 2 or chosen.numel() == 0 or (chosen.ndim and chosen.shape[0] not in (1, samples)):
        raise ValueError(
            f"`{name}` of shape {tuple(chosen.shape)} must be one class, one per sample ({samples},), or several per "
            f"sample ({samples}, K)"
        )
    chosen = chosen.long()  # in a narrow type the number of classes would overflow
    outside = chosen[(chosen < 0) | (chosen >= count)]
    if outside.numel():
        raise ValueError(f"`{name}` (={int(outside[0])}) is out of range, the output has the classes 0 to {count - 1}")
    return chosen.expand(samples, *chosen.shape[1:])


def _broadcast(others: Tensor, classes: Tensor) -> Tensor:
    if others.ndim < classes.ndim:
        others = others.unsqueeze(1)
    if others.ndim > classes.ndim or others.shape[-1] not in (1, classes.shape[-1]):
        raise ValueError(
            f"`versus` of shape {tuple(others.shape)} does not fit `target` of shape {tuple(classes.shape)}"
        )
    return others.expand_as(classes)


def picked(output: Tensor, classes: Tensor) -> Tensor:
    """The entries of an output (N, C) at classes (N,) or (N, K), in their shape."""
    if classes.ndim == 2:
        return output.gather(1, classes)
    return output.gather(1, classes.unsqueeze(1)).squeeze(1)


def _at(output: Tensor, position: Any) -> Tensor:
    """The output at one position of every sample, summed over slices."""
    if not isinstance(position, tuple) or len(position) != output.ndim - 1:
        raise ValueError(
            f"`target` (={position!r}) must be a tuple of {output.ndim - 1} indices or slices, for the axes after the "
            f"first of an output of shape {tuple(output.shape)}; for one class per sample give a list or a tensor"
        )
    for index, size in zip(position, output.shape[1:], strict=True):
        if isinstance(index, bool) or not isinstance(index, (Integral, slice)):
            raise TypeError(f"`target` (={position!r}) must consist of integers and slices")
        if isinstance(index, Integral) and not 0 <= int(index) < size:
            raise ValueError(f"`target` (={position!r}) is out of range for an output of shape {tuple(output.shape)}")
    values = output[(slice(None), *(index if isinstance(index, slice) else int(index) for index in position))]
    if values.numel() == 0:
        raise ValueError(f"`target` (={position!r}) selects nothing of an output of shape {tuple(output.shape)}")
    return values if values.ndim == 1 else values.flatten(1).sum(1)
