"""Numpy arrays and PIL images out of weights and contributions."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

Array: TypeAlias = torch.Tensor | npt.NDArray[Any]
Picture: TypeAlias = npt.NDArray[np.float32]

_EPSILON = 1e-12
"""Both the guard of the divisions and the strength of pixels that speak against the class."""

_RANGE_TOLERANCE = 1e-5
"""How far colours may leave [0, 1] by rounding, as after an antialiased resize."""

_LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in grey (ITU-R BT.601, as in Pillow's mode "L")."""

_RAMP = np.arange(256)[:, None] / 255
_BLUE_WHITE_RED = np.minimum(1, np.hstack([2 * _RAMP, 2 * np.minimum(_RAMP, 1 - _RAMP), 2 - 2 * _RAMP]))
"""The 256 colours of matplotlib's "bwr"; none is pure white: the two in the middle are 1/255 away from it."""


def color_picture(
    weights: Array,
    contributions: Array | None = None,
    x: Array | None = None,
    *,
    smooth: int = 15,
    percentile: float = 99.5,
    rgb: tuple[int, int, int] | None = None,
) -> Picture:
    """Shows in which colours an image speaks for a class: RGBA of the weights (Böhle et al., 2022).

    With `W` the weights of a pixel and `k` its contribution:

    - `U = max(0, W / (max |W| + 1e-12))`, and colour `j` is `U[j] / (U[j] + U[j + C] + 1e-12)`;
    - strength `a = ||W||_2`, but 1e-12 where `k < 0`, then averaged over `smooth` x `smooth` pixels (zeros
      beyond the border count);
    - opacity `min(1, a / P)` with `P` the percentile of `a` over the image, and 0 where `a` is 0.

    Maximum and norm run over all 2C channels, whichever are shown. The opacity is relative to the image: also
    one whose contributions are all negative has opaque pixels.

    Args:
        weights: `(..., 2C, H, W)`.
        contributions: `(..., H, W)`; either these or `x` must be given.
        x: The encoded input `(..., 2C, H, W)`, for `contributions = sum(weights * x)` over the channels.
        smooth: Width of the mean filter, odd; 0 or 1 for none.
        percentile: Percentile in [0, 100] of the strength that becomes opaque, interpolated linearly.
        rgb: Which of the C channels are shown as red, green and blue. By default (0, 1, 2) if C = 3 and
            (0, 0, 0), which is grey, if C = 1; any other C has no colours of its own.

    Returns:
        `(..., H, W, 4)`: red, green, blue and opacity, not premultiplied.

    Raises:
        ValueError: If an array is empty, not real or not finite, if the shapes do not fit, if not exactly one
            of `contributions` and `x` is given, if `smooth` or `percentile` is out of range, or if `rgb` is
            missing or names channels that are not there.
    """
    weights = as_tensor("weights", weights)
    shape = tuple(weights.shape)
    if len(shape) < 3 or shape[-3] % 2:
        raise ValueError(f"`weights` (shape {shape}) must be (..., 2C, H, W), an even number of channels")
    channels = _shown_channels(shape[-3] // 2, rgb)
    if x is None and contributions is not None:
        contributions = as_tensor("contributions", contributions).to(weights.device)
        require_shape("contributions", contributions, shape[:-3] + shape[-2:], "one per pixel of `weights`")
    elif x is not None and contributions is None:
        x = as_tensor("x", x).to(weights.device)
        require_shape("x", x, shape, "as `weights`")
        contributions = (weights * x).sum(dim=-3)
    else:
        raise ValueError("either `contributions` or `x` must be given, and not both")

    scale = weights.abs().amax(dim=-3, keepdim=True) + _EPSILON
    direction = weights / scale
    present, absent = direction.clamp(min=0).chunk(2, dim=-3)
    colors = (present / (present + absent + _EPSILON))[..., channels, :, :]
    # Equal to the norm of the weights, but their squares neither overflow nor vanish.
    strength = scale.squeeze(-3) * torch.linalg.vector_norm(direction, dim=-3)
    strength = mean_filter(strength.masked_fill(contributions < 0, _EPSILON), smooth)
    opacity = (strength / percentile_of(strength, percentile)).clamp(0, 1).masked_fill(strength == 0, 0)
    return _as_picture(torch.cat([colors, opacity.unsqueeze(-3)], dim=-3).movedim(-3, -1))


def contribution_map(
    contributions: Array, *, percentile: float = 99.5, limit: float | None = None, smooth: int = 0
) -> Picture:
    """Shows where an image speaks for a class (red), against it (blue), or not at all (white).

    The map is clipped to plus and minus the `percentile` of its absolute values, then drawn from `-limit` to
    `+limit` in the 256 colours of matplotlib's "bwr". A map that is 0 everywhere once clipped is white.

    Args:
        contributions: `(..., H, W)`.
        percentile: Percentile in [0, 100], interpolated linearly; 100 clips nothing.
        limit: Contribution that is drawn in full colour, for maps that are to be compared; these also need
            `percentile=100`, as each map is clipped at its own. By default the largest absolute value that is
            left of each map.
        smooth: Width of the mean filter that is applied first, odd; 0 or 1 for none.

    Returns:
        `(..., H, W, 3)`: red, green and blue.

    Raises:
        ValueError: If `contributions` are empty, not real, not finite or no images, or if `percentile`,
            `limit` or `smooth` is out of range.
    """
    values = as_tensor("contributions", contributions)
    if values.ndim < 2:
        raise ValueError(f"`contributions` (shape {tuple(values.shape)}) must be (..., H, W)")
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"`limit` (={limit}) must be positive and finite")
    values = mean_filter(values, smooth)
    cut = percentile_of(values.abs(), percentile)
    values = values.clamp(-cut, cut)
    blank = (values == 0).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    bound = cut if limit is None else torch.full_like(cut, limit)
    # The order of matplotlib's operations, so that no value changes its level by rounding.
    level = (values + bound) / (2 * bound.masked_fill(blank, 1)) * 256
    colors = torch.from_numpy(_BLUE_WHITE_RED).to(level.device, level.dtype)[level.long().clamp(0, 255)]
    return _as_picture(colors.masked_fill(blank.unsqueeze(-1), 1))


