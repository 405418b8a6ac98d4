import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bcoskit.data import ImageError, read_image
from bcoskit.data._images import FORMATS, pixels

LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
SAVE_FORMATS = tuple(FORMATS)


def rainbow(width=7, height=5):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image, file_format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def of_mode(mode, *values):
    """An image with one row of `values`."""
    image = Image.new(mode, (len(values), 1))
    for column, value in enumerate(values):
        image.putpixel((column, 0), value)
    return image


def row(image):
    assert image.mode == "RGB"
    return [image.getpixel((column, 0)) for column in range(image.width)]


def greys(*values):
    return [(value, value, value) for value in values]


def test_rgb_is_copied():
    image = rainbow()
    read = read_image(image)
    assert read is not image
    assert read.tobytes() == image.tobytes()
    read.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) != (1, 2, 3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (of_mode("1", 0, 255), greys(0, 255)),
        (of_mode("L", 0, 100, 255), greys(0, 100, 255)),
        (of_mode("RGBX", (1, 2, 3, 4)), [(1, 2, 3)]),
        (of_mode("CMYK", (0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0)), [*greys(255, 0), (0, 255, 255)]),
        (of_mode("YCbCr", (0, 128, 128), (77, 128, 128)), greys(0, 77)),
        (of_mode("HSV", (0, 255, 255), (0, 0, 90)), [(255, 0, 0), (90, 90, 90)]),
        (of_mode("LA", (10, 255), (10, 0), (0, 51)), greys(10, 255, 204)),
        (of_mode("La", (10, 255), (0, 0), (0, 51)), greys(10, 255, 204)),
        (
            of_mode("RGBA", (1, 2, 3, 255), (1, 2, 3, 0), (0, 0, 255, 51)),
            [(1, 2, 3), *greys(255), (204, 204, 255)],
        ),
        (
            of_mode("RGBa", (1, 2, 3, 255), (0, 0, 0, 0), (0, 0, 51, 51)),
            [(1, 2, 3), *greys(255), (204, 204, 255)],
        ),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_colour_modes(image, expected):
    assert row(read_image(image)) == expected


def test_lab():
    colours = row(read_image(of_mode("LAB", (0, 128, 128), (255, 128, 128), (138, 209, 198))))
    expected = [(0, 0, 0), (255, 255, 255), (255, 0, 0)]
    assert np.abs(np.array(colours) - expected).max() <= 5  # 8-bit LAB is coarse


def palette_image(mode="P"):
    image = of_mode("P", 0, 1, 2)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 0])
    return image.convert(mode) if mode != "P" else image


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(255, 0, 0), (0, 255, 0), (0, 0, 0)]),
        ({"transparency": 1}, [(255, 0, 0), (255, 255, 255), (0, 0, 0)]),
        ({"transparency": bytes([0, 255, 51])}, [(255, 255, 255), (0, 255, 0), (204, 204, 204)]),
    ],
)
def test_palettes(options, expected):
    assert row(read_image(encoded(palette_image(), **options))) == expected


def test_palette_with_alpha():
    image = of_mode("P", 0, 1)
    image.putpalette([255, 0, 0, 255, 0, 0, 0, 51], "RGBA")
    assert row(read_image(image)) == [(255, 0, 0), (204, 204, 204)]
    image = palette_image("PA")
    image.putpixel((0, 0), (0, 0))
    assert row(read_image(image)) == [(255, 255, 255), (0, 255, 0), (0, 0, 0)]


@pytest.mark.parametrize(
    ("image", "transparency", "expected"),
    [
        (of_mode("RGB", (9, 8, 7), (1, 1, 1)), (9, 8, 7), greys(255, 1)),
        (of_mode("L", 9, 3), 9, greys(255, 3)),
        (of_mode("1", 0, 255), 0, greys(255, 255)),
        (of_mode("I;16", 2570, 5140), 2570, greys(255, 20)),
    ],
    ids=["RGB", "L", "1", "I;16"],
)
def test_transparent_colours_become_white(image, transparency, expected):
    assert row(read_image(encoded(image))) != expected
    assert row(read_image(encoded(image, transparency=transparency))) == expected


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_16_bits_are_scaled(mode):
    image = of_mode(mode, 0, 257, 385, 386, 32768, 65535)
    assert row(read_image(image)) == greys(0, 1, 1, 2, 128, 255)


