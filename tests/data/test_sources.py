"""Datasets that other libraries write or know: tar files of WebDataset, Hugging Face, torchvision; several labels."""

import io
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
import webdataset
from PIL import Image

from bcoskit.data import ImageDataset, ImageError, ImageTransform, StreamedImages, TarImages, in_memory, open_dataset

SHADES = (10, 60, 110, 160)


def picture(shade):
    return Image.new("RGB", (8, 6), (shade, shade, shade))


def encoded(shade):
    buffer = io.BytesIO()
    picture(shade).save(buffer, "PNG")
    return buffer.getvalue()


def shade_of(item):
    return item[0].getpixel((0, 0))[0]


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            information = tarfile.TarInfo(name)
            information.size = len(content)
            archive.addfile(information, io.BytesIO(content))
    return path


class TestTarImages:
    def test_labels_that_are_none(self, tmp_path):
        for members, message in (
            ([("1.png", encoded(1)), ("1.cls", b"1"), ("1.cls", b"0")], "sample '1' has two labels"),
            ([("1.png", encoded(1)), ("1.cls", b"1_0")], "is no class index"),
        ):
            with pytest.raises(ImageError, match=message):
                TarImages([write_tar(tmp_path / "train.tar", members)])
        with pytest.raises(TypeError, match="must be a list of tar files"):
            TarImages(tmp_path / "train.tar")
        ones = [(f"{index}.{kind}", content) for index in (1, 2)
                for kind, content in (("png", encoded(index)), ("cls", b"0 1" if index == 1 else b"1 0"))]  # fmt: skip
        with pytest.raises(ImageError, match="not zeros and ones"):
            TarImages([write_tar(tmp_path / "train.tar", ones)])

    def test_what_webdataset_writes(self, tmp_path):
        for index in (0, 1):
            with webdataset.TarWriter(str(tmp_path / f"train-{index:03d}.tar")) as sink:
                for place in (2 * index, 2 * index + 1):
                    sink.write({"__key__": f"a/{place:05d}", "png": picture(SHADES[place]), "cls": place % 2})
        write_tar(tmp_path / "test-000.tar", [("x.png", encoded(7)), ("x.cls", b"1")])
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        dataset = open_dataset(tmp_path, "train")
        assert [shade_of(item) for item in dataset] == list(SHADES)
        assert dataset.labels.tolist() == [0, 1, 0, 1]
        assert dataset.classes == ("cat", "dog")
        assert [shade_of(item) for item in open_dataset(tmp_path, "test")] == [7]

    def test_where_an_image_is_that_cannot_be_read(self, tmp_path):
        members = [("a/x.png", encoded(1)), ("a/x.cls", b"0"), ("a/y.png", b"junk"), ("a/y.cls", b"1")]
        dataset = TarImages([write_tar(tmp_path / "a.tar", members[:2]), write_tar(tmp_path / "b.tar", members)])
        assert shade_of(dataset[1]) == 1
        with pytest.raises(ImageError, match=r"^image 2: .* \(.*b\.tar: a/y\.png\)$"):
            dataset[2]

    def test_several_labels(self, tmp_path):
        members = [("x.jpg", encoded(1)), ("x.cls", b"0 2"), ("y.jpg", encoded(2)), ("y.cls", b"")]
        dataset = TarImages([write_tar(tmp_path / "a.tar", members)])
        assert dataset.multi_label
        assert dataset.labels.tolist() == [[1, 0, 1], [0, 0, 0]]

    @pytest.mark.parametrize(
        ("members", "message"),
        [
            ([("x.png", b"?")], "'x' has no label"),
            ([("x.cls", b"1")], "'x' has no image"),
            ([("x.png", b"?"), ("x.cls", b"cat")], "no class index"),
            ([("x.png", b"?"), ("x.jpg", b"?")], "two images"),
            ([], "hold no images"),
            ([("x.png", b"?"), ("x.cls", b"-1")], "do not fit"),
            ([("x.png", b"?"), ("x.cls", b"1"), ("y.png", b"?"), ("y.cls", b"")], "has no label"),
        ],
    )
    def test_wrong_members(self, tmp_path, members, message):
        with pytest.raises(ImageError, match=message):
            TarImages([write_tar(tmp_path / "a.tar", members)])

    def test_damaged_files(self, tmp_path):
        path = tmp_path / "a.tar"
        path.write_bytes(b"no archive" * 100)
        with pytest.raises(ImageError, match=r"a\.tar: no readable tar file"):
            TarImages([path])
        write_tar(path, [("x.png", encoded(1)), ("x.cls", b"0")])
        dataset = TarImages([path])
        path.unlink()
        with pytest.raises(ImageError, match=r"image 0: .*a\.tar"):
            dataset[0]

    def test_a_damaged_header_is_no_end(self, tmp_path):
        """`tarfile` takes it for one, and all behind it would be missing."""
        path = write_tar(tmp_path / "a.tar", [(f"{k}.{suffix}", b"1") for k in range(3) for suffix in ("png", "cls")])
        assert len(TarImages([path])) == 3
        whole, header = path.read_bytes(), 4 * 2 * tarfile.BLOCKSIZE
        path.write_bytes(whole[: header + 5])  # cut off
        with pytest.raises(ImageError, match=rf"a\.tar: no readable tar file \(damaged at byte {header}\)"):
            TarImages([path])
        path.write_bytes(whole[:header])
        with pytest.raises(ImageError, match=r"a\.tar: no readable tar file \(cut off after 2 images"):
            TarImages([path])
        path.write_bytes(whole[:header] + b"?" * tarfile.BLOCKSIZE + whole[header + tarfile.BLOCKSIZE :])
        with pytest.raises(ImageError, match="damaged at byte"):
            TarImages([path])

    def test_hidden_files_are_left_out(self, tmp_path):
        members = [("x.png", encoded(1)), ("x.cls", b"0"), ("._x.png", b"?"), ("a/.DS_Store", b"?")]
        assert len(TarImages([write_tar(tmp_path / "a.tar", members)])) == 1

    def test_names_that_begin_with_a_byte_order_mark(self, tmp_path):
        path = write_tar(tmp_path / "a.tar", [("x.png", encoded(1)), ("x.cls", b"1")])
        (tmp_path / "classes.txt").write_text("cat\ndog\n", encoding="utf-8-sig")
        assert TarImages([path]).classes == ("cat", "dog")

    def test_classes_that_are_not_named(self, tmp_path):
        path = write_tar(tmp_path / "a.tar", [("x.png", encoded(1)), ("x.cls", b"1")])
        assert TarImages([path]).classes == ("0", "1")
        (tmp_path / "classes.txt").write_text("cat\ncat\n")
        with pytest.raises(ImageError, match=r"classes\.txt"):
            TarImages([path])


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.usefixtures("cached")
class TestHuggingFace:
    @staticmethod
    def splits(labels, feature):
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        rows = {"image": [picture(shade) for shade in SHADES[: len(labels)]], "label": labels}
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_dict(rows, features) for name in ("train", "validation")}
        )

    def test_what_is_saved_to_disk(self, tmp_path):
        self.splits([1, 0, 1], datasets.ClassLabel(names=["cat", "dog"])).save_to_disk(tmp_path / "saved")
        for split in ("train", "test"):
            dataset = open_dataset(tmp_path / "saved", split)
            assert [shade_of(item) for item in dataset] == list(SHADES[:3])
            assert (dataset.classes, dataset.labels.tolist()) == (("cat", "dog"), [1, 0, 1])

    def test_a_folder_that_datasets_reads(self, tmp_path):
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                (tmp_path / "images" / split / name).mkdir(parents=True)
                picture(SHADES[len(name) % 2]).save(tmp_path / "images" / split / name / f"{split}-{name}.png")
        dataset = open_dataset(f"hf:{tmp_path / 'images'}", "train")
        assert len(dataset) == 2
        assert dataset.classes == ("cat", "dog")

    def test_several_labels(self, tmp_path):
        feature = datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))
        self.splits([[0, 2], []], feature).save_to_disk(tmp_path / "saved")
        assert open_dataset(tmp_path / "saved").labels.tolist() == [[1, 0, 1], [0, 0, 0]]

    def test_parquet_files_that_datasets_reads(self, tmp_path):
        several = datasets.Sequence(datasets.ClassLabel(names=["a", "b", "c"]))
        for place, labels, feature in (
            ("several", [[0, 2], []], several),
            ("hidden", [-1, -1], datasets.ClassLabel(names=["a", "b"])),
        ):
            (tmp_path / place).mkdir()
            self.splits(labels, feature)["train"].to_parquet(tmp_path / place / "train-00000-of-00001.parquet")
        assert open_dataset(f"hf:{tmp_path / 'several'}").labels.tolist() == [[1, 0, 1], [0, 0, 0]]
        with pytest.raises(ImageError, match="the split 'train' has no labels"):
            open_dataset(f"hf:{tmp_path / 'hidden'}")

    def test_the_row_of_an_image_that_cannot_be_read(self, tmp_path):
        saved = self.splits([1, 0], datasets.ClassLabel(names=["cat", "dog"]))
        cells = [{"bytes": b"junk", "path": "a/b.png"}, {"bytes": b"junk", "path": None}]
        saved["train"] = datasets.Dataset.from_dict({"image": cells, "label": [1, 0]}, saved["train"].features)
        saved.save_to_disk(tmp_path / "saved")
        dataset = open_dataset(tmp_path / "saved")
        with pytest.raises(ImageError, match=r"^image 0: .* \(row 0, .*b.png\)$"):
            dataset[0]
        with pytest.raises(ImageError, match=r"^image 1: .* \(row 1\)$"):
            dataset[1]

    def test_coarse_labels_beside_those_that_are_meant(self, tmp_path):
        kinds = {"coarse_label": ["pets"], "fine_label": ["cat", "dog"]}
        features = {"img": datasets.Image()} | {name: datasets.ClassLabel(names=of) for name, of in kinds.items()}
        rows = {"img": [picture(shade) for shade in SHADES[:2]], "coarse_label": [0, 0], "fine_label": [1, 0]}
        saved = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, datasets.Features(features))})
        saved.save_to_disk(tmp_path / "saved")
        dataset = open_dataset(tmp_path / "saved")
        assert (dataset.classes, dataset.labels.tolist()) == (("cat", "dog"), [1, 0])
        saved.rename_column("fine_label", "species").save_to_disk(tmp_path / "unclear")
        with pytest.raises(ImageError, match="one column of images and one of labels"):
            open_dataset(tmp_path / "unclear")

    def test_what_is_not_there(self, tmp_path):
        with pytest.raises(ImageError, match=r"hf:.*cannot be opened"):
            open_dataset(f"hf:{tmp_path / 'nothing'}")
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "text")
        with pytest.raises(ImageError, match="one column of images and one of labels"):
            open_dataset(tmp_path / "text")


