"""`bcoskit explain`: images of any number, in batches, in constant memory."""

import json as json_lines
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from bcoskit._explain import Explanation, explain
from bcoskit.data import ImageError, ImageTransform, find_images, read_image
from bcoskit.models import create_model
from bcoskit.viz import SheetRow, sheet

_LISTED_FAILURES = 20


def explain_images(
    images: list[str],
    *,
    model: str = "resnet20.bcos_cifar10",
    target: str | None = None,
    top: int = 3,
    out: Path = Path("explanations"),
    save: bool = False,
    json: bool = False,
    shares: bool = True,
    batch_size: int = 16,
    device: str | None = None,
) -> int:
    """Explain images by a network: a table of classes, and a picture for each image.

    Args:
        images: Images, folders of images, and patterns.
        model: Name of a network with trained weights, or a file that training has written.
        target: Name or index of a class that is explained in any case, before the largest ones.
        top: How many classes are explained.
        out: Folder for the pictures.
        save: Also write the tensors of each explanation, as a .safetensors file beside the picture.
        json: Print one JSON object per image instead of the table.
        shares: Evaluate all constants of the network, so that the residual tests the explanation.
        batch_size: Images that are explained at once.
        device: Where to compute, such as cpu or cuda; by default cuda where there is one.

    Returns:
        The exit code: 0, or 1 if some images could not be explained.

    Raises:
        ValueError: If an option is out of its range, or no image could be explained.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be at least 1")
    chosen = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    network = _Network.load(model, chosen)
    if not 1 <= top <= len(network.classes):
        raise ValueError(f"`top` (={top}) must be between 1 and the number of classes, {len(network.classes)}")
    wanted = None if target is None else network.class_index(target)
    out.mkdir(parents=True, exist_ok=True)

    total = sum(1 for _ in find_images(images))
    report = _Report(json, network.classes, total)
    with report:
        for batch in _batches(_readable(_named(images), network.transform, report), batch_size):
            x = torch.stack([network.transform(item.image) for item in batch]).to(chosen)
            explanation = network.explain(x, wanted, top, shares)
            probabilities = network.probabilities(explanation)
            for index, item in enumerate(batch):
                one = explanation[index]
                picture = out / f"{item.name}.png"
                _write(picture, item, one, network, probabilities[index], save)
                report.explained(item, one, probabilities[index], picture)
    return report.exit_code()


@dataclass(frozen=True)
class _Item:
    """An image, and the name of its picture without suffix, relative to the output folder."""

    path: Path
    name: str
    image: Image.Image


@dataclass(frozen=True)
class _Network:
    """A network with trained weights, and what it knows of its classes and images."""

    model: nn.Module
    transform: ImageTransform
    classes: tuple[str, ...]
    loss: str

    @classmethod
    def load(cls, name: str, device: torch.device) -> "_Network":
        model: Any = create_model(name, weights=not name.endswith(".safetensors"))
        return cls(model.to(device), model.transform, model.classes, model.loss)

    def class_index(self, target: str) -> int:
        """The index of a class given by name or index.

        Raises:
            ValueError: If there is no such class.
        """
        if target in self.classes:
            return self.classes.index(target)
        if target.isdecimal() and int(target) < len(self.classes):
            return int(target)
        listed = ", ".join(self.classes[:20]) + (" …" if len(self.classes) > 20 else "")
        raise ValueError(f"`target` (={target!r}) is neither a class nor an index below {len(self.classes)}: {listed}")

    def explain(self, x: Tensor, wanted: int | None, top: int, shares: bool) -> Explanation:
        """Explain the classes with the largest logits, the one that is wanted before them."""
        with torch.no_grad():
            logits = self.model(x)
        if wanted is not None:
            logits[:, wanted] = float("inf")
        return explain(self.model, x, logits.topk(top, dim=1).indices, shares=shares)

    def probabilities(self, explanation: Explanation) -> Tensor:
        """Of the explained classes, (N, K)."""
        logits = explanation.logits
        table = logits.sigmoid() if self.loss == "bce" else logits.softmax(1)
        assert explanation.target is not None
        return table.gather(1, explanation.target)


def _named(images: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """Image files, each with the name of its picture: folders keep their structure, and no name is given twice."""
    used: set[str] = set()
    folder: Path | None = None
    for given in images:
        root = Path(given)
        for path in find_images([given]):
            relative = path.relative_to(root) if root.is_dir() else Path(path.name)
            if root.is_dir() and path.parent != folder:
                # A folder's images come together, so that only its names need to be remembered.
                folder, used = path.parent, set()
            name = next(name for name in _candidates(relative) if name not in used)
            used.add(name)
            yield path, name


def _candidates(relative: Path) -> Iterator[str]:
    yield str(relative.with_suffix(""))
    yield str(relative)
    number = 2
    while True:
        yield f"{relative}-{number}"
        number += 1


def _readable(files: Iterator[tuple[Path, str]], transform: ImageTransform, report: "_Report") -> Iterator[_Item]:
    for path, name in files:
        try:
            yield _Item(path, name, transform.view(read_image(path)))
        except ImageError as error:
            report.failed(path, str(error))


def _batches(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while batch := list(islice(items, size)):
        yield batch


def _write(
    picture: Path, item: _Item, explanation: Explanation, network: _Network, probabilities: Tensor, save: bool
) -> None:
    assert explanation.target is not None
    colored = network.transform.encoding == "bcos"
    rows = [
        SheetRow(
            f"{network.classes[int(index)]}\np = {probability:.3f}, logit {value:.2f}",
            explanation.contributions[0, rank],
            explanation.weights[0, rank] if colored else None,
        )
        for rank, (index, probability, value) in enumerate(
            zip(explanation.target[0], probabilities, explanation.value[0], strict=True)
        )
    ]
    if picture.resolve() == item.path.resolve():
        raise ValueError(f"`out` (={str(picture.parent)!r}) would overwrite the image {item.path}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    unfinished = picture.with_name(f".{picture.name}.partial")
    smooth = max(1, round(item.image.width / 30)) | 1
    try:
        sheet(item.image, rows, title=item.path.name, smooth=smooth).save(unfinished, format="PNG")
        unfinished.replace(picture)
    finally:
        unfinished.unlink(missing_ok=True)
    if save:
        explanation.save(picture.with_suffix(".safetensors"))


@dataclass
class _Report:
    """What is told of the images while they are explained, and of the failures in the end."""

    json: bool
    classes: tuple[str, ...]
    total: int
    done: int = 0
    failures: int = 0
    listed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._errors = Console(stderr=True, soft_wrap=True, highlight=False)
        columns = (TextColumn("Explaining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # The bar shares the terminal with the table; machine-readable output stays free of it.
        self._progress = Progress(*columns, console=self._errors if self.json else self._console, transient=True)
        self._task = self._progress.add_task("Explaining", total=self.total)
        self._width = max(9, *(len(name) for name in self.classes))

    def __enter__(self) -> "_Report":
        self._progress.start()
        if not self.json:
            titles = f"{'image':<28}  {'class':<{self._width}}  {'probability':>11}  {'logit':>9}"
            self._console.print(f"{titles}  {'W(x)·x':>9}  {'constants':>9}  {'residual':>9}", style="bold")
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def explained(self, item: _Item, explanation: Explanation, probabilities: Tensor, picture: Path) -> None:
        """Tell of one image."""
        self.done += 1
        self._progress.advance(self._task)
        rows = _figures(explanation, probabilities, self.classes)
        if self.json:
            line = json_lines.dumps({"image": str(item.path), "picture": str(picture), "classes": rows})
            self._console.print(line, markup=False)
            return
        for rank, row in enumerate(rows):
            image = _shortened(item.path.name, 28) if rank == 0 else ""
            residual = "-" if row["residual"] is None else f"{row['residual']:.0e}"
            figures = f"{row['probability']:>11.4f}  {row['logit']:>9.4f}  {row['contributions']:>9.4f}"
            text = f"{image:<28}  {row['class']:<{self._width}}  {figures}  {row['bias']:>9.4f}  {residual:>9}"
            self._console.print(text, markup=False)

    def failed(self, path: Path, reason: str) -> None:
        """Tell of an image that cannot be explained."""
        self.failures += 1
        self._progress.advance(self._task)
        if len(self.listed) < _LISTED_FAILURES:
            self.listed.append(reason)
        if self.json:
            self._console.print(json_lines.dumps({"image": str(path), "error": reason}), markup=False)

    def exit_code(self) -> int:
        """Tell of the failures.

        Raises:
            ImageError: If there was nothing else.
        """
        if self.failures and not self.done:
            more = f" (and {self.failures - 1} more)" if self.failures > 1 else ""
            raise ImageError(f"{self.listed[0]}{more}")
        if not self.failures:
            return 0
        self._errors.print(
            f"{self.failures} of {self.done + self.failures} images could not be explained:", markup=False
        )
        for reason in self.listed:
            self._errors.print(f"  {reason}", markup=False)
        if self.failures > len(self.listed):
            self._errors.print(f"  and {self.failures - len(self.listed)} more", markup=False)
        return 1


def _figures(explanation: Explanation, probabilities: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    assert explanation.target is not None
    residual = explanation.residual
    return [
        {
            "class": classes[int(index)],
            "index": int(index),
            "probability": float(probabilities[rank]),
            "logit": float(explanation.value[0, rank]),
            "contributions": float(explanation.value[0, rank] - explanation.bias[0, rank]),
            "bias": float(explanation.bias[0, rank]),
            "residual": None if residual is None else float(residual[0, rank].abs()),
        }
        for rank, index in enumerate(explanation.target[0])
    ]


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
