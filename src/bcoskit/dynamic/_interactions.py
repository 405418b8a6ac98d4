"""Do the samples of a batch depend on each other, or their outputs on chance? And if so, by which operation?"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bcoskit.dynamic._graph import Violation
from bcoskit.dynamic._mode import name_of, tensors_in
from bcoskit.dynamic._places import Places

_BOUND = 1e-9  # relative; what rounding makes of another batch size is far below
_SAMPLES = 4
_PLACE = 1  # of the sample among the others: what comes before it counts as much as what comes after

Run = Callable[[Tensor], Tensor]


def interaction(model: nn.Module, x: Tensor, run: Run) -> Violation | None:
    """What makes the output of a sample another one when there are other samples beside it, or at every call.

    The output decides: what happens inside is no fault if nothing of it arrives there, and of a network that takes one
    sample alone nothing is said.

    Args:
        model: The network, in double precision, for the paths of its modules.
        x: Inputs (N, *shape), of which the first is run alone, and among noise of the same range.
        run: From inputs to the output.

    Returns:
        The first operation that does it, None if there is none.
    """
    alone = x[:1]
    others = _noise_like(x, _SAMPLES - 1)
    among = torch.cat([others[:_PLACE], alone, others[_PLACE:]])
    with torch.no_grad():
        one, all_of_them = _tried(run, alone), _tried(run, among)
    if all_of_them is None or all_of_them.shape[:1] != (_SAMPLES,) or (one is not None and _is_same(one, all_of_them)):
        return None
    first, second, together = (_trace(model, run, inputs) for inputs in (alone, alone, among))
    changing = _first_difference(first, second)
    if changing is not None:
        return Violation(
            "random", *changing, reason="draws random numbers or keeps a state: the network is another one in each call"
        )
    found = _first_difference(first, together) or (f"{type(model).__name__}.forward", *_place(model))
    return Violation("batch", *found, reason="makes each output depend on the other samples of the batch")


def _place(model: nn.Module) -> tuple[str, str]:
    return Places(model).of(model) or ("?", "")


def _noise_like(x: Tensor, count: int) -> Tensor:
    """Samples of their own, within the range of the given ones; of indices, within that from 0."""
    generator = torch.Generator().manual_seed(0)
    shape = (count, *x.shape[1:])
    low, high = float(x.min()), float(x.max())
    if x.is_floating_point():
        noise = low + (high - low or 1.0) * torch.rand(shape, generator=generator, dtype=x.dtype)
    else:
        noise = torch.randint(min(0, int(low)), int(high) + 1, shape, generator=generator)
    return noise.to(x)


def _tried(run: Run, x: Tensor) -> Tensor | None:
    try:
        return run(x)
    except Exception:  # a norm refuses one sample alone, or code another number than its own
        return None


@dataclass(frozen=True)
class _Step:
    """An operation whose outputs may depend on the input, where it stands, and what it gave."""

    operation: str
    location: str
    module: str
    outputs: tuple[Tensor, ...]


class _Tracing(TorchFunctionMode):
    """Collects the operations of a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._places = Places(model)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        here: tuple[str, str] = self._places.here()
        try:
            output = func(*args, **(kwargs or {}))
        except Exception:
            self.steps.append(_Step(name_of(func), *here, ()))
            raise
        given = args[0] if output is None and args else output  # an assignment returns nothing
        outputs = tuple(tensor.detach().clone() for tensor in tensors_in(given) if tensor.requires_grad)
        if outputs:
            self.steps.append(_Step(name_of(func), *here, outputs))
        return output


def _trace(model: nn.Module, run: Run, x: Tensor) -> list[_Step]:
    """The operations of a forward pass; if it raises, the last one is that which did."""
    inputs = x.clone().requires_grad_() if x.is_floating_point() else x
    with torch.enable_grad(), _Tracing(model) as tracing:
        _tried(run, inputs)
    return tracing.steps


def _first_difference(one: list[_Step], other: list[_Step]) -> tuple[str, str, str] | None:
    """The first operation that gives a sample something else in another run; None where the runs part before."""
    for step, counterpart in zip_longest(one, other):
        if step is None or counterpart is None or step.operation != counterpart.operation:
            return None
        parts = zip_longest(step.outputs, counterpart.outputs)
        if any(part is None or all_of_them is None or not _is_same(part, all_of_them) for part, all_of_them in parts):
            return counterpart.operation, counterpart.location, counterpart.module
    return None


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor of one sample is found in that of several, wherever its place in it may be.

    The samples may be folded into any axis, before or behind what is there; what has no such axis is compared as it
    is, and of what has two, such as similarities of samples, nothing is known.
    """
    if one.ndim != other.ndim:
        return True
    axes = [axis for axis in range(one.ndim) if one.shape[axis] != other.shape[axis]]
    if len(axes) > 1 or any(other.shape[axis] != _SAMPLES * one.shape[axis] for axis in axes):
        return True
    return any(_is_close(one, candidate) for candidate in _candidates(other, axes))


def _candidates(other: Tensor, axes: list[int]) -> Iterator[Tensor]:
    if not axes:
        yield other
        return
    size = other.shape[axes[0]] // _SAMPLES
    yield other.narrow(axes[0], _PLACE * size, size)
    yield other.index_select(axes[0], torch.arange(_PLACE, size * _SAMPLES, _SAMPLES, device=other.device))


def _is_close(one: Tensor, other: Tensor) -> bool:
    finite = one[one.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.isclose(other, one, rtol=0, atol=_BOUND * scale, equal_nan=True).all())
