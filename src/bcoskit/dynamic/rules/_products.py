"""Products: with one live factor they are natural, with several the mode's policy decides."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bcoskit.dynamic._mode import (
    ExplanationMode,
    Handler,
    NotLinearError,
    name_of,
    requires_gradient,
)
from bcoskit.dynamic.rules._table import enter, functions, in_place, rewrite

_BILINEAR = """
    mul multiply __mul__ __rmul__ matmul __matmul__ __rmatmul__ mm bmm mv dot vdot vecdot inner outer ger kron
    cross linalg_cross tensordot linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
""".split()


def _register() -> None:
    def multiplying(first: int) -> Handler:
        def handle(
            mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            # Keyword arguments follow the positional ones in the order of the signature; a bias is no factor.
            named = [name for name in kwargs if name != "bias" and not (first and name == "input")]
            factors = [*range(first, min(first + 2, len(args))), *named]
            return _product(mode, func, factors, args, kwargs)

        return handle

    for name in _BILINEAR:
        enter(functions(name), multiplying(0))
    for name in ("addmm", "addmv", "addr", "baddbmm", "addbmm", "addcmul"):
        enter(functions(name), multiplying(1))
        enter(functions(f"{name}_"), rewrite(in_place(getattr(torch, name))))
    for name in ("mul_", "multiply_", "__imul__"):
        enter(functions(name), rewrite(in_place(torch.mul)))
    enter([torch.einsum], _einsum)


def _product(
    mode: ExplanationMode,
    func: Callable[..., Any],
    factors: Sequence[int | str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A multilinear operation: with several live factors, the mean of its versions with one live factor each."""
    values: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    live = [slot for slot in factors if requires_gradient(values[slot])]
    if len(live) > 1:
        live = [slot for slot in live if mode.depends_on_input(values[slot])]
    if len(live) < 2:
        return mode.natural(func, args, kwargs)
    if mode.products == "error":
        raise NotLinearError(
            f"`{name_of(func)}` multiplies two tensors that depend on the input; choose how to explain it by "
            '`products="split"` (each factor has half of the contribution) or "first" (the first has it all)'
        )
    kept_slots = live if mode.products == "split" else live[:1]
    terms: list[Tensor] = []
    for kept in kept_slots:
        chosen = {
            slot: mode.freeze(value) if slot in live and slot != kept else value for slot, value in values.items()
        }
        arguments = tuple(chosen[index] for index in range(len(args)))
        terms.append(mode.natural(func, arguments, {name: chosen[name] for name in kwargs}))
    return terms[0] if len(terms) == 1 else torch.stack(terms).mean(0)


def _einsum(mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = args[1] if len(args) == 2 and type(args[1]) in (list, tuple) else args[1:]
    factors = [index for index, value in enumerate(operands, 1) if isinstance(value, Tensor)]
    return _product(mode, func, factors, (args[0], *operands), kwargs)


_register()
