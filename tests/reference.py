"""The formulas of B-cos networks once more, slowly: index arithmetic and explicit sums in float64.

Written from the papers (Böhle et al., CVPR 2022 and TPAMI 2024) and importing nothing of the library, so that
an error in one of the two shows as a difference. Every layer comes with the matrix of its linear summary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

Sizes = int | tuple[int, ...]
NormKind = Literal["all", "batch", "group", "instance", "layer", "position"]


@dataclass(frozen=True)
class Summary:
    """What a layer computes, and how.

    Attributes:
        output: The output.
        weights: W of shape (output elements, input elements) over the whole batch: what the gradient of the
            output with respect to the input is while every dynamic factor is a constant.
        constant: `output - W·x`, of the output's shape, computed from the layer's own constants.
    """

    output: Tensor
    weights: Tensor
    constant: Tensor


def values(*shape: int, seed: int = 0) -> Tensor:
    """Reproducible standard normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One row per element of function(x): its gradient with respect to x, as autograd sees it."""
    x = x.detach().clone().requires_grad_()
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0].flatten() for value in function(x).flatten()]
    return torch.stack(rows)


def combination(output: Tensor) -> Tensor:
    """Fixed random coefficients of the elements of an output: they see every row of a Jacobian at once."""
    return values(output.numel(), seed=1000)


def combined_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`combination @ gradient_rows(function, x)`, at the price of one gradient."""
    x = x.detach().clone().requires_grad_()
    output = function(x)
    return torch.autograd.grad(output.flatten(), x, combination(output))[0].flatten()


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    """Equal shape and type, and values that differ by float64 rounding at most."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# Receptive fields


def _sizes(value: Sizes, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def _margins(padding: Sizes | str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """What is added before and after each spatial axis; an odd rest of "same" goes to the end."""
    if padding == "valid":
        return [(0, 0) for _ in kernel]
    if padding == "same":
        totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    assert not isinstance(padding, str)
    return [(margin, margin) for margin in _sizes(padding, len(kernel))]


def _source(position: int, size: int, padding_mode: str) -> int:
    """The element that stands at a position of the padded axis; -1 where a zero does."""
    if 0 <= position < size:
        return position
    if padding_mode == "reflect":
        return -position if position < 0 else 2 * (size - 1) - position
    if padding_mode == "replicate":
        return 0 if position < 0 else size - 1
    if padding_mode == "circular":
        return position % size
    return -1


def patches(
    x: Tensor,
    kernel_size: tuple[int, ...],
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Receptive fields of x (N, C, *in), element by element: (N, C, *out, *kernel_size)."""
    dimensions = len(kernel_size)
    strides, dilations = _sizes(stride, dimensions), _sizes(dilation, dimensions)
    margins = _margins(padding, kernel_size, dilations)
    for axis, (kernel, step, spread, (before, after)) in enumerate(
        zip(kernel_size, strides, dilations, margins, strict=True)
    ):
        dim = 2 + 2 * axis
        size = x.shape[dim]
        starts = range(-before, size + after - spread * (kernel - 1), step)
        sources = torch.tensor(
            [[_source(start + spread * k, size, padding_mode) for k in range(kernel)] for start in starts]
        )
        taken = x.index_select(dim, sources.clamp(min=0).flatten()).unflatten(dim, tuple(sources.shape))
        inside = (sources >= 0).reshape(*sources.shape, *[1] * (taken.ndim - dim - 2))
        x = torch.where(inside, taken, torch.zeros((), dtype=x.dtype))
    outer, inner = range(2, 2 + 2 * dimensions, 2), range(3, 3 + 2 * dimensions, 2)
    return x.permute(0, 1, *outer, *inner)