class TestTorchvision:
    @pytest.fixture(autouse=True)
    def _dataset(self, monkeypatch):
        class Shades(torchvision.datasets.VisionDataset):
            classes = ("dark", "light")

            def __init__(self, root, train=True, download=False):
                if not train and not download:
                    raise RuntimeError("Dataset not found")
                self.targets = [0, 1]

            def __len__(self):
                return 2

            def __getitem__(self, index):
                return picture(SHADES[index]), self.targets[index]

        monkeypatch.setattr(torchvision.datasets, "Shades", Shades, raising=False)

    def test_images_and_classes(self):
        dataset = open_dataset("torchvision:Shades", "train")
        assert [shade_of(item) for item in dataset] == list(SHADES[:2])
        assert (dataset.classes, dataset.labels.tolist()) == (("dark", "light"), [0, 1])

    def test_download(self):
        with pytest.raises(ImageError, match="Dataset not found"):
            open_dataset("torchvision:Shades", "test")
        assert len(open_dataset("torchvision:Shades", "test", download=True)) == 2

    @pytest.mark.parametrize("known", ["trainval", "train-standard"])
    def test_other_names_of_the_split(self, known, monkeypatch):
        class Split(torchvision.datasets.VisionDataset):
            classes, targets = ("dark", "light"), (0, 1)

            def __init__(self, root, split=known, download=False):
                if split != known:
                    raise ValueError(f"Unknown value {split!r}")

            def __len__(self):
                return 2

        monkeypatch.setattr(torchvision.datasets, "Split", Split, raising=False)
        assert len(open_dataset("torchvision:Split", "train")) == 2
        with pytest.raises(ImageError, match=r"torchvision:Split: has no such split: Unknown value 'test'$"):
            open_dataset("torchvision:Split", "test")

    @pytest.mark.parametrize("name", ["Nothing", "ImageFolder", "os"])
    def test_what_is_no_dataset_with_splits(self, name):
        with pytest.raises(ImageError, match=name):
            open_dataset(f"torchvision:{name}")


