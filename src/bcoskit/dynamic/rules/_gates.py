"""Gates: `f(x) = x · g(x)`, and powers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit.dynamic._formulas import GATES, gate, quotient
from bcoskit.dynamic._mode import freeze
from bcoskit.dynamic.rules._table import enter, frozen, functions, in_place, rewrite, rule


def _register_gates() -> None:
    def gated(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: gate(x, name)

    # ReLU is natural, and the two forms of GELU are one operation.
    for name in GATES.keys() - {"relu", "gelu", "gelu_tanh"}:
        rule(name)(gated(name))

    def parametric(function: Callable[..., Tensor], slope: float) -> Callable[..., Tensor]:
        return lambda x, *args, **kwargs: x * quotient(lambda value: function(value, *args, **kwargs), freeze(x), slope)

    for name, slope in {"elu": 1.0, "celu": 1.0, "selu": 1.0507009873554805, "softshrink": 0.0}.items():
        rule(name)(parametric(getattr(F, name), slope))


_register_gates()


@rule("gelu")
def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return gate(x, "gelu_tanh" if approximate == "tanh" else "gelu")


@rule("glu")
def _glu(x: Tensor, dim: int = -1) -> Tensor:
    values, gates = x.chunk(2, dim)
    return values * torch.sigmoid(freeze(gates))


@rule("float_power")
def _float_power(x: Any, exponent: Any) -> Tensor:
    """A power in double precision."""
    return torch.pow(x.double() if isinstance(x, Tensor) else x, exponent)


@rule("pow", "__pow__")
def _pow(x: Any, exponent: Any) -> Tensor:
    """A power of at least 1 is a gate; roots and inverse powers belong to statistics and are constants."""
    exponent = frozen(exponent)
    if not isinstance(x, Tensor):
        return torch.pow(x, exponent)
    values = freeze(x)
    if isinstance(exponent, Tensor):
        gated = x * torch.pow(values, (exponent - 1).clamp_min(0))
        return torch.where(exponent >= 1, gated, torch.pow(values, exponent))
    if exponent == 1:
        return x * 1
    return x * torch.pow(values, exponent - 1) if exponent > 1 else torch.pow(values, exponent)


enter(functions("__ipow__"), rewrite(in_place(_pow)))
