import io
import json
import os
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from bcoskit.data import (
    ImageDataset,
    ImageError,
    ImageTransform,
    ParquetImages,
    cifar10,
    folder,
    in_memory,
    open_dataset,
)

DATA = Path(os.environ.get("BCOSKIT_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no development data at BCOSKIT_DATA ({DATA})")
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def colour(value):
    return Image.new("RGB", (4, 4), (value, value, value))


def png(value):
    stream = io.BytesIO()
    colour(value).save(stream, "PNG")
    return stream.getvalue()


def level(image):
    return image.getpixel((0, 0))[0]


def as_structs(images):
    return [{"bytes": image, "path": f"{index}.png"} for index, image in enumerate(images)]


def write(path, columns, names=None, label="label"):
    table = pa.table(columns)
    if names is not None:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def write_simple(path, values=(1, 2, 3), labels=(0, 1, 0), names=("cat", "dog")):
    return write(path, {"img": as_structs(map(png, values)), "label": list(labels)}, names)


def items(dataset):
    return [(level(image), label) for image, label in dataset]


class TestImageDataset:
    def test_items(self):
        dataset = ImageDataset([png(5), colour(6)], [1, 0], ["a", "b"])
        assert items(dataset) == [(5, 1), (6, 0)]
        assert dataset.classes == ("a", "b")
        assert dataset.labels.tolist() == [1, 0]
        assert dataset[-1][1] == 0
        for index in (2, -3):
            with pytest.raises(IndexError, match="out of range for 2 images"):
                dataset[index]

    def test_transform(self):
        dataset = ImageDataset([png(5), png(6)], [1, 0], ["a", "b"], ImageTransform(4))
        images, labels = next(iter(torch.utils.data.DataLoader(dataset, batch_size=2)))
        assert images.shape == (2, 6, 4, 4)
        assert labels.tolist() == [1, 0]

    def test_bad_images_are_named_by_index(self, tmp_path):
        dataset = ImageDataset([png(5), png(6)[:30], tmp_path / "absent"], [0, 0, 0], ["a"])
        assert level(dataset[0][0]) == 5
        with pytest.raises(ImageError, match="image 1: <30 bytes>: damaged"):
            dataset[1]
        with pytest.raises(ImageError, match=r"image 2: .*absent: No such file"):
            dataset[2]

    def test_labels_are_checked(self):
        with pytest.raises(ImageError, match="no images"):
            ImageDataset([], [], ["a"])
        with pytest.raises(ImageError, match="2 images, but 1 labels"):
            ImageDataset([png(1), png(2)], [0], ["a"])
        for labels in ([0, 2], [-1, 0]):
            with pytest.raises(ImageError, match="do not fit 2 classes"):
                ImageDataset([png(1), png(2)], labels, ["a", "b"])
        with pytest.raises(TypeError, match="integers"):
            ImageDataset([png(1), png(2)], torch.tensor([0.5, 1.0]), ["a", "b"])
        with pytest.raises(TypeError, match="`labels` must be indices of classes, or rows of zeros and ones"):
            ImageDataset([png(1), png(2)], ["a", "b"], ["a", "b"])
        with pytest.raises(TypeError, match="`labels` must be indices of classes, or rows of zeros and ones"):
            ImageDataset([png(1), png(2)], [[0, 1], [1]], ["a", "b"])
        with pytest.raises(ValueError, match=r"`labels` of shape \(2, 1, 1\) must be \(N,\) indices, or \(N, 2\)"):
            ImageDataset([png(1), png(2)], torch.zeros(2, 1, 1), ["a", "b"])


class TestParquetImages:
    @pytest.mark.parametrize(
        ("image_name", "label_name"),
        [("img", "label"), ("image", "labels"), ("photo", "fine_label")],
    )
    @pytest.mark.parametrize("structs", [True, False])
    def test_columns_are_found(self, image_name, label_name, structs, tmp_path):
        images = [png(7), png(8)]
        columns = {
            "id": [4, 5],
            image_name: as_structs(images) if structs else images,
            label_name: [1, 0],
            "coarse_label": [0, 0],
        }
        dataset = ParquetImages(write(tmp_path / "x.parquet", columns, ["a", "b"], label_name))
        assert items(dataset) == [(7, 1), (8, 0)]
        assert dataset.classes == ("a", "b")

    def test_columns_that_cannot_be_told(self, tmp_path):
        images = [png(7)]
        two = write(tmp_path / "two.parquet", {"left": images, "right": images, "label": [0]})
        with pytest.raises(ImageError, match=r"give `image_column`.*'left', 'right', 'label'"):
            ParquetImages(two)
        assert len(ParquetImages(two, image_column="left")) == 1
        unnamed = write(tmp_path / "unnamed.parquet", {"img": images, "id": [0], "mask": images})
        with pytest.raises(ImageError, match=r"'img', 'id', 'mask'.*name theirs 'label', or give `label_column`"):
            ParquetImages(unnamed)
        assert len(ParquetImages(unnamed, label_column="id")) == 1
        with pytest.raises(ImageError, match=r"no column 'photo' among its columns \['left'"):
            ParquetImages(two, image_column="photo")
        with pytest.raises(ImageError, match="'label' holds int64, not encoded images"):
            ParquetImages(two, image_column="label")
        with pytest.raises(ImageError, match="'left' holds binary, neither integers nor strings"):
            ParquetImages(two, image_column="right", label_column="left")
        floats = write(tmp_path / "floats.parquet", {"img": images, "label": [0.5]})
        with pytest.raises(ImageError, match="'label' holds double"):
            ParquetImages(floats)

    def test_classes(self, tmp_path):
        images = [png(value) for value in range(3)]
        integers = write(tmp_path / "integers.parquet", {"img": images, "label": [2, 0, 2]})
        assert ParquetImages(integers).classes == ("0", "1", "2")
        strings = write(tmp_path / "strings.parquet", {"img": images, "label": ["dog", "cat", "dog"]})
        assert ParquetImages(strings).classes == ("cat", "dog")
        assert ParquetImages(strings).labels.tolist() == [1, 0, 1]
        column = pa.array(["dog", "cat", "dog"]).dictionary_encode()
        assert ParquetImages(write(tmp_path / "coded.parquet", {"img": images, "label": column})).classes == (
            "cat",
            "dog",
        )

    @pytest.mark.parametrize(
        ("labels", "names", "message"),
        [
            ([0, 2], ["a", "b"], "labels from 0 to 2 do not fit 2 classes"),
            ([-1, 0], ["a", "b"], "labels from -1 to 0"),
            ([-1, 0], None, "labels from -1 to 0"),
            ([0, 10**9], None, "hardly be class indices"),
            ([0, None], ["a"], "'label' lacks 1 of 2 values"),
        ],
    )
    def test_bad_labels(self, labels, names, message, tmp_path):
        with pytest.raises(ImageError, match=message):
            ParquetImages(write(tmp_path / "x.parquet", {"img": [png(1), png(2)], "label": labels}, names))

    def test_missing_images(self, tmp_path):
        structs = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "here.png"}]
        path = write(tmp_path / "x.parquet", {"img": structs, "label": [0, 0]})
        with pytest.raises(ImageError, match="'img' lacks 1 of 2 values"):
            ParquetImages(path)
        path = write(tmp_path / "y.parquet", {"img": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})
        with pytest.raises(ImageError, match="no images"):
            ParquetImages(path)

    def test_several_shards(self, tmp_path):
        first = write_simple(tmp_path / "train-00000-of-00002.parquet", [1, 2], [0, 1])
        second = write_simple(tmp_path / "train-00001-of-00002.parquet", [3], [1])
        expected = [(1, 0), (2, 1), (3, 1)]
        for paths in ([first, second], tmp_path, str(tmp_path), tmp_path / "train-*.parquet"):
            assert items(ParquetImages(paths)) == expected
        assert items(ParquetImages([second])) == [(3, 1)]
        second.unlink()
        with pytest.raises(ImageError, match="holds 1 of the 2 shards"):
            ParquetImages(tmp_path)

    def test_shards_that_do_not_belong_together(self, tmp_path):
        train = write_simple(tmp_path / "train-00000-of-00001.parquet")
        test = write_simple(tmp_path / "test-00000-of-00001.parquet")
        with pytest.raises(ImageError, match=r"several splits \['test', 'train'\]"):
            ParquetImages(tmp_path)
        assert len(ParquetImages([train, test])) == 6
        other = write_simple(tmp_path / "other" / "0000.parquet", names=("dog", "cat"))
        with pytest.raises(ImageError, match="several folders"):
            ParquetImages(tmp_path)
        with pytest.raises(ImageError, match="disagree on the class names"):
            ParquetImages([train, other])
        integers = write(tmp_path / "integers.parquet", {"img": [png(1)], "label": [0]})
        strings = write(tmp_path / "strings.parquet", {"img": [png(1)], "label": ["a"]})
        with pytest.raises(ImageError, match="disagree on the type"):
            ParquetImages([integers, strings])

    def test_unreadable_files(self, tmp_path):
        with pytest.raises(ImageError, match="no such file"):
            ParquetImages(tmp_path / "absent.parquet")
        with pytest.raises(ImageError, match="no file found"):
            ParquetImages(tmp_path)
        with pytest.raises(ImageError, match="`paths` is empty"):
            ParquetImages([])
        path = write_simple(tmp_path / "x.parquet")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ImageError, match=r"x\.parquet: no readable parquet file") as caught:
            ParquetImages(path)
        assert "\n" not in str(caught.value)
        (tmp_path / "empty.parquet").touch()
        with pytest.raises(ImageError, match="no readable parquet file"):
            ParquetImages(tmp_path / "empty.parquet")

    def test_where_an_image_is_that_cannot_be_read(self, tmp_path):
        first = write(tmp_path / "a.parquet", {"img": as_structs([png(1), png(2)]), "label": [0, 1]})
        second = write(tmp_path / "b.parquet", {"img": as_structs([png(3), b"junk"]), "label": [0, 1]})
        dataset = ParquetImages([first, second])
        assert level(dataset[2][0]) == 3
        for index in (3, -1):
            with pytest.raises(ImageError, match=r"^image -?\d: <4 bytes>: .* \(.*b\.parquet: row 1\)$"):
                dataset[index]

    @pytest.mark.parametrize("metadata", ["{", "{}", '{"info": {"features": []}}', '{"info": {"features": {}}}'])
    def test_bad_metadata(self, metadata, tmp_path):
        table = pa.table({"img": [png(1)], "label": [0]}).replace_schema_metadata({"huggingface": metadata})
        pq.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(ImageError, match="metadata does not describe column 'label'"):
            ParquetImages(tmp_path / "x.parquet")

    def test_pickle(self, tmp_path):
        dataset = ParquetImages(write_simple(tmp_path / "x.parquet"), ImageTransform(4))
        restored = pickle.loads(pickle.dumps(dataset))
        assert restored.classes == dataset.classes
        assert all(torch.equal(x, y) and i == j for (x, i), (y, j) in zip(restored, dataset, strict=True))

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        path = write_simple(tmp_path / "x.parquet")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install .bcoskit\[data\]"):
            ParquetImages(path)


