"""Labelled images that stay where they are, decoded by the batch."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bcoskit.data._images import ImageError, pixels, read_image
from bcoskit.data._labelled import ImageDataset
from bcoskit.data._transforms import ImageTransform


class StreamedImages(Dataset[Any]):
    """Images of a dataset as pixels of one size, decoded when asked for, so that memory holds a few batches alone.

    A batch, which is what a `DataLoader` with `batch_sampler` and `collate_fn=list` asks for, is pixels
    uint8 `(n, 3, S, S)`, labels, and one line for each image that cannot be read and is left out.

    Args:
        dataset: The images, without transform.
        transform: Whose `view` brings them to their size.
        smallest: If given, images are not that view, but random parts of at least this share of the whole image, in
            the size of the view; a part is determined by seed, epoch and index, and by how often the image was in
            its batch before.
        size: Side of these parts in pixels; that of the view if None.
        seed: Of the parts.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: ImageTransform,
        *,
        smallest: float | None = None,
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        self.labels = dataset.labels
        self.classes = dataset.classes
        self.multi_label = dataset.multi_label
        self._dataset, self._transform, self._seed, self._epoch = dataset, transform, seed, 0
        self._crop: Any = None
        if smallest is not None:
            from torchvision.transforms import v2  # takes a second

            side = transform.size if size is None else size
            self._crop = v2.RandomResizedCrop(side, scale=(smallest, 1.0), antialias=True)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the random parts that come next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Pixels and label of one image.

        Raises:
            ImageError: If it cannot be read.
        """
        return self._item(index, 0)

    def _item(self, index: int, repetition: int) -> tuple[Tensor, Tensor]:
        image, _ = self._dataset[index]
        if self._crop is None:
            try:
                return pixels(self._transform.view(image)), self.labels[index]
            except ImageError as error:  # of strange shapes
                raise ImageError(f"image {index}: {error}") from error
        with torch.random.fork_rng(devices=()):
            key = (self._seed, self._epoch, index, repetition)
            torch.default_generator.manual_seed(random.Random(repr(key)).getrandbits(63))
            part: Image.Image = self._crop(_grey(read_image(image), self._transform.channels))
        return pixels(part), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
        found: list[tuple[Tensor, Tensor]] = []
        unreadable: list[str] = []
        seen: Counter[int] = Counter()
        for index in indices:
            try:
                found.append(self._item(index, seen[index]))
            except ImageError as error:
                unreadable.append(str(error))
            seen[index] += 1
        if not found:
            side = self._transform.size
            return torch.empty(0, 3, side, side, dtype=torch.uint8), self.labels[:0], unreadable
        images, labels = zip(*found, strict=True)
        return torch.stack(images), torch.stack(labels), unreadable


def _grey(image: Image.Image, channels: int) -> Image.Image:
    return image.convert("L").convert("RGB") if channels == 1 else image
