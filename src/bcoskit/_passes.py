"""The passes over memory of a B-cos layer, as few as torch allows: what `bcoskit.functional` computes with, eagerly.

Each is an `autograd.Function` with a backward pass of its own, which keeps no more than the ordinary layer does. They
stand aside for compilers, function transforms and forward-mode derivatives, which make kernels of their own out of
plain operations, and in `explanation_mode`, which freezes factors of plain operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from bcoskit.dynamic import current_mode, is_frozen


def at_hand(x: Tensor) -> bool:
    """Whether these passes can stand in the place of plain operations on `x`, derivatives included."""
    return not is_frozen() and in_eager(x)


def for_constants(x: Tensor) -> bool:
    """Whether they can for what `frozen` makes constants of, which needs no derivatives."""
    return in_eager(x) and is_frozen() and current_mode() is None


def in_eager(x: Tensor) -> bool:
    """Whether operations on `x` are run as they are called, in its own precision."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype in (torch.float32, torch.float64)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
    )


def scaled(y: Tensor, norm: Tensor) -> Tensor:
    """`y · |y| / norm`, for a norm that broadcasts to `y`."""
    return _Scaled.apply(y, norm)


def cosine_of(y: Tensor, norm: Tensor) -> Tensor:
    """`|y| / norm`, without a derivative: a product is faster than a quotient, where the norm is a small map."""
    cosine = y.detach().abs()
    return cosine.mul_(norm.reciprocal()) if 4 * norm.numel() <= y.numel() else cosine.div_(norm)


class _Scaled(torch.autograd.Function):
    """Keeps its output, which the next layer keeps too, instead of `y`: `|y| / norm = sqrt(|output| / norm)`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, norm: Tensor) -> Tensor:
        output = cosine_of(y, norm).mul_(y)
        ctx.save_for_backward(output, norm)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        output, norm = ctx.saved_tensors
        relative = output / norm
        for_norm = -(gradient * relative).sum_to_size(norm.shape) if ctx.needs_input_grad[1] else None
        # At 0 the root has no derivative; the product that it stands for has one, 0.
        tiny = torch.finfo(output.dtype).tiny
        if torch.is_grad_enabled():
            return 2 * relative.abs().clamp_min(tiny).sqrt() * gradient, for_norm
        return relative.abs_().clamp_min_(tiny).sqrt_().mul_(gradient).mul_(2), for_norm


def convolved(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[Tensor, Tensor]:
    """A convolution, and the sum of squares over the channels of each group, (N, groups, *spatial)."""
    return _Convolved.apply(x, weight, tuple(stride), tuple(padding), tuple(dilation), groups)


class _Convolved(torch.autograd.Function):
    """Keeps `x` and `weight`, as a convolution does, and adds both gradients of `x` in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.arguments = stride, padding, dilation, groups
        zeros = (0,) * len(stride)
        return torch.convolution(x, weight, None, stride, padding, dilation, False, zeros, groups), energy(x, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        for_y, for_energy = gradients
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        zeros = [0] * len(stride)
        for_x, for_weight, _ = torch.ops.aten.convolution_backward(
            for_y, x, weight, None, stride, padding, dilation, False, zeros, groups, needed
        )
        if needed[0]:
            twice = 2 * for_energy
            if groups > 1:
                twice = twice.repeat_interleave(x.shape[1] // groups, 1)
            for_x = for_x.addcmul(x, twice) if torch.is_grad_enabled() else for_x.addcmul_(x, twice)
        return for_x, for_weight, None, None, None, None


def energy(x: Tensor, groups: int) -> Tensor:
    """The sum of squares over the channels of each group, (N, groups, *spatial)."""
    if groups > 1:
        return x.square().unflatten(1, (groups, -1)).sum(2)
    if x.ndim == 4 and x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last):
        # The channels of a position lie side by side: one pass, without an intermediate.
        return torch.linalg.vector_norm(x, dim=1, keepdim=True).square_()
    return x.square().sum(1, keepdim=True)


def unit(weight: Tensor) -> Tensor:
    """Rows of unit norm; a row of zeros stays 0, with gradient 0."""
    return _Unit.apply(weight)


class _Unit(torch.autograd.Function):
    """Keeps the rows of unit norm, which the layer keeps too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        inverse = _inverse_norm(weight)
        rows = weight * inverse
        ctx.save_for_backward(weight, rows, inverse)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        weight, rows, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the norm depends on the weight, which a second derivative must know
            inverse = _inverse_norm(weight)
        along = (gradient * rows).sum(tuple(range(1, rows.ndim)), keepdim=True)
        return torch.addcmul(gradient, rows, along, value=-1) * inverse


def _inverse_norm(weight: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    zero = norm < torch.finfo(norm.dtype).tiny  # what is below has no finite reciprocal
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, norm))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance per channel, (C,), by batch norm's kernel: far faster than `var_mean`."""
    mean, var = torch.batch_norm_update_stats(x.detach(), None, None, 0.0)
    return mean, var


def uncentered(x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """`weight · x / sqrt(var + eps)` with the batch's own statistics, whose gradient is part of that of `x`."""
    return _Uncentered.apply(x, weight, mean, var, eps)


class _Uncentered(torch.autograd.Function):
    """Keeps `x` and one factor per channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return x * _per_channel(scale if weight is None else scale * weight, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, weight, mean, scale = ctx.saved_tensors
        dims = (0, *range(2, x.ndim))
        if torch.is_grad_enabled():
            # A second derivative: the statistics depend on `x`, which plain operations know.
            inputs = (x,) if weight is None else (x, weight)
            scale = torch.rsqrt(x.var(dims, correction=0) + ctx.eps)
            y = x * _per_channel(scale if weight is None else scale * weight, x)
            found = torch.autograd.grad(y, inputs, gradient, create_graph=True)
            return found[0], None if weight is None else found[1], None, None, None
        along = (gradient * x).sum(dims)
        factor = scale if weight is None else scale * weight
        slope = -along * factor * scale.square() / (x.numel() // x.shape[1])
        for_x = torch.addcmul(_per_channel(-slope * mean, x), gradient, _per_channel(factor, x))
        for_x.addcmul_(x, _per_channel(slope, x))
        return for_x, None if weight is None else along * scale, None, None, None


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))
