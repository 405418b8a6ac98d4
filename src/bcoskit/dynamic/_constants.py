"""The constants of a network: what each operation outputs when the input of the linear map is 0.

`output = W(x)·x + Σ shares`, where an operation with value `y` and constant `c = op(0)` has the share
`⟨∂output/∂y, c⟩`. The constants are evaluated, not derived from W, so that the sum is a test of W.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from bcoskit.dynamic._mode import ExplanationMode, ProductPolicy, name_of, tensors_in, writes
from bcoskit.dynamic._places import Places

# Piecewise linear operations with constant pieces: where the output is not the input, it is a constant.
_SATURATING = frozenset(
    """
    clamp clamp_ clamp_min clamp_min_ clamp_max clamp_max_ clip clip_ hardtanh hardtanh_ relu6 threshold threshold_
    _threshold
    maximum minimum fmax fmin nan_to_num nan_to_num_
    """.split()
)

# A constant that is computed from many is named by as many.
_MOST_NAMES = 4


class ConstantsMode(ExplanationMode):
    """An `explanation_mode` that collects the share of every constant of one sample's output.

    Args:
        model: The network, for the names of parameters, buffers and modules.
        products: As of `explanation_mode`.

    Attributes:
        shares: What backward passes have collected since it was last cleared, by name.
    """

    def __init__(self, model: Callable[..., Any], products: ProductPolicy = "split") -> None:
        super().__init__(products=products)
        self.shares: dict[str, Tensor] = {}
        self._places = Places(model)
        # Constants computed from named ones keep their names, as long as there are such constants.
        self._names = WeakIdKeyDictionary()
        if isinstance(model, nn.Module):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                self._names[tensor] = frozenset([name])

    def _without_parameter(self, value: Any) -> Any:
        frozen = super()._without_parameter(value)
        if frozen is not value and isinstance(value, Tensor) and value in self._names:
            self._names[frozen] = self._names[value]
        return frozen

    def natural(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the operation, and listen for the gradient of its output if it has a constant."""
        if not any(self.depends_on_input(tensor) for tensor in tensors_in((args, kwargs))):
            output = super().natural(func, args, kwargs)
            names = frozenset[str]().union(*(self._names.get(tensor) or () for tensor in tensors_in((args, kwargs))))
            for tensor in tensors_in(output) if names else ():
                self._names[tensor] = names
            return output
        saturates = _saturates(func, args, kwargs)
        constants = iter([self._of_saturation(func, args, kwargs)] if saturates else self._at_zero(func, args, kwargs))
        base = args[0]._base if args and isinstance(args[0], Tensor) and writes(func, kwargs) else None
        was_constant = base is not None and not self.depends_on_input(base)
        output = super().natural(func, args, kwargs)

        def listen(tensor: Tensor) -> Tensor:
            return self._listen(func, args, kwargs, tensor, next(constants), was_constant)

        if output is None:  # as of `x[...] = y`, whose result is its first argument
            listen(args[0])
            return None
        return _map(output, listen)

    def _of_saturation(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The constant of an operation that passes its input on, or a bound: `y - Σ ∂y/∂x · x`, entry by entry."""
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors_in((args, kwargs))))
        leaves: list[Tensor] = []

        def leaf(tensor: Tensor) -> Tensor:
            if not self.depends_on_input(tensor):
                return tensor.detach().clone()
            leaves.append(tensor.detach().expand(shape).clone().requires_grad_())
            return leaves[-1].clone()  # the operation may be one in place

        arguments, keywords = _map((args, kwargs), leaf)
        with torch.enable_grad():
            output: Tensor = func(*arguments, **keywords)
            slopes = torch.autograd.grad(output.sum(), leaves)
        passed = torch.stack([slope * value.detach() for slope, value in zip(slopes, leaves, strict=True)])
        return output.detach() - passed.sum(0)

    def _at_zero(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        without: Tensor | None = None,
    ) -> list[Tensor]:
        """The operation's outputs with 0 in the place of every live argument (and of one named constant)."""

        def zeroed(tensor: Tensor) -> Tensor:
            # A copy, since the operation may be one in place.
            zero = tensor is without or self.depends_on_input(tensor)
            return torch.zeros_like(tensor) if zero else tensor.detach().clone()

        arguments, keywords = _map((args, kwargs), zeroed)
        with torch.no_grad():
            output = func(*arguments, **keywords)
        return list(tensors_in(arguments[0] if output is None else output))

    def _listen(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensor: Tensor,
        constant: Tensor,
        was_constant: bool,
    ) -> Tensor:
        """Collect the constant's share when a gradient arrives; the tensor with which the network goes on."""
        # An infinite constant (padding of a maximum) is never chosen: its gradient is 0.
        constant = torch.where(torch.isfinite(constant), constant, 0) if constant.is_floating_point() else constant
        if not tensor.requires_grad or not (was_constant or bool(constant.any())):
            return tensor
        name = self._responsible(func, args, kwargs, constant)
        listened = tensor
        if tensor._is_view() and writes(func, kwargs):
            # The gradient of a view that was written to arrives at its base.
            base = tensor._base
            assert base is not None
            # What was a constant around the view stays one, in a tensor that depends on the input from now on.
            whole = base.detach().clone() if was_constant else torch.zeros_like(base)
            whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(constant)
            listened, constant = base, whole
        elif tensor._is_view():
            # A new value that is a view of a hidden one: if written to, it would lose its hook.
            listened = tensor = tensor.clone()

        def collect(gradient: Tensor) -> None:
            share = (gradient * constant).sum()
            self.shares[name] = self.shares[name] + share if name in self.shares else share

        listened.register_hook(collect)
        return tensor

    def _responsible(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], constant: Tensor
    ) -> str:
        """The names of the constants without which the operation would output something else at 0."""
        named = [tensor for tensor in tensors_in((args, kwargs)) if tensor in self._names]
        groups = {self._names[tensor] for tensor in named}
        if len(groups) > 1:
            groups = {
                self._names[tensor]
                for tensor in named
                if not torch.equal(self._at_zero(func, args, kwargs, without=tensor)[0], constant)
            }
        names = sorted(frozenset[str]().union(*groups))
        if names:
            return " · ".join(names[:_MOST_NAMES]) + (
                f" · {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else ""
            )
        number = self._places.name_of_number([value for value in (*args, *kwargs.values()) if isinstance(value, float)])
        if number:
            return number
        location, module = self._places.here()
        operation = name_of(func).rsplit(".", 1)[-1].strip("_")
        return f"{module}: {operation}" if module else f"{operation} ({location})"


def _saturates(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    # The maximum of two tensors, unlike that along an axis, may be one that is constant.
    binary = (len(args) > 1 and isinstance(args[1], Tensor)) or "other" in kwargs
    return name in _SATURATING or (name in ("max", "min") and binary)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([_map(item, change) for item in value])
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    return value
