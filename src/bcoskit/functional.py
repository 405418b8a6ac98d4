"""The B-cos transform and its companions as pure functions."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit import _passes
from bcoskit.dynamic import GATES, attention, freeze, gate, normalize
from bcoskit.dynamic._formulas import check_floating, in_single_precision

__all__ = [
    "GATES",
    "attention",
    "bcos_conv",
    "bcos_conv_transpose",
    "bcos_linear",
    "gate",
    "max_out",
    "normalize",
    "patch_norm",
    "unit_norm",
]

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]

# Kept for parity with the authors' layers: the epsilons inside the root of a patch norm, beside the root of
# a linear layer's norm, and of |cos| where its exponent is neither 0 nor 1.
_PATCH_EPS = 1e-6
_LINEAR_EPS = 1e-12
_COSINE_EPS = 1e-6

_SMALL_MAP = 4096  # entries

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def bcos_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    max_out: int = 1,
    normalize_weight: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """The B-cos transform `(ŵ·x) |cos(x, ŵ)|^(b-1) / scale` of a vector (Böhle et al., CVPR 2022, eq. 3).

    `|cos| = |ŵ·x| / (‖x‖ + 1e-12)`. In `explanation_mode` the power of the cosine is a constant.

    Args:
        x: (…, in_features), floating point.
        weight: (out_features · max_out, in_features).
        bias: (out_features,), added at the end.
        b: Exponent of at least 1, or a tensor that broadcasts to the output; 1 is the linear transform.
        max_out: Of each group of this many consecutive rows the largest response is taken.
        normalize_weight: Whether rows are divided by their norm (`ŵ`), or taken as they are.
        scale: Divides the transform (the first paper's per-layer divisor).

    Returns:
        (…, out_features).

    Raises:
        ValueError: If `b`, `max_out` or `scale` is out of its range or does not fit, or `bias` does not.
    """
    _check_arguments(b, max_out, scale)
    way = _passes.way(x, weight)
    filters, later = _filters(weight, normalize_weight, b, max_out, way)
    y = _max_out(F.linear(x, filters), max_out, -1)
    _check_fit("bias", bias, y.shape[-1:])
    _check_fit("b", b, y.shape)
    if not _is_linear(b):
        with _precisely(x):
            values = freeze(in_single_precision(x))
            reciprocal = 1 / (torch.linalg.vector_norm(values, dim=-1, keepdim=True) + _LINEAR_EPS)
        y = _scaled(y, reciprocal, b, -1, way, later)
    return _finish(y, bias, scale)


def bcos_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    max_out: int = 1,
    normalize_weight: bool = True,
    scale: float = 1.0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """The B-cos transform of every patch: `conv(x, ŵ) |cos|^(b-1) / scale`, in one, two or three dimensions.

    `|cos| = |conv(x, ŵ)| / patch_norm(x)` (Böhle et al., CVPR 2022, section 3.2). In `explanation_mode` the
    power of the cosine is a constant.

    Args:
        x: (N, in_channels, *spatial) or (in_channels, *spatial), floating point.
        weight: (out_channels · max_out, in_channels / groups, *kernel); its rank sets the number of dimensions.
        bias: (out_channels,), added at the end.
        b: Exponent of at least 1, or a tensor that broadcasts to (out_channels,); 1 is the convolution.
        max_out: Of each group of this many consecutive output rows the largest response is taken.
        normalize_weight: Whether filters are divided by their norm (`ŵ`), or taken as they are.
        scale: Divides the transform (the first paper's per-layer divisor).
        stride: As in `torch.nn.functional.conv2d`.
        padding: Number, one per dimension, `"same"` or `"valid"`.
        dilation: As in `torch.nn.functional.conv2d`.
        groups: As in `torch.nn.functional.conv2d`.
        padding_mode: What stands beyond the border, for the convolution and for the patch norm.

    Returns:
        (N, out_channels, *out) or (out_channels, *out).

    Raises:
        ValueError: If `b`, `max_out` or `scale` is out of its range, or shapes, padding or padding mode do not fit.
    """
    _check_arguments(b, max_out, scale)
    if weight.ndim not in _CONVOLUTIONS:
        raise ValueError(f"`weight` has {weight.ndim} axes, a 1-d, 2-d or 3-d convolution needs 3, 4 or 5")
    if x.ndim not in (weight.ndim, weight.ndim - 1):
        raise ValueError(f"`x` has shape {tuple(x.shape)}, a {weight.ndim - 2}-d convolution needs {weight.ndim} axes")
    if x.ndim == weight.ndim - 1:
        options: dict[str, Any] = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        }
        factors: dict[str, Any] = {
            "b": b,
            "max_out": max_out,
            "normalize_weight": normalize_weight,
            "scale": scale,
        }
        return bcos_conv(x[None], weight, bias, **factors, **options, padding_mode=padding_mode)[0]
    outputs, left = divmod(len(weight), max_out)
    if groups > 0 and len(weight) % groups == 0 and not left and outputs % groups:  # which torch does not know
        raise ValueError(f"`groups` (={groups}) must divide the {outputs} outputs of {max_out} rows of `weight` each")
    dims, kernel = weight.ndim - 2, weight.shape[2:]
    x, rest = _pad(x, kernel, stride, padding, dilation, padding_mode)
    strides, steps = _per_dimension(stride, dims, "stride"), _per_dimension(dilation, dims, "dilation")
    way = _passes.way(x, weight)
    filters, later = _filters(weight, normalize_weight, b, max_out, way)
    energy = None
    if way == "derivatives" and not _is_linear(b):
        y, energy = _passes.convolved(x, filters, strides, rest, steps, groups)
    else:
        y = _CONVOLUTIONS[weight.ndim](x, filters, None, strides, rest, steps, groups)
    shape = (-1, *[1] * dims)
    y = _max_out(y, max_out, 1)
    _check_fit("bias", bias, y.shape[1:2])
    _check_fit("b", b, y.shape[1:2])
    if not _is_linear(b):
        with _precisely(x):
            if energy is None:
                values = freeze(in_single_precision(x))
                energy = _energy(values, groups) if way is None else _passes.energy(values, groups)
            reciprocal = torch.rsqrt(_sums_over_windows(energy, kernel, strides, rest, steps, way) + _PATCH_EPS)
        y = _scaled(y, reciprocal, b.reshape(shape) if isinstance(b, Tensor) and b.ndim else b, 1, way, later)
    return _finish(y, None if bias is None else bias.reshape(shape), scale)


def bcos_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    b: float | Tensor = 2.0,
    normalize_weight: bool = True,
    scale: float = 1.0,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The B-cos transform of what each output of a transposed convolution reads, in one, two or three dimensions.

    `y |cos|^(b-1) / scale` with `y` the transposed convolution, and `|cos| = |y| / sqrt(Σ x² + 1e-6)` over the entries
    that the kernel lays on the output. In `explanation_mode` the power of the cosine is a constant.

    Args:
        x: (N, in_channels, *spatial) or (in_channels, *spatial), floating point.
        weight: (in_channels, out_channels / groups, *kernel); its rank sets the number of dimensions.
        bias: (out_channels,), added at the end.
        b: Exponent of at least 1, or a tensor that broadcasts to (out_channels,); 1 is the transposed convolution.
        normalize_weight: Whether the filter of each output channel is divided by its norm, or taken as it is.
        scale: Divides the transform.
        stride: As in `torch.nn.functional.conv_transpose2d`.
        padding: As in `torch.nn.functional.conv_transpose2d`.
        output_padding: As in `torch.nn.functional.conv_transpose2d`.
        groups: As in `torch.nn.functional.conv_transpose2d`.
        dilation: As in `torch.nn.functional.conv_transpose2d`.

    Returns:
        (N, out_channels, *out) or (out_channels, *out).

    Raises:
        ValueError: If `b` or `scale` is out of its range, or shapes do not fit.
    """
    _check_arguments(b, 1, scale)
    if weight.ndim not in _TRANSPOSED:
        raise ValueError(f"`weight` has {weight.ndim} axes, a 1-d, 2-d or 3-d convolution needs 3, 4 or 5")
    if x.ndim not in (weight.ndim, weight.ndim - 1):
        raise ValueError(f"`x` has shape {tuple(x.shape)}, a {weight.ndim - 2}-d convolution needs {weight.ndim} axes")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"`groups` (={groups}) must divide the {weight.shape[0]} rows of `weight`")
    run, dims, single = _TRANSPOSED[weight.ndim], weight.ndim - 2, x.ndim == weight.ndim - 1
    x = x[None] if single else x
    shape = (-1, *[1] * dims)
    y = run(x, weight, None, stride, padding, output_padding, groups, dilation)
    _check_fit("bias", bias, y.shape[1:2])
    _check_fit("b", b, y.shape[1:2])
    if normalize_weight:
        filters = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)  # (out_channels, in / groups, …)
        y = y * _passes.inverse_norm(in_single_precision(filters)).reshape(shape).to(y.dtype)
    if not _is_linear(b):
        with _precisely(x):
            energy = _energy(freeze(in_single_precision(x)), groups)
            ones = energy.new_ones((groups, 1, *weight.shape[2:]))
            sums = run(energy, ones, None, stride, padding, output_padding, groups, dilation)
            reciprocal = torch.rsqrt(sums + _PATCH_EPS)
        y = _scaled(y, reciprocal, b.reshape(shape) if isinstance(b, Tensor) and b.ndim else b, 1, None, None)
    y = _finish(y, None if bias is None else bias.reshape(shape), scale)
    return y[0] if single else y


