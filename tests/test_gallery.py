"""Galleries of neurons and confusions, and explained videos, on networks that are known by hand."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import nn

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


class Twice(nn.Sequential):
    """The first of its layers runs two times, the second never."""

    def forward(self, x):
        return self[0](self[0](x))


def twice():
    return Twice(nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)).eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "nothing"}, "`layers`"),
        ({"channels": [9]}, r"`channels` \(=\[9\]\)"),
        ({"count": 0}, "`count`"),
        ({"dataset": []}, "no images"),
        ({"model": patches().train()}, "evaluation mode"),
        ({"dataset": [*images(3), (torch.full((5, 4, 4), torch.nan), 0)]}, "not finite for images 0 to 3"),
        ({"model": twice(), "layer": "0"}, r"`layers` \(='0'\) runs 2 times"),
        ({"model": twice(), "layer": "1"}, r"`layers` \(='1'\) runs 0 times"),
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


@pytest.mark.parametrize("value", [-1.0, 2.0])
def test_images_of_one_colour_are_shown(value):
    page = neuron_gallery(small(), [(torch.full((3, 8, 8), value), 0)], "conv2", [0], count=1, cell=64)
    assert page.size == neuron_gallery(small(), [(torch.rand(3, 8, 8), 0)], "conv2", [0], count=1, cell=64).size


def test_pictures_of_confusions():
    data = images(10)
    data = [(torch.roll(x, 1, 0) + 0.1 * x, label) for x, label in data]  # each looks like the next class
    page = versus_gallery(patches(), data, 0, 1, count=2, cell=64, classes=["a", "b", "c", "d", "e"])
    assert page.width > 4 * 64
    with pytest.raises(ValueError, match="no image of class '0' is taken for '3'"):
        versus_gallery(patches(), data, 0, 3)
    for wrong, message in (
        ({"second": 9}, r"`second` \(=9\) must be two of the classes 0 to 4"),
        ({"second": -1}, r"`second` \(=-1\)"),
        ({"second": 0}, "two of the classes"),
        ({"count": -1}, r"`count` \(=-1\)"),
        ({"batch_size": 0}, r"`batch_size` \(=0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            versus_gallery(**({"model": patches(), "dataset": data, "first": 0, "second": 1} | wrong))


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


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_frames_last_as_long_as_in_the_file(network, tmp_path, suffix):
    first, *others = frames()
    lossless = {"lossless": True} if suffix == ".webp" else {}
    first.save(tmp_path / f"clip{suffix}", save_all=True, append_images=others, duration=[50, 200, 70, 120], **lossless)
    animate(network, tmp_path / f"clip{suffix}", tmp_path / "o.png", network.transform)
    durations = []
    with Image.open(tmp_path / "o.png") as video:
        for frame in ImageSequence.Iterator(video):
            frame.load()
            durations.append(frame.info["duration"])
    assert durations == [50, 200, 70, 120]


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_transparent_frames_are_white(network, tmp_path, suffix):
    pictures = {}
    for name, around in (("transparent", (0, 0, 0, 0)), ("white", (255, 255, 255, 255)), ("black", (0, 0, 0, 255))):
        clip = [Image.new("RGBA", (32, 32), around) for _ in range(2)]
        for index, frame in enumerate(clip):
            frame.paste((255, 0, 0, 255), (8 * index, 0, 8 * index + 8, 32))
        clip[0].save(tmp_path / f"clip{suffix}", save_all=True, append_images=clip[1:], disposal=2)
        animate(network, tmp_path / f"clip{suffix}", tmp_path / "o.png", network.transform, target=3)
        pictures[name] = (tmp_path / "o.png").read_bytes()
    assert pictures["transparent"] == pictures["white"] != pictures["black"]


def test_what_is_no_image_in_a_folder_is_no_frame(network, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    frames()[0].save(folder / "0.png")
    (folder / ".hidden").write_text("of the system")
    (folder / "notes.txt").write_text("of the user")
    animate(network, folder, tmp_path / "o.png", network.transform)
    with Image.open(tmp_path / "o.png") as video:
        assert getattr(video, "n_frames", 1) == 1


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
    with pytest.raises(ValueError, match=r"`milliseconds` \(=0\)"):
        animate(network, frames(), tmp_path / "video.gif", network.transform, milliseconds=0)
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


def test_a_network_in_training_mode_is_refused_before_it_changes(tmp_path):
    network = nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    before = network[0].running_mean.clone()
    with pytest.raises(ValueError, match="evaluation mode"):
        animate(network, [Image.new("RGB", (32, 32))], tmp_path / "a.gif", ImageTransform(32))
    assert torch.equal(network[0].running_mean, before)


def test_names_of_too_few_classes():
    with pytest.raises(ValueError, match=r"must be two of the 3 `classes`"):
        versus_gallery(patches(), images(), 0, 4, classes=("a", "b", "c"))