def overlay(
    image: Array | Image.Image, picture: Array | Image.Image, *, opacity: float = 0.7, grey: bool = False
) -> Picture:
    """Lays a picture over an image: `(1 - a) * image + a * picture`, `a` as in `opacity`.

    Args:
        image: `(..., H, W, 3)`.
        picture: `(..., H, W, 4)` from `color_picture` or `(..., H, W, 3)` from `contribution_map`.
        opacity: Share `a` of the picture, in [0, 1]; an RGBA picture has its own opacity multiplied by it.
        grey: Whether to take the colours out of the image first.

    Returns:
        `(..., H, W, 3)`: red, green and blue.

    Raises:
        ValueError: If `image` or `picture` is no picture in [0, 1] (or uint8), if their sizes differ, or if
            `opacity` is out of range.
    """
    below = as_colors("image", image, (3,))
    above = as_colors("picture", picture, (3, 4))
    if below.shape[:-1] != above.shape[:-1]:
        sizes = f"`image` (shape {tuple(below.shape)}) and `picture` (shape {tuple(above.shape)})"
        raise ValueError(f"{sizes} must have the same size")
    if not 0 <= opacity <= 1:
        raise ValueError(f"`opacity` (={opacity}) must be in [0, 1]")
    if grey:
        below = (below @ torch.tensor(_LUMINANCE)).unsqueeze(-1)
    share = above[..., 3:] * opacity if above.shape[-1] == 4 else opacity
    return _as_picture((1 - share) * below + share * above[..., :3])


def photograph(x: torch.Tensor) -> Picture:
    """The image of an encoded or normalised input (C, H, W), as RGB (H, W, 3)."""
    rgb = x[:3] if len(x) in (3, 6) else x[:1].expand(3, *x.shape[1:])
    low, high = rgb.aminmax()
    if low < 0 or high > 1:
        rgb = (rgb - low) / (high - low if high > low else 1)
    return _as_picture(rgb.movedim(0, -1))


def on_white(rgba: Array | Image.Image) -> Picture:
    """Lays an RGBA picture `(..., H, W, 4)` on white: `1 - a + a * rgb`, of shape `(..., H, W, 3)`.

    Raises:
        ValueError: If `rgba` is no RGBA picture in [0, 1] (or uint8).
    """
    above = as_colors("rgba", rgba, (4,))
    return _as_picture(1 - above[..., 3:] + above[..., 3:] * above[..., :3])


def to_pil(array: Array) -> Image.Image:
    """Turns one picture `(H, W, 3 or 4)` into an RGB or RGBA image, rounded to the nearest of 256 levels.

    Raises:
        ValueError: If `array` is not one RGB or RGBA picture in [0, 1] (or uint8).
    """
    colors = as_colors("array", array, (3, 4))
    require_single("array", colors)
    return Image.fromarray((colors * 255).round().to(torch.uint8).numpy())


