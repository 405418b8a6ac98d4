"""From a picture to the tensor that a network sees."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from bcoskit.data._encoding import encode
from bcoskit.data._images import MAX_PIXELS, ImageError, ImageSource, pixels, read_image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageTransform:
    """The test-time transform of a network, as plain values: resize, centre crop, float, encode.

    `ImageTransform(**dataclasses.asdict(transform))` is an equal transform, also after a way through JSON.

    Attributes:
        size: Side of the square that the network sees, in pixels.
        resize: Length in pixels to which the shorter side is resized before the centre crop; `size` if None.
        interpolation: Filter of the resizing, with antialiasing.
        channels: 3 for colour, 1 for grey.
        encoding: `"bcos"` for `[x, 1 - x]`, `"normalized"` for an ordinary network's `(x - mean) / std`.
        mean: One value per channel; used by `"normalized"` only.
        std: One value per channel; used by `"normalized"` only.

    Raises:
        ValueError: If a value is out of range, or `mean` and `std` do not fit `channels`.
    """

    size: int
    resize: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: Literal[1, 3] = 3
    encoding: Literal["bcos", "normalized"] = "bcos"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))  # JSON has lists only
        object.__setattr__(self, "std", tuple(self.std))
        for name in ("size", "resize", "channels"):
            value = getattr(self, name)
            if type(value) is not int and not (name == "resize" and value is None):
                raise ValueError(f"`{name}` (={value!r}) must be an integer")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
                raise ValueError(f"`{name}` (={values!r}) must be finite numbers")
        if self.size < 1:
            raise ValueError(f"`size` (={self.size}) must be positive")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"`resize` (={self.resize}) must be at least `size` (={self.size})")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"`interpolation` (={self.interpolation!r}) must be 'bilinear' or 'bicubic'")
        if self.channels not in (1, 3):
            raise ValueError(f"`channels` (={self.channels}) must be 1 or 3")
        if self.encoding not in ("bcos", "normalized"):
            raise ValueError(f"`encoding` (={self.encoding!r}) must be 'bcos' or 'normalized'")
        if self.encoding == "normalized":
            if not len(self.mean) == len(self.std) == self.channels:
                raise ValueError(
                    f"`mean` (={self.mean}) and `std` (={self.std}) must have "
                    f"as many values as `channels` (={self.channels})"
                )
            if min(self.std) <= 0:
                raise ValueError(f"`std` (={self.std}) must be positive")

    def __call__(self, image: ImageSource) -> Tensor:
        """Transforms an image, or anything that `read_image` reads.

        Returns:
            Float32 tensor `(2 * channels, size, size)` with values in [0, 1], or for `"normalized"`
            `(channels, size, size)`.

        Raises:
            ImageError: As `view`.
        """
        return self.encode_pixels(pixels(self.view(image)))

    def encode_pixels(self, values: Tensor) -> Tensor:
        """The last step alone, for pixels that already have the right size.

        Args:
            values: uint8 RGB `(3, H, W)` or `(N, 3, H, W)`.

        Returns:
            Float32 tensor `(..., 2 * channels, H, W)`, or for `"normalized"` `(..., channels, H, W)`.

        Raises:
            TypeError: If `values` are not uint8.
            ValueError: If they are not RGB.
        """
        if not isinstance(values, Tensor) or values.dtype != torch.uint8:
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise TypeError(f"`values` must be a tensor of uint8 pixels, got {kind}")
        if values.ndim < 3 or values.shape[-3] != 3:
            raise ValueError(f"`values` has shape {tuple(values.shape)}, must be RGB pixels (..., 3, H, W)")
        if self.channels == 1:
            values = _grey(values)
        x = values.to(torch.float32) / 255
        if self.encoding == "bcos":
            return encode(x)
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std

    def view(self, image: ImageSource) -> Image.Image:
        """The pixels that the network sees, for pictures: resized and cropped, mode `"RGB"` also if grey.

        Raises:
            ImageError: If `image` cannot be read, or is so elongated that it would be huge when resized.
        """
        rgb = read_image(image)
        if self.channels == 1:
            rgb = rgb.convert("L").convert("RGB")
        shorter = self.size if self.resize is None else self.resize
        longer = int(shorter * max(rgb.size) / min(rgb.size))
        if shorter * longer > MAX_PIXELS:
            raise ImageError(
                f"an image of {rgb.width}x{rgb.height} pixels is too elongated: "
                f"with a shorter side of {shorter} it would have more than {MAX_PIXELS} pixels"
            )
        width, height = (shorter, longer) if rgb.width <= rgb.height else (longer, shorter)
        rgb = rgb.resize((width, height), Image.Resampling[self.interpolation.upper()])
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return rgb.crop((left, top, left + self.size, top + self.size))


def _grey(values: Tensor) -> Tensor:
    """Luma (..., 1, H, W) of RGB pixels, rounded as Pillow's mode `"L"` does (ITU-R BT.601)."""
    red, green, blue = values.to(torch.int32).split(1, -3)
    return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)