def test_16_bit_scaling_rounds_to_nearest():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    read = np.asarray(read_image(encoded(Image.fromarray(values))))[..., 0]
    assert read.ravel().tolist() == [round(255 * value / 65535) for value in range(65536)]


def test_integers_out_of_range_are_refused():
    for values in ([-1, 5], [0, 65536]):
        with pytest.raises(ImageError, match=r"grey values from .* outside \[0, 65535\]"):
            read_image(of_mode("I", *values))


def test_floats():
    assert row(read_image(of_mode("F", 0.0, 0.2, 0.499, 1.0))) == greys(0, 51, 127, 255)
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ImageError, match=r"floating values .* outside \[0, 1\]"):
            read_image(of_mode("F", 0.5, value))


TRANSPOSED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", TRANSPOSED)
@pytest.mark.parametrize("file_format", LOSSLESS)
def test_orientation(orientation, file_format):
    upright = rainbow()
    transposed = TRANSPOSED[orientation]
    stored = upright if transposed is None else upright.transpose(transposed)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, file_format, exif=exif, **LOSSLESS[file_format])
    read = read_image(data)
    assert read.size == upright.size
    assert read.tobytes() == upright.tobytes()
    assert read_image(read).tobytes() == upright.tobytes()
    with Image.open(io.BytesIO(data)) as opened:
        assert read_image(opened).tobytes() == upright.tobytes()
    if transposed is not None:
        assert stored.tobytes() != upright.tobytes()


@pytest.mark.parametrize("exif", [b"nonsense", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_damaged_metadata_leave_the_pixels(exif):
    image = rainbow()
    assert read_image(encoded(image, exif=exif)).tobytes() == image.tobytes()


def test_first_frame():
    first, second = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    for file_format in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encoded(first, file_format, save_all=True, append_images=[second], **options)
        assert row(read_image(data)) == [(255, 0, 0)] * 2


@pytest.mark.parametrize("file_format", SAVE_FORMATS)
def test_formats_and_sources(file_format, tmp_path):
    smooth = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    data = encoded(smooth, file_format)
    file = tmp_path / "image.any"
    file.write_bytes(data)
    read = read_image(data)
    assert np.abs(np.asarray(read).astype(int) - np.asarray(smooth)).max() <= 16
    for source in (file, str(file), io.BytesIO(data)):
        assert read_image(source).tobytes() == read.tobytes()


def test_streams_are_read_from_their_position_and_left_open():
    class Pipe(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            return stream.readinto(buffer)

    image = rainbow()
    stream = io.BytesIO(b"header" + encoded(image))
    stream.seek(6)
    assert read_image(stream).tobytes() == image.tobytes()
    assert not stream.closed
    stream.seek(6)
    assert read_image(Pipe()).tobytes() == image.tobytes()


def test_pillow_sources_stay_as_they_are():
    image = palette_image()
    image.info["transparency"] = 0
    before = image.mode, dict(image.info), image.tobytes()
    read_image(image)
    assert (image.mode, dict(image.info), image.tobytes()) == before


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_missing_files_folders_and_pipes(tmp_path):
    with pytest.raises(ImageError, match=r"absent\.png: No such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    (tmp_path / "broken.png").symlink_to(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=r"broken\.png: No such file"):
        read_image(str(tmp_path / "broken.png"))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"x", "no image of a known format"),
        (b"This is text.\n" * 9, "no image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no image of a known format"),
        (b"\x89PNG\r\n\x1a\n", "damaged or truncated"),
        (encoded(rainbow())[:60], "damaged or truncated"),
        (encoded(rainbow(64, 64), "JPEG")[:-300], "damaged or truncated"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 50, "damaged or truncated"),
        (png_header(4, 4), "damaged or truncated"),
    ],
    ids=range(9),
)
def test_bad_files(content, reason, tmp_path):
    file = tmp_path / "bad.png"
    file.write_bytes(content)
    for source in (file, content, io.BytesIO(content)):
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=r"bad\.png"):
        read_image(file)


