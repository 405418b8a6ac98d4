"""The passes over memory of a B-cos layer, as few as torch allows: what `bcoskit.functional` computes with, eagerly.

Each is an `autograd.Function` with a backward pass of its own, which keeps no more than the ordinary layer does. They
stand aside for compilers, function transforms and forward-mode derivatives, which make kernels of their own out of
plain operations, and in `explanation_mode`, which freezes factors of plain operations (MaxOut has none, and stays).

On a CPU they take large maps part by part, so that what one operation has written is still in a core's cache when the
next one reads it: each map passes memory once.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from bcoskit.dynamic import current_mode, is_frozen
from bcoskit.dynamic._mode import LINEAR

_PART = 1 << 18  # entries, 1 MiB in single precision


Way: TypeAlias = Literal["derivatives", "constants"] | None


def way(x: Tensor, weight: Tensor | None = None) -> Way:
    """Whether these passes can stand in the place of plain operations on `x`, and on parameters.

    Returns:
        "derivatives" if they can, "constants" if only for what `frozen` makes constants of, which needs no derivatives;
        None if they cannot.
    """
    if not is_eager(x) or (weight is not None and (weight.dtype != x.dtype or not is_eager(weight))):
        return None
    if not is_frozen():
        return "derivatives"
    mode = current_mode()
    if mode is None:
        return "constants"
    if weight is not None and not isinstance(weight, torch.nn.Parameter) and mode.depends_on_input(weight):
        return None  # a product of two factors that depend on the input, of which the mode knows what becomes
    return "constants" if mode.has_constant_factors else None


def is_eager(x: Tensor) -> bool:
    """Whether operations on `x` are run as they are called, in single or double precision."""
    device = x.device.type
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype in (torch.float32, torch.float64)
        and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_traced() -> bool:
    """Whether operations are being written down, to be run one by one elsewhere."""
    return not torch.compiler.is_compiling() and get_proxy_mode() is not None


class Parts:
    """Maps whose channels are one axis, cut into parts that fit into a cache.

    Parts have the axes (positions, groups, channels of a group) where channels are last in memory, and
    (samples, groups, channels of a group, positions) where they are not.
    """

    def __init__(self, y: Tensor, axis: int, groups: int = 1) -> None:
        self._axis = axis % y.ndim
        self._groups = groups
        self._is_last = y.movedim(self._axis, -1).is_contiguous()
        self.channel_axis = 2
        self.other_axes = (0,) if self._is_last else (0, 3)
        length = y.numel() // y.shape[self._axis] if self._is_last else len(y)
        small = y.device.type != "cpu" or y.numel() <= _PART
        self._size = max(1, length if small else _PART * length // y.numel())

    def view(self, x: Tensor) -> Tensor:
        """A map with all channels, or with one per group, in the axes of the parts; no copy of one in `y`'s layout."""
        channels = x.shape[self._axis] // self._groups
        if self._is_last:
            return x.movedim(self._axis, -1).reshape(-1, self._groups, channels)
        return x.reshape(len(x), self._groups, channels, -1)

    def per_channel(self, values: Tensor) -> Tensor:
        """One value per channel, in axes that broadcast to parts."""
        return values.reshape(1, self._groups, -1, *[1] * (not self._is_last))

    def cut(self, *maps: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The parts of maps, side by side."""
        return zip(*(self.view(x).split(self._size) for x in maps), strict=True)

    def joined(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """A map made of its parts."""
        whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if not self._is_last:
            return whole.reshape(like.shape)
        return whole.reshape(like.movedim(self._axis, -1).shape).movedim(-1, self._axis)


def max_out(y: Tensor, units: int, axis: int) -> Tensor:
    """The largest of each `units` consecutive entries along an axis; its gradient goes to the first of the largest."""
    if not (torch.is_grad_enabled() and y.requires_grad):
        return functools.reduce(torch.maximum, y.unflatten(axis, (-1, units)).unbind(axis + 1))
    largest = _MaxOut.apply(y, units, axis)
    largest.grad_fn.metadata[LINEAR] = True
    return largest


class _MaxOut(torch.autograd.Function):
    """Keeps, of one byte for each output, which entries are larger than all before them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, units: int, axis: int) -> Tensor:
        largest, *others = y.unflatten(axis, (-1, units)).unbind(axis + 1)
        larger = list[Tensor]()
        for other in others:
            larger.append(other > largest)
            largest = torch.maximum(largest, other)
        ctx.save_for_backward(*larger)
        ctx.axis, ctx.shape, ctx.is_last = axis, y.shape, y.movedim(axis, -1).is_contiguous()
        return largest

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (rest,) = gradients
        larger = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_batched(rest):
            entries = list[Tensor]()
            for chosen in reversed(larger):
                entries.append(rest * chosen)
                rest = rest - entries[-1]
            return torch.stack([rest, *reversed(entries)], ctx.axis + 1).reshape(ctx.shape), None, None
        axis, shape = ctx.axis, ctx.shape
        if ctx.is_last:  # flat, since torch is slower on the same entries in more axes
            moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
            for_y = rest.new_empty(moved).movedim(-1, axis)
            first, *entries = for_y.movedim(axis, -1).view(-1, len(larger) + 1).unbind(1)
            rest, *larger = (each.movedim(axis, -1).reshape(-1) for each in (rest, *larger))
        else:
            for_y = rest.new_empty(shape)
            first, *entries = for_y.unflatten(axis, (-1, len(larger) + 1)).unbind(axis + 1)
        for chosen, entry in zip(reversed(larger), reversed(entries), strict=True):
            torch.mul(rest, chosen, out=entry)
            rest = torch.sub(rest, entry, out=first)
        return for_y, None, None


