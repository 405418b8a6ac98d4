"""Gated activations `f(x) = x · g(x)`: linear in `x` once the gate is a constant."""

from torch import Tensor, nn

from bcoskit.dynamic import freeze
from bcoskit.functional import GATES, gate


class Gate(nn.Module):
    """A gated activation `x · g(x)` by name; in `explanation_mode` the gate `g(x)` is a constant.

    The torch modules of these activations are explained the same way; this one says in the network what is a gate.

    Args:
        name: A key of `bcoskit.functional.GATES`: gelu, gelu_tanh, relu, silu, hardswish, mish, tanh …

    Raises:
        ValueError: If there is no gate of that name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in GATES:
            raise ValueError(f"`name` (={name!r}) must be one of {', '.join(GATES)}")
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape."""
        return gate(x, self.name)

    def extra_repr(self) -> str:
        """The name of the activation."""
        return self.name


class GELU(Gate):
    """`x · Φ(x)`, with the normal distribution function, or its tanh approximation."""

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"`approximate` (={approximate!r}) must be none or tanh")
        super().__init__("gelu_tanh" if approximate == "tanh" else "gelu")


class SiLU(Gate):
    """`x · sigmoid(x)`."""

    def __init__(self) -> None:
        super().__init__("silu")


class Hardswish(Gate):
    """`x · clip(x + 3, 0, 6) / 6`."""

    def __init__(self) -> None:
        super().__init__("hardswish")


class Mish(Gate):
    """`x · tanh(softplus(x))`."""

    def __init__(self) -> None:
        super().__init__("mish")


class SigmoidGate(nn.Module):
    """`x · sigmoid(gate)`, with a gate from elsewhere in the network, as in squeeze-and-excitation or a GLU."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """`x` and a gate that broadcasts to it, to the shape of `x`."""
        return x * freeze(gate).sigmoid()