@pytest.mark.filterwarnings("ignore")  # else they end the reading early
@pytest.mark.parametrize("file_format", sorted(set(SAVE_FORMATS) - {"JPEG2000"}))
def test_truncation_never_passes_unnoticed(file_format):
    data = encoded(rainbow(16, 16), file_format)
    whole = read_image(data).tobytes()
    refused = 0
    for length in range(0, len(data), 3):
        try:
            # What lies behind the last pixel may be missing.
            assert read_image(data[:length]).tobytes() == whole
        except ImageError:
            refused += 1
    assert refused > 0.9 * len(data) / 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", SAVE_FORMATS)
def test_damage_gives_an_image_or_an_image_error(file_format):
    data = bytearray(encoded(rainbow(16, 16), file_format))
    random = np.random.default_rng(1)
    refused = 0
    for position in random.integers(0, len(data), 200):
        damaged = data.copy()
        damaged[position] ^= int(random.integers(1, 256))
        try:
            assert read_image(bytes(damaged), max_pixels=100_000).mode == "RGB"
        except ImageError:
            refused += 1
    assert refused > 0


def test_size_is_judged_by_the_header():
    with pytest.raises(ImageError, match=r"has 20000x20000 pixels, more than `max_pixels` \(=100000000\)"):
        read_image(png_header(20_000, 20_000))
    data = encoded(rainbow())
    assert read_image(data, max_pixels=35).size == (7, 5)
    for source in (data, rainbow(), png_header(7, 5)):
        with pytest.raises(ImageError, match="more than `max_pixels`"):
            read_image(source, max_pixels=34)
    with pytest.raises(ValueError, match=r"`max_pixels` \(=0\)"):
        read_image(data, max_pixels=0)


@pytest.mark.parametrize("limit", [10, 30])
def test_pillows_own_limit_does_not_matter(limit, monkeypatch):
    data = encoded(rainbow())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((Image.DecompressionBombWarning, Image.DecompressionBombError)):
            Image.open(io.BytesIO(data))
        image = read_image(data)
    assert image.size == (7, 5)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_images_without_pixels_and_other_types():
    with pytest.raises(ImageError, match="no pixels"):
        read_image(Image.new("RGB", (0, 3)))
    for source in (None, 3, np.zeros((2, 2, 3), np.uint8), torch.zeros(3, 2, 2)):
        with pytest.raises(TypeError, match="`source` must be"):
            read_image(source)
    with pytest.raises(ImageError, match="<stream>"):
        read_image(io.StringIO("text"))


OPEN_FILES = Path("/proc/self/fd")


@pytest.mark.skipif(not OPEN_FILES.exists(), reason="open files are counted in /proc")
def test_no_file_stays_open(tmp_path):
    def count():
        return len(list(OPEN_FILES.iterdir()))

    before = count()
    with (tmp_path / "control").open("wb"):
        assert count() == before + 1
    for file_format in SAVE_FORMATS:
        data = encoded(rainbow(16, 16), file_format)
        for content in (data, data[: len(data) // 2], data[:20], b"x" * 20):
            file = tmp_path / "image"
            file.write_bytes(content)
            try:
                image = read_image(file)
                assert image.getpixel((0, 0))
            except ImageError:
                pass
            file.unlink()
            assert count() == before
    data = encoded(rainbow(), "TIFF", compression="tiff_lzw", save_all=True, append_images=[rainbow()])
    file.write_bytes(data)
    images = [read_image(file) for _ in range(3)]
    assert count() == before
    assert images[0].tobytes() == rainbow().tobytes()


def test_pixels_are_channels_first():
    image = rainbow()
    tensor = pixels(image)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert tensor.shape == (3, 5, 7)
    assert tuple(tensor[:, 4, 6].tolist()) == image.getpixel((6, 4))