def write_folders(root, classes=("cat", "dog")):
    for label, name in enumerate(classes):
        for index in range(2):
            file = root / name / "deep" / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(10 * label + index))
    return root


class TestFolder:
    def test_agrees_with_torchvision(self, tmp_path):
        write_folders(tmp_path)
        dataset, expected = folder(tmp_path), torchvision.datasets.ImageFolder(tmp_path)
        assert items(dataset) == items(expected) == [(0, 0), (1, 0), (10, 1), (11, 1)]
        assert list(dataset.classes) == expected.classes

    def test_hidden_folders_are_no_classes(self, tmp_path):
        write_folders(tmp_path, ("cat", ".cache", "dog"))
        (tmp_path / "cat" / "._0.png").write_bytes(b"junk")
        (tmp_path / "notes.txt").touch()
        assert folder(tmp_path).classes == ("cat", "dog")
        assert len(folder(tmp_path)) == 4

    def test_folders_without_classes_or_images(self, tmp_path):
        with pytest.raises(ImageError, match="absent: no such folder"):
            folder(tmp_path / "absent")
        with pytest.raises(ImageError, match="no class folders"):
            folder(tmp_path)
        write_folders(tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ImageError, match="empty: no file found"):
            folder(tmp_path)

    def test_splits_are_no_classes(self, tmp_path):
        write_folders(tmp_path / "train")
        write_folders(tmp_path / "val")
        with pytest.raises(ImageError, match="are splits"):
            folder(tmp_path)
        assert len(folder(tmp_path / "train")) == 4


