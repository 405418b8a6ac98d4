"""Galleries of neurons and confusions, and explained videos, on networks that are known by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

import bcoskit
from bcoskit.data import ImageError, ImageTransform
from bcoskit.gallery import Activation, animate, neuron_gallery, strongest, versus_gallery
from evaluation_toys import images, patches, small


def test_the_strongest_images_of_a_channel():
    data = images(20)  # channel k responds to images k, k + 5, ..., each weaker than the one before
    found = strongest(patches(), data, "conv", [1, 4], count=3, batch_size=3)
    assert [each.image for each in found[1]] == [1, 6, 11]
    assert [each.image for each in found[4]] == [4, 9, 14]
    assert found[1][0] == Activation(1, 1, (0, 0), pytest.approx(6 * 0.99))
    places = []
    for index in range(3):
        x = torch.zeros(5, 4, 4)
        x[2, index, 3] = 1 + index
        places.append((x, 0))
    assert [each.position for each in strongest(patches(), places, "conv", [2])[2]] == [(2, 3), (1, 3), (0, 3)]


def test_the_strongest_images_of_an_output_without_maps():
    found = strongest(small(), [(torch.rand(3, 8, 8), 0) for _ in range(4)], "head", [3], count=2)
    assert [each.position for each in found[3]] == [(), ()]
    assert found[3][0].value >= found[3][1].value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "nothing"}, "`layers`"),
        ({"channels": [9]}, r"`channels` \(=\[9\]\)"),
        ({"count": 0}, "`count`"),
        ({"dataset": []}, "no images"),
        ({"model": patches().train()}, "evaluation mode"),
    ],
)
def test_wrong_arguments(arguments, message):
    given = {"model": patches(), "dataset": images(), "layer": "conv", "channels": [0]} | arguments
    with pytest.raises(ValueError, match=message):
        strongest(**given)


def test_pictures_of_neurons():
    model = bcoskit.create_model("resnet20.bcos_cifar10", weights=True)
    data = [(bcoskit.encode(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i))), i) for i in range(4)]
    page = neuron_gallery(model, data, "layer3", [0, 5], count=3, cell=64)
    assert page.width == pytest.approx(3 * 64, abs=40)
    assert page.height > 4 * 64
    ordinary = [(torch.rand(3, 8, 8), 0) for _ in range(3)]
    assert neuron_gallery(small(), ordinary, "conv2", [0], count=2, cell=64).width > 128


def test_pictures_of_confusions():
    data = images(10)
    data = [(torch.roll(x, 1, 0) + 0.1 * x, label) for x, label in data]  # each looks like the next class
    page = versus_gallery(patches(), data, 0, 1, count=2, cell=64, classes=["a", "b", "c", "d", "e"])
    assert page.width > 4 * 64
    with pytest.raises(ValueError, match="no image of class '0' is taken for '3'"):
        versus_gallery(patches(), data, 0, 3)


@pytest.fixture
def network():
    return bcoskit.create_model("resnet20.bcos_cifar10", weights=True)


def frames(count=4):
    return [Image.new("RGB", (40, 32), (60 * index, 30, 200 - 40 * index)) for index in range(count)]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_video_is_explained_frame_by_frame(network, tmp_path, suffix):
    out = tmp_path / f"video{suffix}"
    target = animate(network, frames(), out, network.transform, target=3, milliseconds=40, batch_size=3)
    assert target == 3
    with Image.open(out) as video:
        assert video.n_frames == 4
        assert video.width > 2 * 128
    assert not list(tmp_path.glob(".*"))


def test_a_video_comes_from_a_file_or_a_folder(network, tmp_path):
    first, *others = frames()
    first.save(tmp_path / "clip.gif", save_all=True, append_images=others, duration=70)
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, frame in enumerate(frames()):
        frame.save(folder / f"{index}.png")
    found = [
        animate(network, source, tmp_path / "o.webp", network.transform) for source in (folder, tmp_path / "clip.gif")
    ]
    assert found[0] == found[1]
    with Image.open(tmp_path / "o.webp") as video:
        assert video.n_frames == 4
        video.load()
        assert video.info["duration"] == 70


def test_a_class_that_is_not_seen_fades(network, tmp_path):
    cat = network.classes.index("cat")
    with Image.open("src/bcoskit/assets/photographs/cat.jpg") as picture:
        shown = [picture.convert("RGB")]
    pages = {}
    for target in (cat, network.classes.index("ship")):
        animate(network, shown, tmp_path / "o.png", network.transform, target=target)
        with Image.open(tmp_path / "o.png") as video:
            pages[target] = np.asarray(video.convert("RGB"))[:, 150:].astype(float)
    seen, unseen = pages.values()
    assert (255 - seen).mean() > 3 * (255 - unseen).mean()


def test_wrong_videos(network, tmp_path):
    with pytest.raises(ValueError, match="must end in"):
        animate(network, frames(), tmp_path / "video.mp4", network.transform)
    with pytest.raises(ValueError, match="no images"):
        animate(network, [], tmp_path / "video.gif", network.transform)
    with pytest.raises(ValueError, match="encode"):
        animate(small(), frames(), tmp_path / "video.gif", ImageTransform(32, encoding="normalized"))
    with pytest.raises(ImageError):
        animate(network, tmp_path / "missing.gif", tmp_path / "video.gif", network.transform)
    (tmp_path / "text.gif").write_text("text")
    with pytest.raises(ImageError):
        animate(network, tmp_path / "text.gif", tmp_path / "video.gif", network.transform)
    assert not (tmp_path / "video.gif").exists()
