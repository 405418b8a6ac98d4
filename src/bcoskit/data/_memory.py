"""Small images decoded once and augmented by the batch, for fast training."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from bcoskit.data._images import ImageError, pixels
from bcoskit.data._labelled import ImageDataset


class InMemoryImages(TensorDataset):
    """Decoded images and labels, taken by the batch in one indexing operation.

    Item `i` is `(images[i], labels[i])`, where `i` may be an integer, a slice, a list or a tensor. A
    `DataLoader` asks for a whole batch at once, which needs no collation: give it
    `collate_fn=torch.utils.data.default_convert`, which leaves tensors as they are.

    Args:
        images: Pixels, uint8 `(N, 3, H, W)`.
        labels: Class indices, int64 `(N,)`, or zeros and ones, float32 `(N, len(classes))`.
        classes: Class names, in the order of the class indices.

    Attributes:
        images: As given.
        labels: As given.
        classes: As given.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        super().__init__(images, labels)
        self.images = images
        self.labels = labels
        self.classes = tuple(classes)

    @property
    def multi_label(self) -> bool:
        """Whether an image may be of several classes, or of none."""
        return self.labels.ndim == 2

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.long)
        return self.images[chosen], self.labels[chosen]


def in_memory(
    dataset: ImageDataset,
    progress: Callable[[int, int], object] | None = None,
    unreadable: Callable[[ImageError], object] | None = None,
) -> InMemoryImages:
    """Decodes every image of a dataset once, N * 3 * H * W bytes in all.

    Images of different sizes are brought to one by a transform that yields images again, such as
    `ImageTransform(32).view`.

    Args:
        dataset: Images of one size: without transform, or with one that yields images.
        progress: Called as `progress(done, total)` after every image.
        unreadable: Called with the error of an image that cannot be read, which then is left out.

    Raises:
        ImageError: If an image cannot be read, unless `unreadable` is given; if none can.
        TypeError: If the items of `dataset` are not images.
        ValueError: If the images differ in size.
    """
    total = len(dataset)
    images = torch.empty(0)
    kept: list[int] = []
    for index in range(total):
        try:
            image, _ = dataset[index]
        except ImageError as error:
            if unreadable is None:
                raise
            unreadable(error)
            continue
        if not isinstance(image, Image.Image):
            raise TypeError(f"`dataset` must yield images, not {type(image).__name__}: drop its transform")
        values = pixels(image.convert("RGB"))
        if not kept:
            images = values.new_empty((total, *values.shape))
        elif values.shape != images.shape[1:]:
            raise ValueError(
                f"image {index} of `dataset` has {image.width}x{image.height} pixels, the first one has "
                f"{images.shape[3]}x{images.shape[2]}: give it a transform such as `ImageTransform(32).view`"
            )
        images[len(kept)] = values
        kept.append(index)
        if progress is not None:
            progress(index + 1, total)
    if not kept:
        raise ImageError("none of the images can be read")
    return InMemoryImages(images[: len(kept)], dataset.labels[kept], dataset.classes)


def random_crop_flip(
    batch: Tensor, padding: int = 4, generator: torch.Generator | None = None, part: tuple[int, int] = (0, 1)
) -> Tensor:
    """The augmentation of CIFAR training: every image is shifted and mirrored at random, by itself.

    Each image is padded with zeros on all sides, cropped to its size at an offset uniform in [0, 2 * padding]
    per axis, and flipped from left to right with probability 1/2.

    Args:
        batch: Images `(N, C, H, W)` of any dtype, before they are encoded (zero is black).
        padding: Largest shift in pixels.
        generator: Source of randomness; torch's global one by default.
        part: Index and number of parts: the batch is one of so many equal parts of a whole, and is changed as it would
            be within it.

    Returns:
        New images of the same shape, dtype and device.

    Raises:
        ValueError: If `batch` has another number of dimensions, or `padding` is negative.
    """
    if batch.ndim != 4:
        raise ValueError(f"`batch` must have shape (N, C, H, W), got {tuple(batch.shape)}")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"`part` (={part}) must be an index and a number above it")
    if padding < 0:
        raise ValueError(f"`padding` (={padding}) must not be negative")
    count, _, height, width = batch.shape
    source = batch.device if generator is None else generator.device
    whole, mine = count * part[1], slice(count * part[0], count * (part[0] + 1))
    offsets = torch.randint(2 * padding + 1, (2, whole), generator=generator, device=source)[:, mine]
    flips = torch.randint(2, (whole, 1, 1, 1), generator=generator, device=source)[mine]
    top, left = offsets.to(batch.device)
    padded = torch.nn.functional.pad(batch, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, offset, offset, H, W)
    crops = windows[torch.arange(count, device=batch.device), :, top, left]
    return torch.where(flips.to(batch.device) == 1, crops.flip(-1), crops)
