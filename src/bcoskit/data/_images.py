"""Images from anywhere as upright 8-bit RGB."""

import io
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, BinaryIO, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image

MAX_PIXELS = 100_000_000

# Plain pixels only: others that Pillow opens start an interpreter (EPS) or hold images in images (ICO).
FORMATS: dict[str, tuple[str, ...]] = {
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}

_ORIENTATION_TAG = 0x0112
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INTEGER_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_COLOUR_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


class ImageError(ValueError):
    """An image, or a collection of images, that cannot be read; the message names it and the reason."""


@runtime_checkable
class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def read_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image as upright 8-bit RGB, without metadata.

    - The EXIF orientation is applied; of several frames the first is taken (of a Pillow image the current).
    - Grey, 1-bit, palette, CMYK, YCbCr, LAB and HSV become RGB; transparent pixels are laid on white.
    - Grey of more than 8 bits is scaled from [0, 65535], floating grey from [0, 1], to [0, 255].

    Args:
        source: Path, encoded bytes, binary file (read from its position to its end, and left open), or Pillow
            image (left as it is).
        max_pixels: Largest number of pixels that is decoded, judged by the header.

    Returns:
        A new image of mode `"RGB"`; no file stays open.

    Raises:
        ImageError: If `source` is missing, empty, no image of a known format, truncated, damaged, larger than
            `max_pixels`, or of a pixel format that has no defined 8-bit RGB values.
        TypeError: If `source` is of another type.
        ValueError: If `max_pixels` is not positive.
    """
    if max_pixels < 1:
        raise ValueError(f"`max_pixels` (={max_pixels}) must be positive")
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _upright_rgb(source, max_pixels)
        with _stream(source) as stream:
            return _upright_rgb(_identify(stream), max_pixels)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # decoders answer damaged data with nearly every kind of exception
        if isinstance(error, OSError) and error.strerror is not None:
            reason = error.strerror
        else:
            reason = f"damaged or truncated image ({' '.join(str(error).split()) or type(error).__name__})"
        raise ImageError(f"{name}: {reason}") from error


def pixels(image: Image.Image) -> Tensor:
    """The pixels of an RGB image as a contiguous uint8 tensor `(3, H, W)`."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _name(source: ImageSource) -> str:
    match source:
        case str() | os.PathLike():
            return os.fspath(source)
        case bytes():
            return f"<{len(source)} bytes>"
        case Image.Image():
            return f"<{source.mode} image of {source.width}x{source.height} pixels>"
        case _Readable():
            return str(getattr(source, "name", "<stream>"))
        case _:
            raise TypeError(
                f"`source` must be a path, bytes, a binary file or a PIL image, got {type(source).__name__}"
            )


def _stream(source: str | os.PathLike[str] | bytes | BinaryIO) -> AbstractContextManager[IO[bytes]]:
    match source:
        case bytes():
            return io.BytesIO(source)
        case str() | os.PathLike():
            mode = Path(source).stat().st_mode
            if stat.S_ISDIR(mode):
                os.scandir(source).close()  # raises if the folder is one that may not be listed
                raise ImageError("is a folder, not an image file")
            if not stat.S_ISREG(mode):
                raise ImageError("is not a regular file")  # opening a pipe would wait for its other end
            return Path(source).open("rb")
        case _:
            return io.BytesIO(source.read())


def _identify(stream: IO[bytes]) -> ImageFile.ImageFile:
    """Reads the header, as `PIL.Image.open`, whose limit of the size is set for the whole process only."""
    Image.init()
    prefix = stream.read(16)
    if not prefix:
        raise ImageError("is empty")
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is not None and accept is not None and accept(prefix) is True:
            stream.seek(0)
            return factory(stream, "")
    raise ImageError(f"is no image of a known format ({', '.join(FORMATS)})")


def _upright_rgb(image: Image.Image, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height == 0:
        raise ImageError("has no pixels")
    if width * height > max_pixels:
        raise ImageError(f"has {width}x{height} pixels, more than `max_pixels` (={max_pixels})")
    image.load()
    transpose = _TO_UPRIGHT.get(_orientation(image))
    rgb = _rgb(image if transpose is None else image.transpose(transpose))
    rgb.info.clear()  # or the orientation would be applied once more by the next reader
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the pixels may be intact where the metadata are not; viewers show them as stored
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _INTEGER_MODES:
        image = _from_integers(image)
    elif image.mode == "F":
        image = _from_floats(image)
    elif image.mode == "La":
        image = image.convert("LA")
    elif image.mode not in _COLOUR_MODES:
        raise ImageError(f"has the unsupported pixel format {image.mode!r}")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    values = np.array(image.convert("I"))
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"has grey values from {values.min()} to {values.max()}, outside [0, 65535]")
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # round(255 / 65535 * values)


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if not ((values >= 0) & (values <= 1)).all():
        raise ImageError(f"has floating values from {values.min():.6g} to {values.max():.6g}, outside [0, 1]")
    return Image.fromarray((values * 255).round().astype(np.uint8))
