"""The one loop of all metrics: units are measured chunk by chunk, and one that fails does not lose the others."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from bcoskit._checks import check_evaluation_mode
from bcoskit._devices import device_of
from bcoskit.evaluation._methods import name_of, resolve
from bcoskit.evaluation._result import Failure, Result, Row

_PATIENCE = 5  # parts from all over that may fail for one and the same reason, until nothing is expected to succeed

Part: TypeAlias = tuple[list[Row], list[Failure]]
"""What is found of some units."""


class Metric(Protocol):
    """A metric: which units there are, and what is measured of some of them."""

    @property
    def name(self) -> str:
        """As in results."""
        ...

    @property
    def needs_method(self) -> bool:
        """Whether an attribution method is measured."""
        ...

    def units(self, model: nn.Module, dataset: Any, ranking: Sequence[Row]) -> Sequence[Any]:
        """What is measured: grids, or images. `ranking` has the prediction of every image, see `Accuracy`."""
        ...

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[Any], method: Any) -> list[list[Row]]:
        """The rows of each unit."""
        ...


def chunks(count: int, size: int) -> list[range]:
    """The numbers of the units that are measured together; the same for each number of processes."""
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]


def in_turn(numbers: Sequence[int]) -> list[int]:
    """Numbers in the order in which they are worked on: some from all over first, of which one will fare as the rest.

    Images that fail alike often stand together, such as those of a class.
    """
    last = len(numbers) - 1
    places = [round(place * last / (_PATIENCE - 1)) for place in range(_PATIENCE)] if numbers else []
    spread = {numbers[place] for place in places}
    return [*sorted(spread), *(number for number in numbers if number not in spread)]


def measure_chunk(
    metric: Metric, model: nn.Module, dataset: Any, units: Sequence[Any], numbers: range, method: Any
) -> Part:
    """The rows of some units, together if they succeed together, else one by one."""
    try:
        found: list[list[Row]] = metric.measure(model, dataset, [units[number] for number in numbers], method)
        _check_scores(found)
        return _numbered(found, numbers), []
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # whatever images, networks and users' methods raise: it must not lose the run
        if len(numbers) == 1:
            known = isinstance(error, (ValueError, RuntimeError, OSError)) and str(error)
            reason = str(error) if known else f"{type(error).__name__}: {error}"
            return [], [Failure(numbers[0], " ".join(reason.split()))]
    rows: list[Row] = []
    failures: list[Failure] = []
    for number in numbers:
        more, failed = measure_chunk(metric, model, dataset, units, range(number, number + 1), method)
        rows += more
        failures += failed
    return rows, failures


def _check_scores(found: list[list[Row]]) -> None:
    """Refuse scores that are not finite: a summary of them would not be either."""
    for score in (row["score"] for rows in found for row in rows):
        if not math.isfinite(score):
            raise ValueError(f"its score is {score}: logits or contributions are not finite, or too large to be added")


def _numbered(found: list[list[Row]], numbers: range) -> list[Row]:
    return [{"unit": number, **row} for number, rows in zip(numbers, found, strict=True) for row in rows]


def run_metric(
    metric: Metric,
    model: nn.Module,
    dataset: Any,
    method: Any = None,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], object] | None = None,
    ranking: Sequence[Row] = (),
) -> Result:
    """Measure all units of a metric.

    Args:
        metric: The metric.
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, label, …).
        method: Attribution method, see `attribute`.
        batch_size: Units that are measured at once.
        progress: Called as `progress(done, total)`.
        ranking: Rows of `Accuracy`, for metrics that choose images by them.

    Raises:
        ValueError: If no unit can be measured, with the first reason.
    """
    check_evaluation_mode(model)
    if metric.needs_method:
        resolve(method)  # raises for what is none
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be at least 1")
    units = metric.units(model, dataset, ranking)
    check_hopeful({}, len(units))
    parts = chunks(len(units), batch_size)
    found: dict[int, Part] = {}
    for index in in_turn(range(len(parts))):
        found[index] = measure_chunk(metric, model, dataset, units, parts[index], method)
        check_hopeful(found, len(units))
        if progress is not None:
            progress(sum(len(parts[done]) for done in found), len(units))
    rows, failures = merged(found)
    name = name_of(method) if metric.needs_method else None
    return Result(metric.name, name, tuple(rows), settings_of(metric), tuple(failures))


def merged(parts: Mapping[int, Part]) -> Part:
    """The rows and failures of all parts, in their order."""
    ordered = [parts[index] for index in sorted(parts)]
    return [row for rows, _ in ordered for row in rows], [each for _, failures in ordered for each in failures]


def check_hopeful(parts: Mapping[int, Part], total: int) -> None:
    """Raise the first reason if nothing has succeeded, and nothing can be expected to.

    Raises:
        ValueError: If all units have failed, or those from all over for the same reason; or if there are none.
    """
    if total == 0:
        raise ValueError("`dataset` holds no images")
    if any(rows for rows, _ in parts.values()):
        return
    _, failures = merged(parts)
    alike = len(parts) >= _PATIENCE and len({failure.reason for failure in failures}) == 1
    if len(failures) >= total or alike:
        raise ValueError(failures[0].reason)


def settings_of(metric: Metric) -> dict[str, Any]:
    """The fields of a metric."""
    assert is_dataclass(metric) and not isinstance(metric, type)
    return asdict(metric)


def labels_of(dataset: Any) -> Tensor | None:
    """The labels of a dataset that has them at hand, so that no image need be decoded: class indices (images,)."""
    labels = getattr(dataset, "labels", None)
    if not isinstance(labels, (Tensor, np.ndarray, list, tuple)):
        return None
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # such as names
        return None
    is_index = found.shape == (len(dataset),) and not found.is_floating_point() and found.dtype != torch.bool
    return found.long() if is_index else None


def item_of(dataset: Any, index: int) -> tuple[Any, ...]:
    """An item of a dataset: encoded image (C, H, W), label as int, and what may follow.

    Raises:
        ValueError: If it cannot be read, or is none.
    """
    try:
        item = dataset[index]
    except Exception as error:  # decoders raise nearly every kind of exception
        raise ValueError(f"image {index}: {str(error) or type(error).__name__}") from error
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise ValueError(
            f"image {index}: an item of `dataset` must be (encoded image, label), not {type(item).__name__}"
        )
    x = torch.as_tensor(item[0])
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(
            f"image {index}: must be encoded, (C, H, W) and floating point, not {tuple(x.shape)}, {x.dtype}"
        )
    try:
        label = torch.as_tensor(item[1] if item[1] is not None else torch.nan)
    except (TypeError, ValueError, RuntimeError):  # such as a name
        label = torch.tensor(torch.nan)
    if label.numel() != 1 or label.is_floating_point() or label.dtype == torch.bool or int(label) < 0:
        raise ValueError(f"image {index}: the label {item[1]!r} must be the index of a class")
    return x, int(label), *item[2:]


def stacked(model: nn.Module, items: Sequence[Tensor]) -> Tensor:
    """Encoded images as one batch on the device of the network.

    Raises:
        ValueError: If their shapes differ.
    """
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"`dataset` holds images of different shapes, {' and '.join(map(str, sorted(shapes)))}")
    return torch.stack(list(items)).to(device_of(model))