class TestSeveralLabels:
    def test_parquet(self, tmp_path):
        table = pa.table({"image": [encoded(1), encoded(2)], "labels": [["dog", "cat"], []]})
        pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
        dataset = open_dataset(tmp_path)
        assert dataset.classes == ("cat", "dog")
        assert dataset.labels.tolist() == [[1, 1], [0, 0]]
        assert dataset[0][1].tolist() == [1, 1]
        assert in_memory(dataset).multi_label

    @pytest.mark.parametrize(("labels", "message"), [([[0, 1]], "do not fit 3"), ([[0, 1, 2]], "zeros and ones")])
    def test_wrong_labels(self, labels, message):
        with pytest.raises(ImageError, match=message):
            ImageDataset([picture(1)], labels, ("a", "b", "c"))


def test_zeros_and_ones_are_no_class_indices(tmp_path):
    table = pa.table({"image": [encoded(1)], "labels": [[0, 1, 0]]})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(ImageError, match="holds one twice"):
        open_dataset(tmp_path)


class TestStreamedImages:
    @pytest.fixture
    def dataset(self):
        noise = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
        return ImageDataset([*map(Image.fromarray, noise), b"no image"], [0, 1, 0, 1], ("a", "b"))

    def test_views(self, dataset):
        transform = ImageTransform(16)
        streamed = StreamedImages(dataset, transform)
        images, labels, unreadable = streamed.__getitems__([2, 3, 0])
        whole = [transform.encode_pixels(images[index]) for index in (0, 1)]
        assert all(torch.equal(x, transform(dataset[index][0])) for x, index in zip(whole, (2, 0), strict=True))
        assert labels.tolist() == [0, 0]
        (line,) = unreadable
        assert line.startswith("image 3: ")

    def test_parts_are_determined_by_seed_epoch_and_index(self, dataset):
        def part(index, epoch=0, seed=0):
            streamed = StreamedImages(dataset, ImageTransform(16), smallest=0.2, size=12, seed=seed)
            streamed.set_epoch(epoch)
            return streamed[index][0]

        state = torch.random.get_rng_state()
        first = part(0)
        assert first.shape == (3, 12, 12)
        assert torch.equal(first, part(0))
        assert not torch.equal(first, part(0, epoch=1))
        assert not torch.equal(first, part(0, seed=1))
        assert torch.equal(state, torch.random.get_rng_state())

    def test_nothing_can_be_read(self, dataset):
        images, labels, (line,) = StreamedImages(dataset, ImageTransform(16)).__getitems__([3])
        assert images.shape == (0, 3, 16, 16)
        assert len(labels) == 0
        assert line.startswith("image 3: ")

    def test_repeated_images_have_parts_of_their_own(self, dataset):
        images, _, _ = StreamedImages(dataset, ImageTransform(16), smallest=0.2).__getitems__([0, 0, 1])
        assert not torch.equal(images[0], images[1])
