import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from bcoskit.data import ImageError, ImageTransform, decode
from bcoskit.data._images import pixels

SIZES = [(40, 40), (64, 48), (48, 65), (33, 200), (20, 31), (7, 5), (32, 32)]


def picture(width, height, mode="RGB"):
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize", [None, 32, 37])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_torchvision(size, resize, interpolation):
    image = picture(*size)
    expected = transforms.Compose(
        [
            transforms.Resize(32 if resize is None else resize, InterpolationMode(interpolation)),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
        ]
    )(image)
    x = ImageTransform(32, resize, interpolation)(image)
    assert x.dtype == torch.float32
    assert x.shape == (6, 32, 32)
    assert torch.equal(decode(x), expected)
    assert torch.equal(x[3:], 1 - expected)


def test_normalized_is_that_of_torchvision():
    image = picture(50, 40)
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    expected = transforms.Normalize(mean, std)(decode(ImageTransform(32, 36)(image)))
    x = ImageTransform(32, 36, encoding="normalized", mean=mean, std=std)(image)
    assert x.shape == (3, 32, 32)
    torch.testing.assert_close(x, expected)
    assert not torch.allclose(ImageTransform(32, 36, encoding="normalized")(image), expected)


def test_grey():
    image = picture(50, 40)
    expected = transforms.ToTensor()(transforms.CenterCrop(32)(transforms.Resize(36)(image.convert("L"))))
    transform = ImageTransform(32, 36, channels=1)
    assert torch.equal(transform(image), torch.cat([expected, 1 - expected]))
    assert transform.view(image).mode == "RGB"
    normalized = ImageTransform(32, 36, channels=1, encoding="normalized", mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(normalized(image), (expected - 0.5) / 0.25)


@pytest.mark.parametrize("channels", [1, 3])
def test_view_shows_what_the_network_sees(channels):
    transform = ImageTransform(24, 30, channels=channels)
    image = picture(60, 41)
    view = transform.view(image)
    assert view.size == (24, 24)
    x = pixels(view)[:channels] / 255
    assert torch.equal(decode(transform(image)), x)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_any_image_is_taken(mode, tmp_path):
    image = Image.new("I;16", (9, 8), 32768) if mode == "I;16" else picture(9, 8, mode)
    x = ImageTransform(8)(image)
    assert x.shape == (6, 8, 8)
    file = tmp_path / "image.tiff"
    image.save(file)
    assert torch.equal(ImageTransform(8)(file), x)


def test_plain_values():
    transform = ImageTransform(224, 256, encoding="normalized", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert ImageTransform(**dataclasses.asdict(transform)) == transform
    restored = ImageTransform(**json.loads(json.dumps(dataclasses.asdict(transform))))
    assert restored == transform
    assert hash(restored) == hash(transform)
    with pytest.raises(dataclasses.FrozenInstanceError):
        transform.size = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, r"`size` \(=0\)"),
        ({"size": 32.5}, r"`size` \(=32.5\) must be an integer"),
        ({"size": True}, r"`size` \(=True\) must be an integer"),
        ({"size": 8, "resize": 9.5}, r"`resize` \(=9.5\) must be an integer"),
        ({"size": 8, "mean": (float("nan"), 0.5, 0.5)}, r"`mean` .* must be finite"),
        ({"size": 224, "resize": 223}, r"`resize` \(=223\) must be at least `size` \(=224\)"),
        ({"size": 8, "interpolation": "nearest"}, r"`interpolation` \(='nearest'\)"),
        ({"size": 8, "channels": 2}, r"`channels` \(=2\)"),
        ({"size": 8, "encoding": "none"}, r"`encoding` \(='none'\)"),
        ({"size": 8, "encoding": "normalized", "channels": 1}, "as many values"),
        ({"size": 8, "encoding": "normalized", "mean": (0.5,)}, "as many values"),
        ({"size": 8, "encoding": "normalized", "std": (0.5, 0.0, 0.5)}, "must be positive"),
    ],
)
def test_bad_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(**arguments)


@pytest.mark.parametrize("encoding", ["bcos", "normalized"])
def test_pixels_that_are_no_rgb_are_refused(encoding):
    transform = ImageTransform(8, encoding=encoding)
    for shape in ((5, 8, 8), (1, 8, 8), (8, 8)):
        with pytest.raises(ValueError, match=r"must be RGB pixels"):
            transform.encode_pixels(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(TypeError, match="got ndarray"):
        transform.encode_pixels(np.zeros((3, 8, 8), np.uint8))
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        transform.encode_pixels(torch.zeros(3, 8, 8))


def test_elongated_images_do_not_fill_the_memory():
    assert ImageTransform(8)(Image.new("RGB", (500, 2))).shape == (6, 8, 8)
    with pytest.raises(ImageError, match="30000x1 pixels is too elongated"):
        ImageTransform(224)(Image.new("RGB", (30_000, 1)))


def test_grey_of_colours_is_what_the_view_shows():
    transform = ImageTransform(8, channels=1)
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    found = transform.encode_pixels(torch.from_numpy(colours).movedim(-1, 0))
    assert torch.equal(found, transform(Image.fromarray(colours)))
    assert found.shape == (2, 8, 8)
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(2, 3, 1, 1)
    assert torch.equal(transform.encode_pixels(grey)[:, :1], grey[:, :1] / 255)