def patch_norm(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    eps: float = _PATCH_EPS,
) -> Tensor:
    """The norm `sqrt(Σ x² + eps)` of every patch that a convolution reads, over the channels of each group.

    Args:
        x: (N, channels, *spatial), with one to three spatial axes.
        kernel_size: One number, or one per dimension.
        stride: As of the convolution.
        padding: As of the convolution.
        dilation: As of the convolution.
        groups: As of the convolution.
        padding_mode: As of the convolution.
        eps: Added inside the root; 1e-6 as in the authors' layers.

    Returns:
        (N, groups, *out).

    Raises:
        TypeError: If `x` is not of floating dtype.
        ValueError: If shapes, padding or padding mode do not fit.
    """
    check_floating(x)
    dims = x.ndim - 2
    if dims not in (1, 2, 3):
        raise ValueError(f"`x` has shape {tuple(x.shape)}, must have a batch, a channel and 1 to 3 spatial axes")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"`groups` (={groups}) must divide the {x.shape[1]} channels of `x`")
    kernel = _per_dimension(kernel_size, dims, "kernel_size")
    strides, steps = _per_dimension(stride, dims, "stride"), _per_dimension(dilation, dims, "dilation")
    for name, numbers in (("kernel_size", kernel), ("stride", strides), ("dilation", steps)):
        if min(numbers) < 1:  # of a convolution torch checks it
            raise ValueError(f"`{name}` (={numbers}) must be at least 1")
    x, rest = _pad(x, kernel, stride, padding, dilation, padding_mode)
    energy = _energy(in_single_precision(x), groups)  # squares overflow in half precision
    return torch.sqrt(_sums_over_windows(energy, kernel, strides, rest, steps) + eps).to(x.dtype)


