"""Backward operations by forward ones: what a runtime without automatic differentiation needs, and runs fast."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions

_aten = torch.ops.aten


def decompositions() -> dict[Any, Callable[..., Any]]:
    """From operations of torch to functions that compute the same by others, which ONNX has."""
    return {
        **core_aten_decompositions(),
        _aten.convolution_backward.default: _convolution_backward,
        _aten.avg_pool2d_backward.default: _avg_pool2d_backward,
        _aten.max_pool2d_with_indices_backward.default: _max_pool2d_backward,
        _aten.linalg_vector_norm.default: _vector_norm,
        _aten.value_selecting_reduction_backward.default: _selection_backward,
    }


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    _bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    _needed: Sequence[bool],
) -> tuple[Tensor, None, None]:
    """The gradient of the input alone: filters are constants of an explanation."""
    zeros = [0] * len(stride)
    if transposed:
        found = torch.convolution(gradient, weight, None, stride, padding, dilation, False, zeros, groups)
    elif max(stride) == 1 or max(dilation) == 1:
        found = _by_convolution(gradient, x.shape[2:], weight, stride, padding, dilation, groups)
    else:
        spans = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        rest = [
            size - ((outputs - 1) * jump - 2 * width + span + 1)
            for size, outputs, jump, width, span in zip(
                x.shape[2:], gradient.shape[2:], stride, padding, spans, strict=True
            )
        ]
        found = torch.convolution(gradient, weight, None, stride, padding, dilation, True, rest, groups)
    return found, None, None


def _by_convolution(
    gradient: Tensor,
    sizes: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A transposed convolution of stride `s` as a convolution of stride 1, which runtimes have faster kernels for.

    Input `s·q + r` of an axis is reached by the output `q + t` through the filter's entry `s·(-t) + r + padding`: for
    each `r` a filter of its own over `t`, whose outputs stand side by side in the channels until they are interleaved.
    """
    dims = len(sizes)
    zeros, ones = [0] * dims, [1] * dims
    if weight.shape[2:].numel() == 1 and max(stride) > 1 and max(padding) == 0:
        # Of all `r` but the first the filters would be 0.
        dense = _convolution(gradient, _swapped(weight, groups), zeros, ones, groups)
        among = F.pad(dense.unsqueeze(2), [0, 0] * dims + [0, math.prod(stride) - 1])
        return _interleaved(among.flatten(1, 2), sizes, stride)
    pads: list[int] = []
    counts: list[int] = []
    filters = weight
    for axis, (size, outputs, jump, width, step, length) in enumerate(
        zip(sizes, gradient.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    ):
        span = step * (length - 1)
        first, last = math.ceil((width - span) / jump), (jump - 1 + width) // jump
        count = -(-size // jump)
        pads = [-first, count + last - outputs, *pads]
        counts.append(count)
        if jump > 1:
            around = [0, 0] * (dims - 1 - axis) + [jump * last - width, jump * (1 - first) - 1 + width - span]
            filters = F.pad(filters, around)
    filters = _filters_of_positions(filters, stride, groups)
    same = [pads[2 * axis] for axis in reversed(range(dims))]
    if pads[::2] == pads[1::2] and min(pads) >= 0:
        around = same
    else:
        gradient, around = F.pad(gradient, pads), zeros
    dense = _convolution(gradient, filters, around, dilation, groups)
    return _interleaved(dense, sizes, stride)


def _convolution(x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """Of stride 1."""
    dims = len(padding)
    return torch.convolution(x, weight, None, [1] * dims, padding, dilation, False, [0] * dims, groups)


def _filters_of_positions(filters: Tensor, stride: Sequence[int], groups: int) -> Tensor:
    """Filters (outputs, inputs, *kernel) as (inputs · s₁ · s₂ …, outputs, *taps), the taps in reverse."""
    dims = len(stride)
    if max(stride) == 1:
        return _swapped(filters, groups).flip(list(range(2, 2 + dims)))
    filters = filters.unflatten(0, (groups, -1))
    for axis, jump in enumerate(stride):
        filters = filters.unflatten(3 + 2 * axis, (-1, jump))
    taps = [3 + 2 * axis for axis in range(dims)]
    filters = filters.flip(taps).permute(0, 2, *[tap + 1 for tap in taps], 1, *taps)
    return filters.flatten(0, 1 + dims)


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """Filters (outputs, inputs, *kernel) as (inputs, outputs, *kernel), in groups."""
    if groups == 1:
        return weight.transpose(0, 1)
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _interleaved(dense: Tensor, sizes: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Channels `C · s₁ · s₂ …` (N, channels, *counts) to the positions that they stand for, cut to `sizes`.

    Axis by axis, the last one first: each is one transposition of blocks, for which runtimes have fast kernels.
    """
    if max(stride) == 1:
        return dense
    counts = list(dense.shape[2:])
    channels = dense.shape[1]
    for axis in reversed(range(len(stride))):
        channels //= stride[axis]
        before, after = math.prod(counts[: axis + 1]), math.prod(counts[axis + 1 :])
        dense = dense.reshape(-1, channels, stride[axis], before, after).transpose(2, 3)
        counts[axis] *= stride[axis]
    whole = dense.reshape(-1, channels, *counts)
    for axis, size in enumerate(sizes):
        whole = whole if counts[axis] == size else whole.narrow(2 + axis, 0, size)
    return whole


def _avg_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    _ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    kernel, stride, padding = _pair(kernel), _pair(stride or kernel), _pair(padding)
    channels, sizes = x.shape[-3], x.shape[-2:]
    share = gradient
    if divisor is not None:
        share = share / divisor
    else:
        for axis, arguments in enumerate(zip(sizes, gradient.shape[-2:], kernel, stride, padding, strict=True)):
            lengths = _window_lengths(*arguments, count_include_pad)
            if len(set(lengths)) == 1:
                share = share / lengths[0]
            else:
                share = share / gradient.new_tensor(lengths).reshape([-1] + [1] * (1 - axis))
    if tuple(kernel) == tuple(stride) and max(padding) == 0:
        for axis, size in enumerate(kernel):
            share = share.repeat_interleave(size, -2 + axis)
        missing = [size - have for size, have in zip(sizes, share.shape[-2:], strict=True)]
        return F.pad(share, [0, missing[1], 0, missing[0]]) if any(missing) else share
    weight = gradient.new_ones((channels, 1, *kernel))
    return _by_convolution(share, sizes, weight, stride, padding, [1, 1], channels)


def _max_pool2d_backward(
    gradient: Tensor,
    x: Tensor,
    _kernel: Sequence[int],
    _stride: Sequence[int],
    _padding: Sequence[int],
    _dilation: Sequence[int],
    _ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    zeros = torch.zeros_like(x).flatten(-2)
    return zeros.scatter_add(-1, indices.flatten(-2), gradient.flatten(-2)).view_as(x)


def _window_lengths(size: int, outputs: int, kernel: int, stride: int, padding: int, count_padding: bool) -> list[int]:
    """How many entries along an axis the mean of each window is over."""
    low, high = (-padding, size + padding) if count_padding else (0, size)
    starts = [stride * index - padding for index in range(outputs)]
    return [min(start + kernel, high) - max(start, low) for start in starts]


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)


def _vector_norm(
    x: Tensor,
    order: float = 2,
    dim: Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if order != 2 or dtype is not None:
        return NotImplemented
    return (x * x).sum(list(range(x.ndim) if dim is None else dim), keepdim).sqrt()


def _selection_backward(gradient: Tensor, dim: int, indices: Tensor, sizes: Sequence[int], keepdim: bool) -> Tensor:
    """To the one entry that was chosen, by comparison: a scatter would be run by one thread."""
    if not keepdim and sizes:
        gradient, indices = gradient.unsqueeze(dim), indices.unsqueeze(dim)
    places = torch.arange(sizes[dim], device=indices.device)
    axis = dim % len(sizes)
    places = places.reshape([-1 if index == axis else 1 for index in range(len(sizes))])
    return torch.where(places == indices, gradient, 0)
