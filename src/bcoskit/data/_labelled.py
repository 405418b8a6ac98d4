"""Labelled images that are decoded when asked for."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bcoskit.data._images import ImageError, ImageSource, read_image

Transform = Callable[[Image.Image], Any]


class _Sources(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> ImageSource: ...


class ImageDataset(Dataset[tuple[Any, int]]):
    """Labelled images that are decoded when asked for: item `i` is `(transform(image), label)`.

    Args:
        images: Anything indexable whose items `read_image` reads.
        labels: One class index per image.
        classes: Class names, in the order of the class indices.
        transform: Applied to the upright RGB image; without it the items hold the image itself.

    Attributes:
        labels: Class indices, int64 `(N,)`.
        classes: Class names.
        transform: As given.

    Raises:
        ImageError: If there are no images, not as many labels, or labels outside [0, len(classes)).
        TypeError: If `labels` are not integers, or `classes` no names.
    """

    def __init__(
        self,
        images: _Sources,
        labels: Sequence[int] | Tensor,
        classes: Sequence[str],
        transform: Transform | None = None,
    ) -> None:
        if len(images) == 0:
            raise ImageError("the dataset holds no images")
        if len(images) != len(labels):
            raise ImageError(f"the dataset holds {len(images)} images, but {len(labels)} labels")
        self.labels = torch.as_tensor(labels)
        if self.labels.is_floating_point():
            raise TypeError(f"`labels` must be integers, got {self.labels.dtype}")
        self.labels = self.labels.to(torch.int64)
        low, high = (int(bound) for bound in self.labels.aminmax())
        if low < 0 or high >= len(classes):
            raise ImageError(f"labels from {low} to {high} do not fit {len(classes)} classes")
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"`classes` (={classes!r:.200}) must be a list of names")
        self.classes = tuple(classes)
        self.transform = transform
        self._images = images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        try:
            image = read_image(self._images[index])
            item = image if self.transform is None else self.transform(image)
        except ImageError as error:
            raise ImageError(f"image {index}: {error}") from error
        return item, int(self.labels[index])