def max_out(y: Tensor, units: int, dim: int) -> Tensor:
    """MaxOut: of each `units` consecutive entries along an axis the largest.

    The gradient goes to the one entry that was chosen.

    Args:
        y: (…, channels · units, …).
        units: Entries that compete for one output; 1 changes nothing.
        dim: The axis.

    Returns:
        (…, channels, …).

    Raises:
        ValueError: If `units` is below 1 or does not divide the axis, or there is no such axis.
    """
    if units < 1:
        raise ValueError(f"`units` (={units}) must be at least 1")
    if not -y.ndim <= dim < y.ndim:
        raise ValueError(f"`dim` (={dim}) is no axis of `y` of shape {tuple(y.shape)}")
    if units == 1:
        return y
    axis = dim % y.ndim
    if y.shape[axis] % units:
        raise ValueError(f"`units` or `max_out` (={units}) must divide the {y.shape[axis]} rows, or values along `dim`")
    if _passes.is_eager(y):
        return _passes.max_out(y, units, axis)
    return y.unflatten(axis, (-1, units)).max(axis + 1).values


_max_out = max_out  # the name is also an argument of the transforms


def unit_norm(weight: Tensor) -> Tensor:
    """Rows of unit norm: `w / ‖w‖₂` over all axes but the first; a row of zeros stays 0, with gradient 0.

    Args:
        weight: (rows, …).

    Returns:
        The rows divided by their norms, shaped like `weight`.
    """
    values = in_single_precision(weight)
    norm = torch.linalg.vector_norm(values, dim=tuple(range(1, weight.ndim)), keepdim=True)
    zero = norm < torch.finfo(norm.dtype).tiny  # what is below has no finite reciprocal
    return torch.where(zero, 0.0, values / torch.where(zero, 1.0, norm)).to(weight.dtype)