class FakeCIFAR10:
    """In the place of torchvision's class, whose files are downloaded."""

    def __init__(self, root, train, download):
        self.data = np.full((2, 32, 32, 3), 9 if train else 8, np.uint8)
        self.targets = [3, 5]
        self.classes = list(CIFAR10_CLASSES)


def fail_with(error):
    def construct(root, train, download):
        raise error

    return construct


class TestCifar10:
    @pytest.mark.parametrize("place", ["", "plain_text"])
    def test_parquet(self, place, tmp_path):
        write_simple(tmp_path / place / "train-00000-of-00001.parquet", [1], [3], CIFAR10_CLASSES)
        write_simple(tmp_path / place / "test-00000-of-00001.parquet", [2], [4], CIFAR10_CLASSES)
        assert items(cifar10(tmp_path)) == [(1, 3)]
        assert items(cifar10(tmp_path, train=False)) == [(2, 4)]
        assert cifar10(tmp_path).classes == CIFAR10_CLASSES

    def test_other_data(self, tmp_path):
        write_simple(tmp_path / "train-00000-of-00001.parquet")
        with pytest.raises(ImageError, match="2 classes, not the 10"):
            cifar10(tmp_path)

    def test_original_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
        assert items(cifar10(tmp_path)) == [(9, 3), (9, 5)]
        assert items(cifar10(tmp_path, train=False)) == [(8, 3), (8, 5)]
        assert cifar10(tmp_path).classes == CIFAR10_CLASSES
        (tmp_path / "cifar-10-batches-py").mkdir()
        assert items(open_dataset(tmp_path, "test")) == [(8, 3), (8, 5)]

    def test_nothing_found(self, tmp_path, monkeypatch):
        with pytest.raises(ImageError, match=r"holds no CIFAR-10: give `path`.*or `download=True`"):
            cifar10(tmp_path)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        with pytest.raises(ImageError, match=r"home/hub/cifar10: holds no CIFAR-10"):
            cifar10()
        for error in (URLError("no network"), RuntimeError("File not found or corrupted.")):
            monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail_with(error))
            with pytest.raises(ImageError, match=r"cannot be downloaded \(.*\): give `path`"):
                cifar10(tmp_path, download=True)