def scaled(y: Tensor, reciprocal: Tensor, weight: Tensor | None, axis: int) -> Tensor:
    """`y · |y| · reciprocal`, after `y` has been divided by the norms of the filters; `y` is overwritten.

    Args:
        y: Responses, which nothing else needs.
        reciprocal: Of the norms of patches, shaped like `y`, with one channel for each group of consecutive channels.
        weight: The filters that gave `y`, or None if those have unit norm.
        axis: Of the channels.
    """
    if not (y.is_contiguous() or y.movedim(axis, -1).is_contiguous()):
        y = y.contiguous()
    if torch.is_grad_enabled() and (y.requires_grad or reciprocal.requires_grad):
        return _Scaled.apply(y, reciprocal, weight, axis)
    return _scale(y, reciprocal, None if weight is None else _constant_inverse_norm(weight), axis)


def _scale(y: Tensor, reciprocal: Tensor, inverse: Tensor | None, axis: int) -> Tensor:
    if y.numel() <= _PART and reciprocal.shape[axis] in (1, y.shape[axis]):
        if inverse is not None:
            y.mul_(_per_channel(inverse, y, axis))
        return y.mul_(y.abs().mul_(reciprocal))
    parts = Parts(y, axis, reciprocal.shape[axis])
    factor = None if inverse is None else parts.per_channel(inverse)
    for part, of_patch in parts.cut(y, reciprocal):
        if factor is not None:
            part.mul_(factor)
        part.mul_(part.abs().mul_(of_patch))
    return y


def cosine_of(y: Tensor, reciprocal: Tensor, axis: int) -> Tensor:
    """What `scaled` multiplies `y` with, without a derivative, for filters of unit norm."""
    cosine = y.detach().abs()
    if cosine.numel() <= _PART and reciprocal.shape[axis] in (1, y.shape[axis]):
        return cosine.mul_(reciprocal)
    if not (cosine.is_contiguous() or cosine.movedim(axis, -1).is_contiguous()):
        cosine = cosine.contiguous()
    for part, of_patch in Parts(cosine, axis, reciprocal.shape[axis]).cut(cosine, reciprocal):
        part.mul_(of_patch)
    return cosine


