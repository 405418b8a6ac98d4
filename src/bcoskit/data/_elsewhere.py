"""Labelled images that other libraries know by name: torchvision and Hugging Face datasets."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from bcoskit.data._images import ImageError, ImageSource
from bcoskit.data._labelled import ImageDataset, Transform, index_labels
from bcoskit.data._parquet import LABEL_COLUMNS, SPLITS

_ALSO: dict[str, tuple[str, ...]] = {"train": ("trainval", "train-standard"), "test": ()}
_LABELS = ("targets", "labels", "_labels", "_samples")


def torchvision_images(
    name: str, split: Literal["train", "test"], transform: Transform | None = None, *, download: bool = False
) -> ImageDataset:
    """One split of a dataset of torchvision, in torch's folder of downloads.

    Args:
        name: Class in `torchvision.datasets`, such as `"CIFAR100"` or `"Flowers102"`.
        split: `"train"` or `"test"`, which may also be called `val`.
        transform: Applied to the upright RGB image; without it the items hold the image itself.
        download: Whether to download it if it is not there.

    Raises:
        ImageError: If there is no such dataset of labelled images, or it is not found and not downloaded.
    """
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        raise ImageError(f"torchvision has no dataset {name!r}")
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {"download": download} if "download" in parameters else {}
    root = Path(torch.hub.get_dir(), name.lower())
    if "train" in parameters:
        choices: Sequence[dict[str, Any]] = ({"train": split == "train"},)
    elif "split" in parameters:
        choices = [{"split": word} for word in (*SPLITS[split], *_ALSO[split])]
    else:
        raise ImageError(f"the dataset {name!r} of torchvision has no splits")
    dataset = _first_that_opens(lambda choice: kind(root, **options, **choice), choices, f"torchvision:{name}", root)
    labels = next((getattr(dataset, attribute) for attribute in _LABELS if hasattr(dataset, attribute)), None)
    if labels is None:
        raise ImageError(f"the dataset {name!r} of torchvision has no labels that could be read at once")
    try:
        labels = [label[1] if isinstance(label, tuple) else int(label) for label in labels]
    except (TypeError, ValueError) as error:
        raise ImageError(f"the dataset {name!r} of torchvision has labels that are no classes ({error})") from error
    names = getattr(dataset, "classes", None)
    if names is not None:  # some have several for a class
        names = [", ".join(each) if isinstance(each, tuple) else each for each in names]
    indices, classes = index_labels(labels, names)
    return ImageDataset(_First(dataset), indices, classes, transform)


def hugging_face_images(name: str, split: Literal["train", "test"], transform: Transform | None = None) -> ImageDataset:
    """One split of a dataset of the Hugging Face hub, or of a folder that `datasets` reads; images stay on disk.

    Args:
        name: Name on the hub, such as `"user/name"`; a folder in one of the hub's layouts (images, parquet or tar
            files); or one that `save_to_disk` has written.
        split: `"train"` or `"test"`, which may also be called `val` or `validation`.
        transform: Applied to the upright RGB image; without it the items hold the image itself.

    Raises:
        ImageError: If it cannot be loaded, has no such split, or no column of images and one of labels.
        ModuleNotFoundError: If `datasets` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Hugging Face datasets need datasets: pip install "bcoskit[hub]"') from error

    def load(word: str) -> Any:
        if (Path(name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(name)[word]
        found = datasets.load_dataset(name, split=word)
        if any(all(label == -1 for label in found[column]) for column in LABEL_COLUMNS if column in found.features):
            raise ImageError(f"the split {word!r} has no labels")
        return found

    found = _first_that_opens(load, SPLITS[split], f"hf:{name}", None)
    images = [column for column, feature in found.features.items() if isinstance(feature, datasets.Image)]
    kinds = {column: getattr(feature, "feature", feature) for column, feature in found.features.items()}
    named = [column for column, feature in kinds.items() if isinstance(feature, datasets.ClassLabel)]
    labels = named if len(named) == 1 else [column for column in LABEL_COLUMNS if column in (named or kinds)]
    if len(images) != 1 or len(labels) != 1:
        raise ImageError(f"hf:{name}: must have one column of images and one of labels, has {list(found.features)}")
    indices, classes = index_labels(list(found[labels[0]]), getattr(kinds[labels[0]], "names", None))
    encoded = found.select_columns(images).cast_column(images[0], datasets.Image(decode=False))
    return ImageDataset(_Encoded(encoded, images[0]), indices, classes, transform)


class _First:
    """The images of a dataset of pairs."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Image.Image:
        try:
            return self._dataset[index][0]
        except Exception as error:  # of damaged files, whatever reads them
            raise ImageError(str(error) or type(error).__name__) from error


class _Encoded:
    """The images of a column, as bytes or as the paths of files."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset, column

    def __len__(self) -> int:
        return len(self._dataset)

    def place(self, index: int) -> str:
        """The row, and the path of the image if the dataset knows one."""
        path = (self._dataset[index][self._column] or {}).get("path")
        return f"row {index % len(self)}" + (f", {path}" if path else "")

    def __getitem__(self, index: int) -> ImageSource:
        image = self._dataset[index][self._column]
        if image is None or (image["path"] is None and image["bytes"] is None):
            raise ImageError("is missing")
        return image["path"] if image["bytes"] is None else image["bytes"]


def _first_that_opens(load: Callable[[Any], Any], choices: Sequence[Any], title: str, root: Path | None) -> Any:
    reasons: list[str] = []
    lacking = True
    for choice in choices:
        try:
            return load(choice)
        except Exception as error:  # networks, files and scripts of others have failures of every kind
            reasons.append(" ".join(str(error).split()) or type(error).__name__)
            lacking = isinstance(error, (ValueError, KeyError))  # which say that there is no such split
            if not lacking:
                break
    if len(reasons) == len(choices) and lacking:
        raise ImageError(f"{title}: has no such split: {reasons[0]}")
    where = "" if root is None else f" in {root} (`download` gets it if torchvision can)"
    raise ImageError(f"{title}: cannot be opened{where}: {reasons[-1]}")