class TestOpenDataset:
    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
            ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
            ("train.parquet", "val.parquet"),
            ("train/0000.parquet", "test/0000.parquet"),
        ],
    )
    def test_parquet(self, train, test, tmp_path):
        write_simple(tmp_path / train, [1, 2], [0, 1])
        write_simple(tmp_path / test, [3], [1])
        write_simple(tmp_path / ".cache" / "train-00000-of-00001.parquet")
        assert items(open_dataset(tmp_path)) == [(1, 0), (2, 1)]
        assert items(open_dataset(tmp_path, "test")) == [(3, 1)]
        assert items(open_dataset(tmp_path / test, "test")) == [(3, 1)]
        with pytest.raises(ImageError, match="holds no train images"):
            open_dataset(tmp_path / test, "train")

    def test_incomplete_or_ambiguous_shards(self, tmp_path):
        write_simple(tmp_path / "train-00000-of-00002.parquet")
        with pytest.raises(ImageError, match="1 of the 2 shards"):
            open_dataset(tmp_path)
        write_simple(tmp_path / "copy" / "train-00001-of-00002.parquet")
        with pytest.raises(ImageError, match="several folders"):
            open_dataset(tmp_path)

    @pytest.mark.parametrize("name", ["test", "val", "validation"])
    def test_class_folders(self, name, tmp_path):
        write_folders(tmp_path / "train")
        write_folders(tmp_path / name, ("cow", "ewe", "fox"))
        assert open_dataset(tmp_path).classes == ("cat", "dog")
        dataset = open_dataset(tmp_path, "test", ImageTransform(4))
        assert dataset.classes == ("cow", "ewe", "fox")
        assert dataset[0][0].shape == (6, 4, 4)

    def test_nothing_of_that_kind(self, tmp_path):
        write_folders(tmp_path)
        with pytest.raises(ImageError, match=r"holds no train images \(expected train-\*\.parquet"):
            open_dataset(tmp_path)
        with pytest.raises(ImageError, match="no such file or folder"):
            open_dataset(tmp_path / "absent")
        with pytest.raises(ValueError, match="`split` \\(='val'\\) must be one of 'train', 'test'"):
            open_dataset(tmp_path, "val")  # pyright: ignore[reportArgumentType]


