"""What `bcoskit explain` tells of images: a line for each class or image, a bar, and the failures in the end."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from bcoskit._explain import Explanation
from bcoskit._text import printable
from bcoskit.data import ImageError

_LISTED_FAILURES = 20
_NAME_WIDTH = 28


@dataclass
class Report:
    """What is told of the images while they are explained, and of the failures in the end.

    Attributes:
        as_json: Whether there is one JSON object per image instead of the table.
        classes: Names of all classes.
        total: How many images there are.
        show_progress: Whether a terminal gets a bar.
    """

    as_json: bool
    classes: tuple[str, ...]
    total: int
    show_progress: bool = True
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
        shared = self._console.is_terminal and not self.as_json
        self._progress = Progress(*columns, console=self._console if shared else self._errors, transient=True)
        self._task = self._progress.add_task("Explaining", total=self.total)
        self._width = max(len("class"), *(len(cell(name)) for name in self.classes))

    def __enter__(self) -> "Report":
        if self.show_progress and self._progress.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def explained(self, path: Path, picture: Path, rows: list[dict[str, Any]]) -> None:
        """Tell of one image, by the figures of its classes."""
        if self.as_json:
            self._console.print(json.dumps({"image": str(path), "picture": str(picture), "classes": rows}))
        else:
            self._tell(path.name, rows)
        self.done += 1
        self._progress.advance(self._task)

    def _tell(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.done == 0:
            titles = f"{'image':<{_NAME_WIDTH}}  {'class':<{self._width}}  {'probability':>11}  {'logit':>9}"
            self._console.print(f"{titles}  {'W(x)·x':>9}  {'constants':>9}  {'residual':>9}", style="bold")
        for rank, row in enumerate(rows):
            image = cell(name) if rank == 0 else ""
            residual = "-" if row["residual"] is None else f"{row['residual']:.0e}"
            numbers = f"{probability(row['probability'], 4):>11}  {row['logit']:>9.4f}  {row['contributions']:>9.4f}"
            line = f"{image:<{_NAME_WIDTH}}  {cell(row['class']):<{self._width}}  {numbers}"
            self._console.print(f"{line}  {row['bias']:>9.4f}  {residual:>9}")

    def failed(self, path: Path, reason: str) -> None:
        """Tell of an image that cannot be explained."""
        self.failures += 1
        self._progress.advance(self._task)
        if len(self.listed) < _LISTED_FAILURES:
            self.listed.append(reason)
        if self.as_json:
            self._console.print(json.dumps({"image": str(path), "error": reason}))

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
        self._errors.print(f"{self.failures} of {self.done + self.failures} images could not be explained:")
        for reason in self.listed:
            self._errors.print(f"  {printable(reason)}")
        if self.failures > len(self.listed):
            self._errors.print(f"  and {self.failures - len(self.listed)} more")
        return 1


def figures(explanation: Explanation, probabilities: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """What is told of each explained class of one image, the first of a batch of one."""
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


def probability(value: float | Tensor | None, digits: int = 3) -> str:
    """A probability as it is shown, `-` if there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def cell(text: str) -> str:
    """A name, short enough for the table."""
    text = printable(text)
    return text if len(text) <= _NAME_WIDTH else text[: _NAME_WIDTH - 1] + "…"