class _Scaled(torch.autograd.Function):
    """Keeps its output, which the next layer keeps too, instead of `y`: `|y| = sqrt(|output| / reciprocal)`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, reciprocal: Tensor, weight: Tensor | None, axis: int) -> Tensor:
        inverse = None if weight is None else _constant_inverse_norm(weight)
        _scale(y, reciprocal, inverse, axis)
        ctx.mark_dirty(y)
        ctx.save_for_backward(y, reciprocal, weight, inverse)
        ctx.axis = axis
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        output, reciprocal, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() or _is_batched(gradient):
            return *_scaled_backward(gradient, output, reciprocal, weight, ctx.axis), None
        parts = Parts(output, ctx.axis, reciprocal.shape[ctx.axis])
        for_y = torch.empty_like(output)
        twice = 2.0 if inverse is None else parts.per_channel(2 * inverse)
        sums, along = list[Tensor](), list[Tensor]()
        for into, grad, out, of_patch in parts.cut(for_y, gradient, output, reciprocal):
            product = grad * out
            sums.append(product.sum(parts.channel_axis, keepdim=True).div_(of_patch))
            if inverse is not None:
                along.append(product.sum(parts.other_axes))
            torch.abs(out, out=into).mul_(of_patch).sqrt_().mul_(grad).mul_(twice)
        for_weight = None
        if inverse is not None and _is_wanted(ctx, 2):
            factor = -2 * torch.stack(along).sum(0).flatten() * inverse.flatten()
            for_weight = (weight * inverse).mul_(factor.reshape(inverse.shape))
        return for_y, parts.joined(sums, reciprocal), for_weight, None


def _is_batched(*gradients: Tensor) -> bool:
    """Whether these are several gradients at once (`is_grads_batched`), which nothing can be written into."""
    return any(is_batchedtensor(each) or is_legacy_batchedtensor(each) for each in gradients)


def _is_wanted(ctx: Any, index: int) -> bool:
    """Whether the backward pass that runs asks for a gradient: one of inputs alone needs none of weights."""
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index][0])
    except RuntimeError:  # it is a leaf whose gradient `torch.autograd.grad` returns
        return True


def _scaled_backward(
    gradient: Tensor, output: Tensor, reciprocal: Tensor, weight: Tensor | None, axis: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The derivatives by operations that have derivatives themselves."""
    axis, groups = axis % output.ndim, reciprocal.shape[axis]
    product = gradient * output
    # By `reshape`, since there is no `unflatten` of several gradients at once.
    grouped = product.reshape(*output.shape[:axis], groups, -1, *output.shape[axis + 1 :])
    for_reciprocal = grouped.sum(axis + 1) / reciprocal
    relative = output.abs() * reciprocal.repeat_interleave(output.shape[axis] // groups, axis)
    # At 0 the root has no derivative; the product that it stands for has one, 0.
    slope = 2 * relative.clamp_min(torch.finfo(output.dtype).tiny).sqrt()
    if weight is None:
        return slope * gradient, for_reciprocal, None
    inverse = inverse_norm(weight)
    along = product.movedim(axis, 0).reshape(output.shape[axis], -1).sum(1)
    for_weight = weight * inverse * (-2 * along.reshape(inverse.shape) * inverse)
    return slope * gradient * _per_channel(inverse, output, axis), for_reciprocal, for_weight


def convolved(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> tuple[Tensor, Tensor]:
    """A convolution, and the sum of squares over the channels of each group, (N, groups, *spatial)."""
    arguments = tuple(stride), tuple(padding), tuple(dilation), groups
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Convolved.apply(x, weight, *arguments)
    return _convolve(x, weight, *arguments), energy(x, groups)


def _convolve(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    return torch.convolution(x, weight, None, stride, padding, dilation, False, (0,) * len(stride), groups)


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
        return _convolve(x, weight, *ctx.arguments), energy(x, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        for_y, for_energy = gradients
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        needed = [_is_wanted(ctx, 0), _is_wanted(ctx, 1), False]
        zeros = [0] * len(stride)
        for_x, for_weight, _ = torch.ops.aten.convolution_backward(
            for_y, x, weight, None, stride, padding, dilation, False, zeros, groups, needed
        )
        if needed[0]:
            twice = 2 * for_energy
            if groups > 1:
                twice = twice.repeat_interleave(x.shape[1] // groups, 1)
            fresh = not (torch.is_grad_enabled() or _is_batched(for_y, for_energy))
            for_x = for_x.addcmul_(x, twice) if fresh else for_x.addcmul(x, twice)
        return for_x, for_weight, None, None, None, None


def energy(x: Tensor, groups: int) -> Tensor:
    """The sum of squares over the channels of each group, (N, groups, *spatial)."""
    if groups == x.shape[1]:
        return x.square()
    if groups == 1 and x.ndim == 4 and x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last):
        # The channels of a position lie side by side: one pass, without an intermediate.
        return torch.linalg.vector_norm(x, dim=1, keepdim=True).square_()
    parts = Parts(x, 1, groups)
    sums = [part.square().sum(parts.channel_axis, keepdim=True) for (part,) in parts.cut(x)]
    return parts.joined(sums, x[:, :groups])


def unit(weight: Tensor) -> Tensor:
    """Rows of unit norm; a row of zeros stays 0, with gradient 0."""
    return _Unit.apply(weight) if torch.is_grad_enabled() and weight.requires_grad else weight * inverse_norm(weight)


class _Unit(torch.autograd.Function):
    """Keeps the rows of unit norm, which the layer keeps too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        inverse = inverse_norm(weight)
        rows = weight * inverse
        ctx.save_for_backward(weight, rows, inverse)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        weight, rows, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # the norm depends on the weight, which a second derivative must know
            inverse = inverse_norm(weight)
        along = (gradient * rows).sum(tuple(range(1, rows.ndim)), keepdim=True)
        return torch.addcmul(gradient, rows, along, value=-1) * inverse


def inverse_norm(weight: Tensor) -> Tensor:
    """`1 / ‖w‖₂` of each row, (rows, 1, …); 0 for a row of zeros, with derivative 0."""
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    zero = norm < torch.finfo(norm.dtype).tiny  # what is below has no finite reciprocal
    return torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, norm))


def _constant_inverse_norm(weight: Tensor) -> Tensor:
    """As `inverse_norm`, without derivatives, by fewer operations."""
    norm = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return norm.reciprocal_().nan_to_num_(torch.nan, posinf=0.0)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance per channel, (C,).

    On a CPU not by batch norm's kernel, which adds up one number after another where channels are last: of large maps
    five digits are right. Some other devices have no such kernel.
    """
    x = x.detach()
    if x.device.type in ("cuda", "xpu"):
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, var
    parts, count = Parts(x, 1), x.numel() // x.shape[1]
    mean = torch.stack([part.sum(parts.other_axes) for (part,) in parts.cut(x)]).sum(0).flatten() / count
    center = parts.per_channel(mean)
    squares = [(part - center).square_().sum(parts.other_axes) for (part,) in parts.cut(x)]
    return mean, torch.stack(squares).sum(0).flatten() / count


Summed: TypeAlias = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes, with derivatives."""


def uncentered(
    x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, count: int, summed: Summed | None = None
) -> Tensor:
    """`weight · x / sqrt(var + eps)` with the batch's own statistics, whose gradient is part of that of `x`.

    Args:
        x: (N, C, *spatial).
        weight: (C,).
        mean: Of each channel, (C,).
        var: Of each channel, (C,).
        eps: Added to it.
        count: Of the values behind a statistic.
        summed: Given where these are those of all processes.
    """
    return _Uncentered.apply(x, weight, mean, var, eps, count, summed)


class _Uncentered(torch.autograd.Function):
    """Keeps `x` and one factor per channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        var: Tensor,
        eps: float,
        count: int,
        summed: Summed | None,
    ) -> Tensor:
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps, ctx.count, ctx.summed = eps, count, summed
        return x * _per_channel(scale if weight is None else scale * weight, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        x, weight, mean, scale = ctx.saved_tensors
        dims = (0, *range(2, x.ndim))
        if torch.is_grad_enabled():
            # A second derivative: the statistics depend on `x`, which plain operations know.
            if ctx.summed is None:
                var = x.var(dims, correction=0)
            else:
                difference = x - _per_channel(ctx.summed(x.sum(dims)) / ctx.count, x)
                var = ctx.summed(difference.square().sum(dims)) / ctx.count
            scale = torch.rsqrt(var + ctx.eps)
            y = x * _per_channel(scale if weight is None else scale * weight, x)
            inputs = [each if each is not None and each.requires_grad else None for each in (x, weight)]
            given = [each for each in inputs if each is not None]
            found = iter(torch.autograd.grad(y, given, gradient, create_graph=True))
            return *(None if each is None else next(found) for each in inputs), *[None] * 5
        factor = scale if weight is None else scale * weight
        batched = _is_batched(gradient)
        parts = Parts(x, 1)
        if batched:
            along = (gradient * x).sum(dims)
        else:
            sums = [(grad * values).sum(parts.other_axes) for grad, values in parts.cut(gradient, x)]
            along = torch.stack(sums).sum(0).flatten()
        for_weight = None if weight is None else along * scale
        if ctx.summed is not None:
            along = ctx.summed(along)
        slope = -along * factor * scale.square() / ctx.count
        if batched:
            for_x = gradient * _per_channel(factor, x) + (x - _per_channel(mean, x)) * _per_channel(slope, x)
            return for_x, for_weight, *[None] * 5
        for_x = torch.empty_like(x)
        factors = [parts.per_channel(values) for values in (factor, slope, slope * mean)]
        for into, grad, values in parts.cut(for_x, gradient, x):
            torch.mul(grad, factors[0], out=into).addcmul_(values, factors[1]).sub_(factors[2])
        return for_x, for_weight, *[None] * 5


def _per_channel(values: Tensor, x: Tensor, axis: int = 1) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim))
