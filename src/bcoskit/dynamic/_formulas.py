"""The formulas that layers and rules share: gates, normalisation and attention, with their factors frozen."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit.dynamic._mode import freeze


def quotient(function: Callable[[Tensor], Tensor], x: Tensor, slope: float = 1.0) -> Tensor:
    """f(x) / x, and the slope of f where x is 0."""
    zero = x == 0
    return torch.where(zero, slope, function(x) / torch.where(zero, 1.0, x))


# The analytic forms are exact at 0 and lose no digits near it.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * torch.special.erfc(x * -(0.5**0.5)),
    "gelu_tanh": lambda x: torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x)),
    "relu": lambda x: (x > 0).to(x.dtype),
    "silu": torch.sigmoid,
    "hardswish": lambda x: (x + 3).clamp(0, 6) / 6,
    "mish": lambda x: torch.tanh(F.softplus(x)),
    "softsign": lambda x: (1 + x.abs()).reciprocal(),
    "square": lambda x: x,
    "tanh": lambda x: quotient(torch.tanh, x),
    "tanhshrink": lambda x: 1 - quotient(torch.tanh, x),
    "erf": lambda x: quotient(torch.erf, x, slope=2 / torch.pi**0.5),
    "sin": lambda x: quotient(torch.sin, x),
    "sinh": lambda x: quotient(torch.sinh, x),
    "asinh": lambda x: quotient(torch.asinh, x),
    "atan": lambda x: quotient(torch.atan, x),
    "expm1": lambda x: quotient(torch.expm1, x),
    "log1p": lambda x: quotient(torch.log1p, x),
}
"""The gate `g` by the name of its activation `f(x) = x · g(x)`."""


def gate(x: Tensor, name: str) -> Tensor:
    """A gated activation `f(x) = x · g(x)`, whose gate `g` is a constant in `explanation_mode`.

    Args:
        x: Any shape, floating point.
        name: The activation, a key of `GATES`.

    Returns:
        The activation, shaped like `x`.

    Raises:
        TypeError: If `x` is not of floating dtype.
        ValueError: If there is no gate of that name.
    """
    if name not in GATES:
        raise ValueError(f"`name` (={name!r}) must be one of {', '.join(GATES)}")
    check_floating(x)
    return x * GATES[name](freeze(in_single_precision(x))).to(x.dtype)


def normalize(
    x: Tensor,
    dims: Sequence[int],
    *,
    center: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> Tensor:
    """Normalise over a set of axes: `weight · (x - m) / sqrt(v + eps) + bias`, with `m = 0` if not centred.

    `m` and `v` are the mean and the population variance over `dims`; an uncentred norm divides by the standard
    deviation about the mean as well. In `explanation_mode` `v` is a constant and `m` stays linear in `x`
    (Böhle et al., TPAMI 2024, section on normalisation).

    Args:
        x: Any shape.
        dims: The axes that share one statistic.
        center: Whether the mean is subtracted.
        weight: Broadcastable to `x`.
        bias: Broadcastable to `x`.
        eps: Added to the variance.
        mean: Used in the place of the mean over `dims`, broadcastable to `x`.
        var: Used in the place of the variance over `dims`, broadcastable to `x`.

    Returns:
        The normalised tensor, of the shape and dtype of `x`.

    Raises:
        TypeError: If `x` is not of floating dtype.
        ValueError: If an uncentred norm has one value per statistic.
    """
    check_floating(x)
    if x.numel() == 0:
        return x
    # Centred, the one value becomes 0; uncentred, it would be divided by the root of `eps` alone.
    if var is None and not center and all(x.shape[dim] == 1 for dim in dims):
        raise ValueError(f"`x` of shape {tuple(x.shape)} has one value per statistic, whose variance is 0")
    values = in_single_precision(x)
    centred = x
    if center:
        centred = x - (x.mean(tuple(dims), keepdim=True) if mean is None else mean.to(x.dtype))
    if var is None and center and mean is None and values is x:
        var = freeze(centred).square().mean(tuple(dims), keepdim=True)  # `var` takes several times as long
    elif var is None:
        var = freeze(values).var(tuple(dims), correction=0, keepdim=True)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    y = centred * scale.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def check_floating(x: Tensor) -> None:
    """Raise a `TypeError` for integers, in which factors would be cut off, and squares overflow."""
    if not x.is_floating_point():
        raise TypeError(f"`x` has dtype {x.dtype}, must be of floating dtype: use `x.float()`")


def in_single_precision(x: Tensor) -> Tensor:
    """In half precision squares overflow and epsilons vanish: factors are computed in single precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Softmax attention `softmax(scale · q kᵀ + mask) v`, linear in `v`.

    In `explanation_mode` the attention matrix is a constant (Böhle et al., TPAMI 2024, section on transformers).

    Args:
        query: (…, L, D).
        key: (…, S, D).
        value: (…, S, E).
        mask: Added to the scores, or boolean with True where a position may be attended to; (…, L, S).
        scale: 1/√D if None.

    Returns:
        (…, L, E).
    """
    # In explanation mode a rule gives this operation its explicit form; outside, it is the fused kernel.
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
