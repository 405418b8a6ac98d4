"""From images to the batches of one process."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader, Sampler, default_convert

from bcoskit.data import (
    ImageDataset,
    ImageError,
    ImageTransform,
    InMemoryImages,
    StreamedImages,
    cifar10,
    in_memory,
    open_dataset,
)
from bcoskit.training._module import seeded
from bcoskit.training._options import Augmentation, Loading

Images: TypeAlias = InMemoryImages | StreamedImages

UNREADABLE = "unreadable.txt"
_MOST_IN_MEMORY = 4 * 1024**3
_MOST_WORKERS = 8


class Unreadable:
    """The images of a run that cannot be read: each is written down once, up to a limit.

    Args:
        limit: How many there may be.
        out: Folder of the run.
    """

    def __init__(self, limit: int, out: Path) -> None:
        self._limit, self._file, self._known = limit, out / UNREADABLE, set[str]()

    def add(self, line: str) -> None:
        """One more, if it is a new one.

        Raises:
            ImageError: If it is one too many.
        """
        if line in self._known:
            return
        self._known.add(line)
        if len(self._known) > self._limit:
            many = "" if self._limit == 0 else f"; {self._limit} more are named in {self._file}"
            raise ImageError(f"{line}{many}: allow more with `max_unreadable` (={self._limit})")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a") as file:
            file.write(f"{line}\n")


class Batches(Sampler[list[int]]):
    """The part that each batch has for one of several processes, in an order that seed and epoch determine.

    Args:
        images: What is taken, by index.
        batch_size: Images in a batch, of all processes together.
        seed: Of the permutations; None for the order of the images, in which the last batch may be smaller and the
            processes take turns.
        part: Index and number of the processes.
    """

    def __init__(self, images: Images, batch_size: int, seed: int | None, part: tuple[int, int]) -> None:
        self._images, self._batch_size, self._seed, self._part = images, batch_size, seed, part
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self._epoch = epoch
        if isinstance(self._images, StreamedImages):
            self._images.set_epoch(epoch)

    def __len__(self) -> int:
        if self._seed is None:
            index, count = self._part
            return -(-len(range(index, len(self._images), count)) // (self._batch_size // count))
        return len(self._images) // self._batch_size

    def __iter__(self) -> Iterator[list[int]]:
        index, count = self._part
        mine = self._batch_size // count
        if self._seed is None:
            indices = list(range(index, len(self._images), count))
            yield from (indices[start : start + mine] for start in range(0, len(indices), mine))
            return
        order = shuffled(len(self._images), self._seed, self._epoch)
        for batch in range(len(self)):
            start = batch * self._batch_size + index * mine
            yield order[start : start + mine]


def shuffled(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of indices that seed and epoch determine, on every machine."""
    return torch.randperm(length, generator=seeded(seed, epoch)).tolist()


def batches(images: Images, sampler: Batches, workers: int | None, processes: int) -> DataLoader[Any]:
    """What iterates over the batches; images on disk are decoded by worker processes."""
    if isinstance(images, InMemoryImages):
        return DataLoader(images, batch_sampler=sampler, collate_fn=default_convert)
    if workers is None:
        workers = min(max((os.cpu_count() or 1) // processes, 1), _MOST_WORKERS)
    return DataLoader(images, batch_sampler=sampler, collate_fn=default_convert, num_workers=workers)


def open_images(
    data: str | Path | None,
    split: Literal["train", "test"],
    transform: ImageTransform,
    *,
    loading: Loading,
    augmentation: Augmentation,
    seed: int,
    unreadable: Unreadable,
    download: bool,
) -> Images:
    """The images of a split, in memory or on disk."""
    if data is None or (download and not str(data).startswith("torchvision:")):
        dataset = cifar10(data, split == "train", None, download)
    else:
        dataset = open_dataset(data, split, None, download=download)
    all_bytes = len(dataset) * 3 * transform.size**2
    if loading.images == "disk" or (loading.images == "auto" and all_bytes > _MOST_IN_MEMORY):
        crops = split == "train" and augmentation.crop == "resized"
        return StreamedImages(
            dataset,
            transform,
            smallest=augmentation.smallest if crops else None,
            size=augmentation.size if crops else None,
            seed=seed,
        )
    dataset.transform = transform.view
    return loaded(dataset, f"Reading {split} images", unreadable)


def loaded(dataset: ImageDataset, title: str, unreadable: Unreadable) -> InMemoryImages:
    """All images in memory; reading them shows a bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal and os.environ.get("LOCAL_RANK", "0") == "0"
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(title, total=len(dataset))

        def tell(done: int, _: int) -> None:
            progress.update(task, completed=done)

        return in_memory(dataset, tell, lambda error: unreadable.add(str(error)))