def as_tensor(name: str, value: Array) -> torch.Tensor:
    """Detached real floating-point tensor of finite numbers, in no less than single precision."""
    if not isinstance(value, torch.Tensor):
        # A copy, as torch warns of read-only arrays and refuses negative strides.
        value = torch.from_numpy(np.array(value, dtype=np.result_type(value, np.float32), order="C"))
    if value.is_complex() or value.numel() == 0:
        raise ValueError(f"`{name}` (shape {tuple(value.shape)}, {value.dtype}) must be real and not empty")
    value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    if not value.isfinite().all():
        raise ValueError(f"`{name}` must be finite, but holds NaN or infinity")
    return value


def as_colors(name: str, value: Array | Image.Image, channels: tuple[int, ...]) -> torch.Tensor:
    """Picture (..., H, W, channels) in [0, 1], on the CPU, of an array or a PIL image."""
    if isinstance(value, Image.Image):
        if value.mode[0] in "IF":  # of more than 8 bits, which Pillow would cut off
            raise ValueError(f"`{name}` (of mode {value.mode!r}) must have 8 bits: `bcoskit.data.read_image` scales it")
        rgba = np.asarray(value.convert("RGBA"))
        value = rgba if 4 in channels else on_white(rgba)
    colors = as_tensor(name, value).to("cpu", torch.float32)
    if colors.ndim < 3 or colors.shape[-1] not in channels:
        wanted = f"(..., H, W, {' or '.join(map(str, channels))})"
        raise ValueError(f"`{name}` (shape {tuple(colors.shape)}) must be {wanted}, with the colours last")
    if value.dtype in (torch.uint8, np.uint8):
        return colors / 255
    low, high = colors.aminmax()
    if low < -_RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
        raise ValueError(f"`{name}` (from {low:g} to {high:g}) must be in [0, 1], or of type uint8")
    return colors.clamp(0, 1)


def _as_picture(values: torch.Tensor) -> Picture:
    return values.to("cpu", torch.float32).numpy()


def require_shape(name: str, value: torch.Tensor, shape: Sequence[int], reason: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"`{name}` (shape {tuple(value.shape)}) must be {tuple(shape)}, {reason}")


def require_single(name: str, colors: torch.Tensor) -> None:
    if colors.ndim != 3:
        raise ValueError(f"`{name}` (shape {tuple(colors.shape)}) must be one picture, not a batch")


def _shown_channels(count: int, rgb: tuple[int, int, int] | None) -> list[int]:
    """Indices of the channels, among `count`, that are shown as red, green and blue."""
    if rgb is not None:
        if len(rgb) != 3 or not all(0 <= channel < count for channel in rgb):
            raise ValueError(f"`rgb` (={rgb}) must name three channels from 0 to {count - 1}")
        return list(rgb)
    if count not in (1, 3):
        raise ValueError(
            f"`weights` with {2 * count} channels have no colours (only 2 and 6 have):"
            " choose channels with `rgb`, or draw a `contribution_map`"
        )
    return [0, 0, 0] if count == 1 else [0, 1, 2]


def usual_smooth(side: int) -> int:
    """The width of the mean filter for pictures of images of a side: 1/30 of it, odd."""
    return max(1, round(side / 30)) | 1


def usual_picture(weights: torch.Tensor, contributions: torch.Tensor) -> Picture:
    """One explanation: the colours of weights (C, H, W) of an encoded image, else the map of its contributions.

    Args:
        weights: A row of `W(x)`.
        contributions: `W(x)·x` (H, W).
    """
    if weights.shape[0] not in (2, 6):
        return contribution_map(contributions)
    return color_picture(weights, contributions, smooth=usual_smooth(weights.shape[-1]))


def mean_filter(values: torch.Tensor, smooth: int) -> torch.Tensor:
    """Mean over `smooth` x `smooth` pixels (..., H, W), zeros beyond the border counted."""
    if smooth < 0 or (smooth > 0 and smooth % 2 == 0):
        raise ValueError(f"`smooth` (={smooth}) must be 0, or odd and positive to keep the size")
    if smooth == 0:
        return values
    images = values.reshape(-1, *values.shape[-2:])
    return F.avg_pool2d(images, smooth, stride=1, padding=smooth // 2).reshape(values.shape)


def percentile_of(values: torch.Tensor, percentile: float) -> torch.Tensor:
    """Percentile of each image (..., H, W), interpolated linearly, as (..., 1, 1)."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"`percentile` (={percentile}) must be in [0, 100]")
    # Older torch.quantile ends at 2**24 elements, and kthvalue is not deterministic on CUDA.
    ordered = values.flatten(-2).sort(dim=-1).values
    position = percentile / 100 * (ordered.shape[-1] - 1)
    below, above = ordered[..., math.floor(position)], ordered[..., math.ceil(position)]
    return torch.lerp(below, above, position % 1)[..., None, None]