def patch_norm(
    x: Tensor,
    kernel_size: tuple[int, ...],
    *,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    eps: float = 1e-6,
) -> Tensor:
    """sqrt(S + eps), S the sum of squares over receptive field and group: (N, groups, *out)."""
    fields = patches(x, kernel_size, stride=stride, padding=padding, dilation=dilation, padding_mode=padding_mode)
    squares = fields.unflatten(1, (groups, -1)) ** 2
    return (squares.sum(dim=(2, *range(-len(kernel_size), 0))) + eps).sqrt()


# The B-cos transform


def unit_rows(weight: Tensor) -> Tensor:
    """Every row by its 2-norm, one by one; a zero row stays zero."""
    rows = [row / math.sqrt(float((row**2).sum())) if bool((row != 0).any()) else row for row in weight]
    return torch.stack(rows)


def _transform(
    fields: Tensor, norms: Tensor, rows: Tensor, b: float, max_out: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs (P, O) and their weights (P, O, K) for fields (P, K), their norms (P,) and rows (O·M, K)."""
    units = rows.unflatten(0, (-1, max_out))
    responses = torch.einsum("pk,omk->pom", fields, units)
    best = responses.argmax(-1)
    y = responses.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    if b == 1:
        factor = torch.ones_like(y)
    elif b == 2:
        factor = y.abs() / norms.unsqueeze(-1)
    else:
        factor = ((y / norms.unsqueeze(-1)).abs() + 1e-6) ** (b - 1)
    chosen = units[torch.arange(units.shape[0]), best]
    return factor * y / scale, factor.unsqueeze(-1) * chosen / scale


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float = 2.0,
    max_out: int = 1,
    normalize_weight: bool = True,
    scale: float = 1.0,
) -> Summary:
    """B-cos linear layer of x (*, I); the norm of the input has 1e-12 added outside the root."""
    rows = unit_rows(weight) if normalize_weight else weight
    vectors = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    norms = (vectors**2).sum(-1).sqrt() + 1e-12
    outputs, weights = _transform(vectors, norms, rows, b, max_out, scale)
    constant = torch.zeros_like(outputs) if bias is None else bias.expand_as(outputs)
    shape = (*x.shape[:-1], outputs.shape[-1])
    return Summary((outputs + constant).reshape(shape), torch.block_diag(*weights), constant.reshape(shape))


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float = 2.0,
    max_out: int = 1,
    normalize_weight: bool = True,
    scale: float = 1.0,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Summary:
    """B-cos convolution of x (N, C, *in) by weight (O·M, C / groups, *kernel)."""
    rows = unit_rows(weight) if normalize_weight else weight
    kernel = tuple(weight.shape[2:])

    def fields_of(values: Tensor) -> Tensor:
        return patches(values, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=padding_mode)

    def flat(values: Tensor, group: int) -> Tensor:
        """(N·positions, channels of the group · kernel elements)."""
        part = values.unflatten(1, (groups, -1))[:, group]
        return part.movedim(1, 1 + len(kernel)).flatten(1 + len(kernel)).flatten(0, -2)

    fields = fields_of(x)
    # The number, from 1, of the input element at every place of every field; 0 is padding.
    elements = fields_of(torch.arange(1, 1 + x.numel()).reshape(x.shape))
    shape = (x.shape[0], *fields.shape[2 : 2 + len(kernel)])
    outputs, summaries = [], []
    for group, group_rows in enumerate(rows.chunk(groups)):
        field = flat(fields, group)
        norms = ((field**2).sum(-1) + 1e-6).sqrt()
        output, weights = _transform(field, norms, group_rows.flatten(1), b, max_out, scale)
        numbers = flat(elements, group).unsqueeze(1).expand_as(weights)
        summary = weights.new_zeros(*output.shape, 1 + x.numel()).scatter_add(-1, numbers, weights)
        outputs.append(output.unflatten(0, shape))
        summaries.append(summary[..., 1:].unflatten(0, shape))
    output = torch.cat(outputs, -1).movedim(-1, 1)
    constant = torch.zeros_like(output)
    if bias is not None:
        constant = constant + bias.reshape(-1, *[1] * len(kernel))
    summary = torch.cat(summaries, -2).movedim(-2, 1).flatten(0, -2)
    return Summary(output + constant, summary, constant)


# Norms


def statistic_labels(shape: torch.Size, kind: NormKind, groups: int = 2) -> Tensor:
    """For every element of (N, C, *) the number of the statistic that it belongs to."""
    labels = torch.empty(shape, dtype=torch.long)
    samples, channels = shape[:2]
    positions = list(product(*[range(size) for size in shape[2:]]))
    for n, c, (p, position) in product(range(samples), range(channels), enumerate(positions)):
        labels[(n, c, *position)] = {
            "all": 0,
            "batch": c,
            "group": n * groups + c // (channels // groups),
            "instance": n * channels + c,
            "layer": n,
            "position": n * len(positions) + p,
        }[kind]
    return labels


def norm(
    x: Tensor,
    kind: NormKind,
    *,
    centered: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 2,
) -> Summary:
    """Norm of x (N, C, *) by its own statistics; the variance is always the one about the mean.

    The factor 1 / sqrt(variance + eps) is frozen, the centring belongs to the linear map.
    """
    labels = statistic_labels(x.shape, kind, groups).flatten()
    values = x.flatten()
    scale = torch.empty_like(values)
    centring = torch.eye(values.numel(), dtype=x.dtype)
    for label in labels.unique():
        members = labels == label
        mean = values[members].sum() / members.sum()
        variance = ((values[members] - mean) ** 2).sum() / members.sum()
        scale[members] = 1 / (variance + eps).sqrt()
        if centered:
            centring -= torch.outer(members, members).to(x.dtype) / members.sum()
    constant = torch.zeros_like(x)
    if weight is not None:
        scale = scale * _per_channel(weight, x).flatten()
    if bias is not None:
        constant = constant + _per_channel(bias, x)
    weights = scale.unsqueeze(-1) * centring
    return Summary((weights @ values).reshape(x.shape) + constant, weights, constant)


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.reshape(1, -1, *[1] * (x.ndim - 2)).expand_as(x)


# Attention


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Summary:
    """softmax(q kᵀ·scale + mask) v for (N, H, L, D), query by query; linear in v alone."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    elements = torch.arange(v.numel()).reshape(v.shape)
    output = v.new_zeros(*q.shape[:-1], v.shape[-1])
    weights = v.new_zeros(*output.shape, v.numel())
    for n, h, i in product(*[range(size) for size in q.shape[:3]]):
        scores = torch.stack([(q[n, h, i] * key).sum() * scale for key in k[n, h]])
        if mask is not None:
            scores = scores + mask[i]
        shares = scores.exp() / scores.exp().sum()
        for d in range(v.shape[-1]):
            output[n, h, i, d] = (shares * v[n, h, :, d]).sum()
            weights[n, h, i, d, elements[n, h, :, d]] = shares
    return Summary(output, weights.flatten(0, -2), torch.zeros_like(output))


# Activations


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "hardswish": lambda x: x * min(max(x + 3, 0.0), 6.0) / 6,
    "mish": lambda x: x * math.tanh(math.log(1 + math.exp(x))),
    "softsign": lambda x: x / (1 + abs(x)),
    "square": lambda x: x * x,
    "tanh": math.tanh,
    "tanhshrink": lambda x: x - math.tanh(x),
    "erf": math.erf,
    "sin": math.sin,
    "sinh": math.sinh,
    "asinh": math.asinh,
    "atan": math.atan,
    "expm1": math.expm1,
    "log1p": math.log1p,
}
"""Activations with f(0) = 0."""


def gate(x: Tensor, name: str) -> Summary:
    """f(x) element by element; its weights are the diagonal of f(x) / x."""
    output = torch.tensor([ACTIVATIONS[name](value) for value in x.flatten().tolist()], dtype=x.dtype)
    return Summary(output.reshape(x.shape), torch.diag(output / x.flatten()), torch.zeros_like(x))
