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

from bcoskit.dynamic import current_mode


def at_hand(x: Tensor) -> bool:
    """Whether these passes can stand in the place of plain operations on `x`."""
    return (
        not torch.compiler.is_compiling()
        and current_mode() is None
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype in (torch.float32, torch.float64)
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
    )


def scaled(y: Tensor, norm: Tensor) -> Tensor:
    """`y · |y| / norm`, for a norm that broadcasts to `y`."""
    return _Scaled.apply(y, norm)


class _Scaled(torch.autograd.Function):
    """Keeps its output, which the next layer keeps too, instead of `y`: `|y| / norm = sqrt(|output| / norm)`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, norm: Tensor) -> Tensor:
        output = y.abs().div_(norm).mul_(y)
        ctx.save_for_backward(output, norm)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        output, norm = ctx.saved_tensors
        relative = output / norm
        # At 0 the root has no derivative; the product that it stands for has one, 0.
        cosine = relative.abs().clamp_min(torch.finfo(output.dtype).tiny).sqrt()
        for_norm = -(gradient * relative).sum_to_size(norm.shape) if ctx.needs_input_grad[1] else None
        return 2 * cosine * gradient, for_norm


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
    """Keeps the unit rows and the norms."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
        inverse = torch.where(norm < torch.finfo(norm.dtype).tiny, 0.0, norm.reciprocal())
        rows = weight * inverse
        ctx.save_for_backward(rows, inverse)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        rows, inverse = ctx.saved_tensors
        dims = tuple(range(1, rows.ndim))
        along = (gradient * rows).sum(dims, keepdim=True)
        return torch.addcmul(gradient, rows, along, value=-1) * inverse
