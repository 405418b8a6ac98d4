"""Labelled images from class folders, from CIFAR-10, or from what lies at a path."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image

from bcoskit.data._elsewhere import hugging_face_images, torchvision_images
from bcoskit.data._files import find_images
from bcoskit.data._images import ImageError
from bcoskit.data._labelled import ImageDataset, Transform
from bcoskit.data._parquet import SPLIT_NAMES, SPLITS, ParquetImages, UnlabelledError, split_shards, splits_of
from bcoskit.data._tar import TarImages

if TYPE_CHECKING:
    import numpy as np


class NoSplitError(ImageError):
    """A folder in which no split of a dataset is found."""


def folder(path: str | os.PathLike[str], transform: Transform | None = None) -> ImageDataset:
    """Labelled images in one folder per class; the folders' names, sorted, are the classes.

    Each class holds the images that `find_images` finds in its folder, at any depth.

    Args:
        path: Folder of the class folders.
        transform: Applied to the upright RGB image; without it the items hold the image itself.

    Raises:
        ImageError: If there are no class folders, one holds no image, or they are splits and not classes.
    """
    root = Path(path)
    if not root.is_dir():
        raise ImageError(f"{root}: no such folder")
    names = (entry.name for entry in root.iterdir() if entry.is_dir())
    classes = sorted(name for name in names if not name.startswith("."))
    if not classes:
        raise NoSplitError(f"{root}: holds no class folders (expected one folder of images per class)")
    if SPLIT_NAMES.issuperset(classes):
        raise ImageError(f"{root}: its folders {classes} are splits, not classes: open one of them")
    found = [(image, label) for label, name in enumerate(classes) for image in find_images([root / name])]
    images, labels = zip(*found, strict=True)
    return ImageDataset(images, labels, classes, transform)


def cifar10(
    path: str | os.PathLike[str] | None = None,
    train: bool = True,
    transform: Transform | None = None,
    download: bool = False,
) -> ImageDataset:
    """CIFAR-10: images of 32x32 pixels in ten classes.

    Args:
        path: Folder with parquet shards (`train-*.parquet`, `test-*.parquet`, in it or in a folder in it) or
            with the original `cifar-10-batches-py`; by default `cifar10` in `torch.hub.get_dir()`.
        train: Whether to read the training images or the test images.
        transform: Applied to the RGB image; without it the items hold the image itself.
        download: Whether to download the original files into `path` where nothing is found there.

    Raises:
        ImageError: If the images are not found and not downloaded, or are not CIFAR-10.
    """
    root = Path(torch.hub.get_dir()) / "cifar10" if path is None else Path(path)
    shards = split_shards(root, "train" if train else "test")
    if shards:
        dataset = ParquetImages(shards, transform)
        if len(dataset.classes) != 10:
            raise ImageError(f"{root}: holds {len(dataset.classes)} classes, not the 10 of CIFAR-10")
        return dataset
    from torchvision.datasets import CIFAR10

    expected = "a folder with train-*.parquet and test-*.parquet, or with cifar-10-batches-py"
    try:
        original = CIFAR10(root, train=train, download=download)
    except (OSError, RuntimeError) as error:
        if download:
            failure = f"CIFAR-10 cannot be downloaded ({error})"
            raise ImageError(f"{root}: {failure}: give `path`, {expected}") from error
        raise ImageError(f"{root}: holds no CIFAR-10: give `path`, {expected}, or `download=True`") from error
    return ImageDataset(_PixelArrays(original.data), original.targets, original.classes, transform)


def open_dataset(
    path: str | os.PathLike[str],
    split: Literal["train", "test"] = "train",
    transform: Transform | None = None,
    *,
    download: bool = False,
) -> ImageDataset:
    """Opens one split of the labelled images that lie at `path`, whatever their layout.

    In this order: parquet shards named after the split (`train-*.parquet`, in `path` or in a folder in it, or
    `train/*.parquet`; `path` may also be such a shard), tar files in the layout of WebDataset, likewise, the original
    CIFAR-10 (`cifar-10-batches-py`), what `datasets` has saved to disk, class folders in a folder named after the
    split. The test split may also be called `val` or `validation`; parquet shards without labels (-1) are passed over
    for these.

    Args:
        path: Folder of the dataset, or a single shard; `torchvision:NAME` for a dataset of torchvision, `hf:NAME` for
            one of the Hugging Face hub, or for a folder that `datasets` is to read, whose images then stay on disk.
        split: `"train"` or `"test"`.
        transform: Applied to the upright RGB image; without it the items hold the image itself.
        download: Whether to download a dataset of torchvision if it is not there.

    Raises:
        ImageError: If nothing of that kind is found, or what is found cannot be read.
        ValueError: If `split` is another word.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` (={split!r}) must be one of {', '.join(map(repr, SPLITS))}")
    library, colon, name = os.fspath(path).partition(":")
    if colon and library == "torchvision":
        return torchvision_images(name, split, transform, download=download)
    if colon and library == "hf":
        return hugging_face_images(name, split, transform)
    root = Path(path)
    if not root.exists():
        raise ImageError(f"{root}: no such file or folder")
    unlabelled: UnlabelledError | None = None
    for shards in splits_of(root, split):
        try:
            return ParquetImages(shards, transform)
        except UnlabelledError as error:  # as the test images of some benchmarks are, whose labels are secret
            unlabelled = unlabelled or error
    if unlabelled is not None:
        raise unlabelled
    shards = split_shards(root, split, ".tar")
    if shards:
        return TarImages(shards, transform)
    if (root / "dataset_dict.json").exists():
        return hugging_face_images(str(root), split, transform)
    if (root / "cifar-10-batches-py").is_dir():
        return cifar10(root, train=split == "train", transform=transform)
    for name in SPLITS[split]:
        if (root / name).is_dir():
            return folder(root / name, transform)
    raise NoSplitError(
        f"{root}: holds no {split} images (expected {split}-*.parquet, {split}-*.tar, cifar-10-batches-py, "
        f"or a folder {' or '.join(SPLITS[split])} with one folder of images per class)"
    )


class _PixelArrays:
    """Rows of a uint8 array `(N, H, W, 3)`, as images."""

    def __init__(self, values: "np.ndarray[Any, Any]") -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Image.Image:
        return Image.fromarray(self._values[index])
