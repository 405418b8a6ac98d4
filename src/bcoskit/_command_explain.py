"""`bcoskit explain`: images of any number, in batches, in constant memory."""

import json as json_lines
import math
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

from bcoskit._command_pictures import count_images, with_pictures
from bcoskit._explain import Explanation, explain
from bcoskit._files import unfinished_file
from bcoskit._text import printable
from bcoskit.data import ImageError, ImageTransform, read_image
from bcoskit.data._images import pixels
from bcoskit.models import create_model
from bcoskit.viz import SheetRow, sheet

_LISTED_FAILURES = 20
_NAME_WIDTH = 28


def explain_images(
    images: list[str],
    *,
    model: str = "resnet20.bcos_cifar10",
    weights: str | None = None,
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
        model: Name of a network, or a file that training has written.
        weights: File or URL of the network's weights, for instance one of the authors'; by default those that go with
            its name.
        target: Name or index of a class that is explained in any case, before the largest ones.
        top: How many classes are explained.
        out: Folder for the pictures, which keep the structure of a folder of images. Below a folder of images, it is
            left out of them.
        save: Also write the tensors of each explanation, as a .safetensors file beside the picture.
        json: Print one JSON object per image instead of the table.
        shares: Evaluate all constants of the network, so that the residual tests the explanation.
        batch_size: Images that are explained at once.
        device: Where to compute, such as cpu or cuda; by default cuda where there is one.

    Returns:
        The exit code: 0, or 1 if some images could not be explained.

    Raises:
        ValueError: If an option is out of its range, a picture would overwrite an image, or no image could be
            explained.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be at least 1")
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` (={str(out)!r}) must be a folder")
    place = _device(device)
    network = _Network.load(model, weights, place)
    if not 1 <= top <= len(network.classes):
        raise ValueError(f"`top` (={top}) must be between 1 and the number of classes, {len(network.classes)}")
    wanted = None if target is None else network.class_index(target)

    report = _Report(json, network.classes, count_images(images, out))
    with report:
        for batch in _batches(_readable(with_pictures(images, out), network.transform, report), batch_size):
            x = network.transform.encode_pixels(torch.stack([pixels(item.image) for item in batch]))
            explanation = network.explain(x.to(place), wanted, top, shares)
            probabilities = network.probabilities(explanation)
            for index, item in enumerate(batch):
                one = explanation[index]
                _write(item, one, network, probabilities[index], save)
                report.explained(item, one, probabilities[index])
    return report.exit_code()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` (={name!r}) cannot be used: {error}") from error
    return device


@dataclass(frozen=True)
class _Item:
    """An image as the network sees it, the file that it comes from, and the file of its picture."""

    path: Path
    picture: Path
    image: Image.Image


@dataclass(frozen=True)
class _Network:
    """A network with trained weights, and what it knows of its classes and images."""

    model: nn.Module
    transform: ImageTransform
    classes: tuple[str, ...]
    loss: str

    @classmethod
    def load(cls, name: str, weights: str | None, device: torch.device) -> "_Network":
        model = create_model(name, weights=True if weights is None else weights)
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
        """Of the explained classes, (N, K); NaN if the outputs are no classes."""
        assert explanation.target is not None
        logits = explanation.logits
        if self.loss == "none":
            return torch.full(explanation.target.shape, math.nan)
        table = logits.sigmoid() if self.loss == "bce" else logits.softmax(1)
        return table.gather(1, explanation.target)


def _readable(files: Iterator[tuple[Path, Path]], transform: ImageTransform, report: "_Report") -> Iterator[_Item]:
    for path, picture in files:
        image = None
        try:
            image = read_image(path)
            yield _Item(path, picture, transform.view(image))
        except ImageError as error:
            report.failed(path, str(error) if image is None else f"{path}: {error}")


def _batches(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    while batch := list(islice(items, size)):
        yield batch


def _write(item: _Item, explanation: Explanation, network: _Network, probabilities: Tensor, save: bool) -> None:
    assert explanation.target is not None
    colored = network.transform.encoding == "bcos"
    rows = [
        SheetRow(
            f"{_cell(network.classes[int(index)])}\np = {_probability(probability)}, logit {value:.2f}",
            explanation.contributions[0, rank],
            explanation.weights[0, rank] if colored else None,
        )
        for rank, (index, probability, value) in enumerate(
            zip(explanation.target[0], probabilities, explanation.value[0], strict=True)
        )
    ]
    smooth = max(1, round(item.image.width / 30)) | 1
    page = sheet(item.image, rows, title=printable(item.path.name), smooth=smooth)
    item.picture.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_file(item.picture)
    try:
        page.save(unfinished, format="PNG")
        unfinished.replace(item.picture)
    finally:
        unfinished.unlink(missing_ok=True)
    if save:
        explanation.save(item.picture.with_suffix(".safetensors"))


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
        self._console, self._errors = (
            Console(stderr=stderr, soft_wrap=True, markup=False, emoji=False, highlight=False)
            for stderr in (False, True)
        )
        columns = (TextColumn("Explaining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # The bar shares the terminal with the table; what is no terminal stays free of it.
        shared = self._console.is_terminal and not self.json
        self._progress = Progress(*columns, console=self._console if shared else self._errors, transient=True)
        self._task = self._progress.add_task("Explaining", total=self.total)
        self._width = max(len("class"), *(len(_cell(name)) for name in self.classes))

    def __enter__(self) -> "_Report":
        if self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def explained(self, item: _Item, explanation: Explanation, probabilities: Tensor) -> None:
        """Tell of one image."""
        rows = _figures(explanation, probabilities, self.classes)
        if self.json:
            line = {"image": str(item.path), "picture": str(item.picture), "classes": rows}
            _print(self._console, json_lines.dumps(line))
        else:
            self._tell(item.path.name, rows)
        self.done += 1
        self._progress.advance(self._task)

    def _tell(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.done == 0:
            titles = f"{'image':<{_NAME_WIDTH}}  {'class':<{self._width}}  {'probability':>11}  {'logit':>9}"
            _print(self._console, f"{titles}  {'W(x)·x':>9}  {'constants':>9}  {'residual':>9}", "bold")
        for rank, row in enumerate(rows):
            image = _cell(name) if rank == 0 else ""
            residual = "-" if row["residual"] is None else f"{row['residual']:.0e}"
            figures = f"{_probability(row['probability'], 4):>11}  {row['logit']:>9.4f}  {row['contributions']:>9.4f}"
            line = f"{image:<{_NAME_WIDTH}}  {_cell(row['class']):<{self._width}}  {figures}"
            _print(self._console, f"{line}  {row['bias']:>9.4f}  {residual:>9}")

    def failed(self, path: Path, reason: str) -> None:
        """Tell of an image that cannot be explained."""
        self.failures += 1
        self._progress.advance(self._task)
        if len(self.listed) < _LISTED_FAILURES:
            self.listed.append(reason)
        if self.json:
            _print(self._console, json_lines.dumps({"image": str(path), "error": reason}))

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
        _print(self._errors, f"{self.failures} of {self.done + self.failures} images could not be explained:")
        for reason in self.listed:
            _print(self._errors, f"  {printable(reason)}")
        if self.failures > len(self.listed):
            _print(self._errors, f"  and {self.failures - len(self.listed)} more")
        return 1


def _figures(explanation: Explanation, probabilities: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    assert explanation.target is not None
    residual = explanation.residual
    return [
        {
            "class": classes[int(index)],
            "index": int(index),
            "probability": None if math.isnan(probabilities[rank]) else float(probabilities[rank]),
            "logit": float(explanation.value[0, rank]),
            "contributions": float(explanation.value[0, rank] - explanation.bias[0, rank]),
            "bias": float(explanation.bias[0, rank]),
            "residual": None if residual is None else float(residual[0, rank].abs()),
        }
        for rank, index in enumerate(explanation.target[0])
    ]


def _probability(value: float | Tensor | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _print(console: Console, line: str, style: str | None = None) -> None:
    """One line, in the characters that the terminal or the file has."""
    console.print(line.encode(console.encoding, "replace").decode(console.encoding), style=style)


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 1] + "…"