@needs_data
class TestRealData:
    def test_cifar10(self):
        train, test = open_dataset(DATA / "cifar10", "train"), cifar10(DATA / "cifar10", train=False)
        assert (len(train), len(test)) == (50_000, 8_000)
        assert train.classes == test.classes == CIFAR10_CLASSES
        assert train.labels.bincount().tolist() == [5_000] * 10
        assert test.labels.bincount().min() > 700
        image, label = test[7_999]
        assert image.size == (32, 32)
        assert label == test.labels[7_999]

    def test_imagenet(self):
        dataset = open_dataset(DATA / "imagenet_sample", "test", ImageTransform(64, 72))
        assert len(dataset) == 800
        assert len(dataset.classes) == 1_000
        assert len(dataset.labels.unique()) == 800
        x, _ = dataset[5]
        assert x.shape == (6, 64, 64)
        assert x.std() > 0.1

    def test_in_memory(self):
        dataset = cifar10(DATA / "cifar10", train=False)
        few = ImageDataset([dataset[index][0] for index in range(64)], dataset.labels[:64], dataset.classes)
        images = in_memory(few).images
        assert images.shape == (64, 3, 32, 32)
        torch.testing.assert_close(images[3] / 255, torchvision.transforms.functional.to_tensor(dataset[3][0]))


def test_class_names_are_names(tmp_path):
    image = Image.new("RGB", (4, 4))
    with pytest.raises(TypeError, match="must be a list of names"):
        ImageDataset([image], [0], [1, 2])
    with pytest.raises(TypeError, match="must be a list of names"):
        ImageDataset([image], [0], "ab")

    def elongated(_image):
        raise ImageError("an image of 4x4 pixels is too elongated")

    with pytest.raises(ImageError, match="image 0: an image of 4x4"):
        ImageDataset([image], [0], ["a"], elongated)[0]


class TestMatching:
    def images(self, classes, labels):
        return ImageDataset([png(7)] * len(labels), labels, classes)

    def test_by_name(self):
        dataset = self.images(("b", "c"), [0, 1])
        dataset.match(("a", "b", "c"))
        assert (dataset.labels.tolist(), dataset.classes) == ([1, 2], ("a", "b", "c"))
        several = self.images(("b", "c"), [[1, 0], [1, 1]])
        several.match(("a", "b", "c"))
        assert several.labels.tolist() == [[0, 1, 0], [0, 1, 1]]

    def test_by_place(self):
        for names in (("x", "y", "z"), ("x", "b", "z"), ("a", "b", "c")):
            dataset = self.images(names, [0, 2])
            dataset.match(("a", "b", "c"))
            assert (dataset.labels.tolist(), dataset.classes) == ([0, 2], names)

    @pytest.mark.parametrize("names", [("a", "b", "x"), ("b", "x", "y"), ("a", "x"), ("a", "b", "c", "d")])
    def test_what_cannot_be_told(self, names):
        with pytest.raises(ValueError, match="classes, the network 3"):
            self.images(names, [0]).match(("a", "b", "c"))

    def test_two_classes_of_one_name(self):
        """As the cranes of ImageNet: in their places they are told apart, by their names they are not."""
        self.images(("a", "a", "b"), [0, 1]).match(("a", "a", "b"))
        for mine, theirs in (("abca", "abcA"), ("abcA", "abca")):
            dataset = self.images(tuple(mine), [0, 3])
            dataset.match(tuple(theirs))
            assert (dataset.labels.tolist(), dataset.classes) == ([0, 3], tuple(theirs))
        with pytest.raises(ValueError, match="there is no 'x'"):
            self.images(tuple("axca"), [0]).match(tuple("abcA"))
        for mine, theirs in ((("b", "a", "a"), ("a", "a", "b")), (("a",), ("a", "a")), (("a", "a"), ("a", "b"))):
            with pytest.raises(ValueError, match="two classes 'a'"):
                self.images(mine, [0]).match(theirs)


def test_shards_without_labels_are_passed_over(tmp_path):
    write_simple(tmp_path / "data" / "train-0.parquet")
    write_simple(tmp_path / "data" / "test-0.parquet", labels=(-1, -1, -1))
    with pytest.raises(ImageError, match="has no labels, all of them are -1"):
        open_dataset(tmp_path, "test")
    write_simple(tmp_path / "data" / "validation-0.parquet", values=(7, 8, 9))
    assert items(open_dataset(tmp_path, "test")) == [(7, 0), (8, 1), (9, 0)]
