"""The input encoding of B-cos networks: each channel together with its complement."""

import torch
from torch import Tensor

_TOLERANCE = 1e-6  # a few float32 roundings of an interpolation or of a division by 255


def encode(x: Tensor) -> Tensor:
    """Appends the complement of every channel: `[x, 1 - x]`.

    Each pair of channels sums to 1, so that dark and bright pixels carry the same amount of signal and the
    colour of a pixel is determined by the direction of the encoded vector alone.

    Args:
        x: Image `(C, H, W)` or images `(N, C, H, W)` of floating dtype with values in [0, 1].

    Returns:
        The encoded images `(2C, H, W)` or `(N, 2C, H, W)`, differentiable with respect to `x`.

    Raises:
        TypeError: If `x` is not of floating dtype.
        ValueError: If `x` has another number of dimensions, NaN, or values outside [0, 1] by more than 1e-6.
    """
    if not x.is_floating_point():
        raise TypeError(f"`x` has dtype {x.dtype}: convert it to float and divide by 255 for values in [0, 1]")
    _check_dimensions(x)
    if x.numel():
        low, high = (bound.item() for bound in x.detach().aminmax())
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # so written, NaN fails as well
            raise ValueError(f"`x` must have values in [0, 1], got values from {low:.6g} to {high:.6g}")
    return torch.cat([x, 1 - x], dim=-3)


def decode(x: Tensor) -> Tensor:
    """Takes the image out of its encoding: the first half of the channels, as a view.

    Args:
        x: Encoded image `(2C, H, W)` or images `(N, 2C, H, W)`.

    Returns:
        The images `(C, H, W)` or `(N, C, H, W)`.

    Raises:
        ValueError: If `x` has another number of dimensions, or no even number of channels.
    """
    _check_dimensions(x)
    channels = x.shape[-3]
    if channels == 0 or channels % 2:
        raise ValueError(f"`x` must have an even number of channels, got {channels}: is it encoded?")
    return x.narrow(-3, 0, channels // 2)


def _check_dimensions(x: Tensor) -> None:
    if x.ndim not in (3, 4):
        raise ValueError(f"`x` must have shape (C, H, W) or (N, C, H, W), got {tuple(x.shape)}")
