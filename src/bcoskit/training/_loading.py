"""From images to the batches of one process."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_convert

from bcoskit._processes import is_first
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
_ANY_NAME = "surrogateescape"  # which files may have, whatever their bytes
_MOST_IN_MEMORY = 4 * 1024**3
_MOST_WORKERS = 8


class Unreadable:
    """The images of a run that cannot be read: each is written down once, up to a limit.

    Args:
        limit: How many there may be in each process.
        out: Folder of the run.
        resumed: Whether what was written down there is of this run.
    """

    def __init__(self, limit: int, out: Path, resumed: bool) -> None:
        self._limit, self._file = limit, out / UNREADABLE
        if not resumed and is_first():
            self._file.unlink(missing_ok=True)
        self._known = set[str]()
        if resumed and self._file.exists():
            self._known.update(self._file.read_text("utf-8", _ANY_NAME).splitlines())

    def add(self, line: str, *, written: bool = True) -> None:
        """One more, if it is a new one.

        Args:
            line: Which, and why.
            written: Whether this process is the one that writes it down.

        Raises:
            ImageError: If it is one too many.
        """
        line = " ".join(line.split())
        if line in self._known:
            return
        self._known.add(line)
        if len(self._known) > self._limit:
            many = "" if self._limit == 0 else f"; {self._limit} more are named in {self._file}"
            raise ImageError(f"{line}{many}: allow more with `max_unreadable` (={self._limit})")
        if written:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8", errors=_ANY_NAME) as file:
                file.write(f"{line}\n")


class Batches(Sampler[list[int]]):
    """The part that each batch of an epoch has for one of several processes.

    Args:
        length: Number of images, which are taken by index.
        batch_size: Images in a batch, of all processes together.
        part: Index and number of the processes.
        order: Seed and epoch, which determine the order; None for that of the images, in which every image comes once,
            and as many batches in each process.
        repeats: How often each image appears in its batch.
        begin: The batch that comes first; those before it are counted and left out.
        group: How many batches belong together; an epoch has no part of a group. Of no account without `order`.

    Raises:
        ValueError: If the processes cannot have equal parts.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        part: tuple[int, int] = (0, 1),
        order: tuple[int, int] | None = None,
        repeats: int = 1,
        begin: int = 0,
        group: int = 1,
    ) -> None:
        if batch_size % (part[1] * repeats):
            times = f"{part[1]} processes" + (f" times {repeats} `repeats`" if repeats > 1 else "")
            raise ValueError(f"`batch_size` (={batch_size}) must be a multiple of {times}")
        if length < part[1]:
            raise ValueError(f"{length} images are too few for {part[1]} processes")
        self._length, self._batch_size, self._part = length, batch_size, part
        self._order, self._repeats, self._begin, self._group = order, repeats, begin, group

    def __len__(self) -> int:
        if self._order is None:  # the same number for each process, which wait for each other
            return -(-(self._length // self._part[1]) // (self._batch_size // self._part[1]))
        return self._length // (self._batch_size * self._group) * self._group

    def __iter__(self) -> Iterator[list[int]]:
        index, count = self._part
        if self._order is None:
            indices = torch.arange(index, self._length, count)
            yield from (chunk.tolist() for chunk in indices.tensor_split(len(self)))
            return
        order = shuffled(self._length, *self._order)
        different, mine = self._batch_size // self._repeats, self._batch_size // count
        for batch in range(self._begin, len(self)):
            whole = order[batch * different : (batch + 1) * different].repeat_interleave(self._repeats)
            yield whole[index * mine : (index + 1) * mine].tolist()


def shuffled(length: int, seed: int, epoch: int) -> Tensor:
    """A permutation of indices that seed and epoch determine, on every machine."""
    return torch.randperm(length, generator=seeded(seed, epoch))


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
    with _alone() if download else nullcontext():
        if data is None or (download and _is_for_cifar10(data)):
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
    return loaded(dataset, split, unreadable)


def _alone() -> AbstractContextManager[object]:
    """Of several processes one downloads, and the others find what it has downloaded."""
    folder = Path(torch.hub.get_dir())
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "bcoskit-download.lock")


def _is_for_cifar10(data: str | Path) -> bool:
    """Whether a download to that place can be meant to be CIFAR-10: it is a folder that holds nothing else."""
    if str(data).partition(":")[0] in ("hf", "torchvision"):
        return False
    folder = Path(data)
    return not folder.exists() or not any(folder.iterdir()) or any(folder.glob("cifar-10*"))


def loaded(dataset: ImageDataset, split: str, unreadable: Unreadable) -> InMemoryImages:
    """All images in memory; reading them shows a bar on stderr, if that is a terminal."""
    console = Console(stderr=True)
    shown = console.is_terminal and is_first()
    with Progress(console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(f"Reading {split} images", total=len(dataset))

        def tell(done: int, _: int) -> None:
            progress.update(task, completed=done)

        # All processes read the same.
        return in_memory(dataset, tell, lambda error: unreadable.add(f"{split}: {error}", written=is_first()))
