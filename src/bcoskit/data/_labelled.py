"""Labelled images that are decoded when asked for."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bcoskit.data._images import ImageError, ImageSource, read_image

Transform = Callable[[Image.Image], Any]

_MOST_UNNAMED_CLASSES = 1_000_000


class _Sources(Protocol):
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> ImageSource: ...


class ImageDataset(Dataset[tuple[Any, Any]]):
    """Labelled images that are decoded when asked for: item `i` is `(transform(image), label)`.

    A label is a class index, or, where an image may be of several classes or of none, a row of zeros and ones.

    Args:
        images: Anything indexable whose items `read_image` reads.
        labels: One class index per image, or zeros and ones `(N, len(classes))`.
        classes: Class names, in the order of the class indices.
        transform: Applied to the upright RGB image; without it the items hold the image itself.

    Attributes:
        labels: Class indices, int64 `(N,)`, or float32 `(N, len(classes))`.
        classes: Class names.
        transform: As given.

    Raises:
        ImageError: If there are no images, not as many labels, or labels outside [0, len(classes)).
        TypeError: If class indices are not integers, labels no table of numbers, or `classes` no names.
        ValueError: If labels have more axes.
    """

    def __init__(
        self,
        images: _Sources,
        labels: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        classes: Sequence[str],
        transform: Transform | None = None,
    ) -> None:
        if len(images) == 0:
            raise ImageError("the dataset holds no images")
        if len(images) != len(labels):
            raise ImageError(f"the dataset holds {len(images)} images, but {len(labels)} labels")
        self.labels = _checked(labels, len(classes))
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"`classes` (={classes!r:.200}) must be a list of names")
        self.classes = tuple(classes)
        self.transform = transform
        self._images = images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def multi_label(self) -> bool:
        """Whether an image may be of several classes, or of none."""
        return self.labels.ndim == 2

    def match(self, classes: Sequence[str]) -> None:
        """Bring the labels into the order of a network's classes, by name where names are known.

        As many other names as the network has classes are taken for these in their order, as of a dataset that names
        them in another way: then fewer than half of the names may be the same, each in its place. So are two classes of
        one name, such as the cranes of ImageNet, where all other names are the same.

        Args:
            classes: Names of the network's classes.

        Raises:
            ValueError: If the labels cannot be told apart: more classes, some that the network has and others, or two
                of one name.
        """
        mine, theirs = self.classes, tuple(classes)
        if mine == theirs:
            return
        twice = {name for names in (mine, theirs) for name, count in Counter(names).items() if count > 1}
        if len(mine) == len(theirs):
            differing = [pair for pair in zip(mine, theirs, strict=True) if len(set(pair)) > 1]
            if 2 * len(differing) < len(mine) and all(twice.intersection(pair) for pair in differing):
                self.classes = theirs
                return
        if len(mine) > len(theirs):
            raise ValueError(f"has {len(mine)} classes, the network {len(theirs)}")
        unknown = [name for name in mine if name not in theirs]
        in_place = all(theirs[place] == name for place, name in enumerate(mine) if name in theirs)
        if len(mine) == len(theirs) and in_place and 2 * len(unknown) > len(mine):
            return
        if unknown:
            raise ValueError(
                f"has {len(mine)} classes, the network {len(theirs)}, among which there is no {unknown[0]!r}: labels "
                "cannot be told apart"
            )
        if unclear := twice.intersection(mine):
            raise ValueError(f"has two classes {min(unclear)!r}, or the network has: labels cannot be told apart")
        places = torch.tensor([theirs.index(name) for name in mine])
        if self.multi_label:
            self.labels = torch.zeros(len(self), len(theirs)).index_copy(1, places, self.labels)
        else:
            self.labels = places[self.labels]
        self.classes = theirs

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        try:
            image = read_image(self._images[index])
            item = image if self.transform is None else self.transform(image)
        except ImageError as error:
            place = getattr(self._images, "place", None)  # of images that are no files of their own
            where = "" if place is None else f" ({place(index)})"
            raise ImageError(f"image {index}: {error}{where}") from error
        return item, self.labels[index] if self.multi_label else int(self.labels[index])


def _checked(given: Any, num_classes: int) -> Tensor:
    try:
        labels = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`labels` must be indices of classes, or rows of zeros and ones: {error}") from error
    if labels.ndim not in (1, 2):
        raise ValueError(f"`labels` of shape {tuple(labels.shape)} must be (N,) indices, or (N, {num_classes})")
    if labels.ndim == 2:
        if labels.shape[1] != num_classes:
            raise ImageError(f"labels of shape {tuple(labels.shape)} do not fit {num_classes} classes")
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ImageError("labels of several classes must be zeros and ones")
        return labels.to(torch.float32)
    if labels.is_floating_point():
        raise TypeError(f"`labels` must be integers, got {labels.dtype}")
    labels = labels.to(torch.int64)
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ImageError(f"labels from {low} to {high} do not fit {num_classes} classes")
    return labels


def index_labels(
    values: Sequence[Any], names: Sequence[str] | None
) -> tuple[Sequence[int] | Sequence[Sequence[int]], Sequence[str]]:
    """Labels as they are stored, to those of `ImageDataset`, and the classes.

    Args:
        values: Integers, or strings, which become the classes in sorted order, or lists of these.
        names: Names of integer classes, if they are known.

    Raises:
        ImageError: If the labels disagree on the type, or can hardly be class indices.
    """
    several = bool(values) and isinstance(values[0], (list, tuple))
    if several and not all(isinstance(value, (list, tuple)) for value in values):
        raise ImageError("the labels disagree on the type: some are lists, and others are not")
    repeated = next((value for value in values if several and len(set(value)) != len(value)), None)
    if repeated is not None:
        raise ImageError(f"a list of labels holds one twice ({repeated!s:.60}): give class indices, not zeros and ones")
    if several and len(values) > 1 and all(sorted(map(str, value)) == ["0", "1"] for value in values):
        raise ImageError("all lists of labels hold 0 and 1: give class indices, not zeros and ones")
    flat = [label for value in values for label in value] if several else values
    types = {type(value) for value in flat}
    if len(types) > 1:
        raise ImageError(f"the labels disagree on the type: {', '.join(sorted(each.__name__ for each in types))}")
    if types - {int, str}:
        raise ImageError(f"labels must be integers or strings, not {types.pop().__name__}")
    if str in types:
        classes: Sequence[str] = sorted(set(flat))
        positions: dict[Any, int] = {name: position for position, name in enumerate(classes)}
        values = values if several else [positions[value] for value in values]
    else:
        largest = max(flat, default=0)
        if names is None and largest >= _MOST_UNNAMED_CLASSES:
            raise ImageError(f"labels up to {largest} without class names can hardly be class indices")
        classes = [str(label) for label in range(largest + 1)] if names is None else names
        positions = {label: label for label in range(len(classes))}
    if not several:
        return values, classes
    outside = [label for label in flat if label not in positions]
    if outside:
        raise ImageError(f"label {outside[0]!r} does not fit {len(classes)} classes")
    rows = [[0] * len(classes) for _ in values]
    for row, value in zip(rows, values, strict=True):
        for label in value:
            row[positions[label]] = 1
    return rows, classes