def _filters(
    weight: Tensor, normalize_weight: bool, b: float | Tensor, max_out: int, way: _passes.Way
) -> tuple[Tensor, Tensor | None]:
    """The filters to compute with, and those by whose norms the responses are to be divided later.

    Filters may be many times larger than their responses: to divide responses by their norms needs one pass over them,
    to divide them needs three. Explanations have filters of unit norm all the same, as the authors' have: in single
    precision W(x) is then rounded as theirs is.
    """
    if not normalize_weight:
        return weight, None
    if way == "derivatives" and max_out == 1 and _is_squared(b):
        return weight, weight
    if way is None:
        return unit_norm(weight), None
    return _passes.unit(weight.detach() if way == "constants" else weight), None


def _energy(x: Tensor, groups: int) -> Tensor:
    squares = x.square()
    return squares.sum(1, keepdim=True) if groups == 1 else squares.unflatten(1, (groups, -1)).sum(2)


def _sums_over_windows(
    energy: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    widths: Sequence[int],
    steps: Sequence[int],
    way: _passes.Way = None,
) -> Tensor:
    """Sums over the windows of a convolution."""
    eagerly = way is not None and (energy.shape[1] > 1 or energy.numel() <= _SMALL_MAP)
    if math.prod(kernel) > 1 and (eagerly or _passes.is_traced()):
        # One operation, where several would cost more than what they compute, or pass over many channels.
        groups = energy.shape[1]
        ones = energy.new_ones((groups, 1, *kernel))
        return _CONVOLUTIONS[energy.ndim](energy, ones, None, strides, widths, steps, groups)
    if any(widths):
        energy = F.pad(energy, [width for width in reversed(widths) for _ in range(2)])
    for axis, size, step, jump in zip(range(2, energy.ndim), kernel, steps, strides, strict=True):
        energy = _window_sums(energy, axis, size, step, jump)
    return energy


def _window_sums(x: Tensor, axis: int, size: int, dilation: int, stride: int) -> Tensor:
    """Sums over windows along one axis, by shifted slices: a box filter is separable, and has no weights to read."""
    span = dilation * (size - 1) + 1
    if x.shape[axis] < span:
        raise ValueError(f"`x` padded to {x.shape[axis]} along axis {axis} is smaller than the kernel's span {span}")
    stop = x.shape[axis] - span + 1
    index = (slice(None),) * axis
    total = x[(*index, slice(0, stop, stride))]
    for offset in range(dilation, span, dilation):
        total = total + x[(*index, slice(offset, offset + stop, stride))]
    return total


def _check_arguments(b: float | Tensor, max_out: int, scale: float) -> None:
    # A learnable exponent is not looked at, which would stop asynchronous devices in every layer.
    if not isinstance(b, Tensor) and not 1 <= b < math.inf:
        raise ValueError(f"`b` (={b}) must be a finite exponent of at least 1")
    if max_out < 1:
        raise ValueError(f"`max_out` (={max_out}) must be at least 1")
    if not 0 < scale < math.inf:
        raise ValueError(f"`scale` (={scale}) must be a finite divisor above 0")


def _check_fit(name: str, value: float | Tensor | None, shape: Sequence[int]) -> None:
    """Refuse what would broadcast the output to another shape."""
    if not isinstance(value, Tensor) or not value.ndim:
        return
    sizes = shape[len(shape) - value.ndim :]
    if value.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in zip(value.shape, sizes, strict=True)):
        raise ValueError(f"`{name}` of shape {tuple(value.shape)} does not fit an output of {tuple(shape)}")


def _is_linear(b: float | Tensor) -> bool:
    return not isinstance(b, Tensor) and b == 1


def _precisely(x: Tensor) -> AbstractContextManager[object]:
    """Norms are sums of squares: autocast must not compute them in half precision."""
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _is_squared(b: float | Tensor) -> bool:
    return not isinstance(b, Tensor) and b == 2


def _cosine_power(y: Tensor, reciprocal: Tensor, b: float | Tensor) -> Tensor:
    """`|y · reciprocal|^(b-1)`, in the precision of `y`."""
    cosine = y.abs() * reciprocal
    if not _is_squared(b):
        # Not `pow`, whose derivative is a second power: compiled, a training step would take twice the time.
        cosine = torch.exp((b - 1) * torch.log(cosine + _COSINE_EPS))
    return cosine.to(y.dtype)


def _scaled(
    y: Tensor, reciprocal: Tensor, b: float | Tensor, axis: int, way: _passes.Way, weight: Tensor | None
) -> Tensor:
    """`y · |y · reciprocal|^(b-1)`, in the precision of `y`; what belongs to a group serves its output channels.

    With a `weight` by whose norms `y` is first divided.
    """
    if way is not None and _is_squared(b):
        if way == "constants":
            return y * _passes.cosine_of(y, reciprocal, axis)
        return _passes.scaled(y, reciprocal, weight, axis)
    groups = reciprocal.shape[axis]
    if groups in (1, y.shape[axis]):
        return y * _cosine_power(freeze(y), reciprocal, b)
    if isinstance(b, Tensor) and b.ndim:
        b = b.expand(y.shape[1], *b.shape[1:]).unflatten(0, (groups, -1))
    grouped = y.unflatten(1, (groups, -1))
    return (grouped * _cosine_power(freeze(grouped), reciprocal.unsqueeze(2), b)).flatten(1, 2)


def _finish(y: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    y = y if scale == 1 else y / scale
    return y if bias is None else y + bias.to(y.dtype)


def _per_dimension(value: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    if len(value) == 1:
        return (value[0],) * dims
    if len(value) != dims:
        raise ValueError(f"`{name}` (={tuple(value)}) must have one number or {dims}, one per spatial axis")
    return tuple(value)


def _pad(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    padding_mode: PaddingMode,
) -> tuple[Tensor, tuple[int, ...]]:
    """Apply the padding that a convolution cannot: the padded tensor, and the zero padding left to be done."""
    dims = x.ndim - 2
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"`padding_mode` (={padding_mode!r}) must be one of {', '.join(_PADDING_MODES)}")
    sides = _padding_sides(kernel_size, stride, padding, dilation, dims)
    if padding_mode == "zeros" and all(left == right for left, right in sides):
        return x, tuple(left for left, _ in sides)
    widths = [width for pair in reversed(sides) for width in pair]
    if not any(widths):
        return x, (0,) * dims
    padded = F.pad(x, widths) if padding_mode == "zeros" else F.pad(x, widths, mode=padding_mode)
    return padded, (0,) * dims


def _padding_sides(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    dims: int,
) -> list[tuple[int, int]]:
    """How much is padded before and after each spatial axis."""
    if isinstance(padding, str):
        if padding == "valid":
            return [(0, 0)] * dims
        if padding != "same":
            raise ValueError(f'`padding` (={padding!r}) must be numbers, "same" or "valid"')
        if any(step != 1 for step in _per_dimension(stride, dims, "stride")):
            raise ValueError(f'`padding="same"` needs `stride` 1, got {stride}')
        kernel, steps = (
            _per_dimension(kernel_size, dims, "kernel_size"),
            _per_dimension(dilation, dims, "dilation"),
        )
        totals = [step * (size - 1) for size, step in zip(kernel, steps, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    widths = _per_dimension(padding, dims, "padding")
    if min(widths) < 0:
        raise ValueError(f"`padding` (={padding}) must be at least 0")
    return [(width, width) for width in widths]
