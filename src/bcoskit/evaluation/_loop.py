"""The one loop of all metrics: units are measured chunk by chunk, and one that fails does not lose the others."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bcoskit.evaluation._methods import name_of
from bcoskit.evaluation._result import Failure, Result, Row

_PATIENCE = 5  # failures of the first units, after which none is expected to succeed

Expected = (ValueError, RuntimeError, OSError)
"""What images, networks and methods raise; anything else is a fault of the code and stops the run."""


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


def measure_chunk(
    metric: Metric, model: nn.Module, dataset: Any, units: Sequence[Any], numbers: range, method: Any
) -> tuple[list[Row], list[Failure]]:
    """The rows of some units, together if they succeed together, else one by one."""
    try:
        found: list[list[Row]] = metric.measure(model, dataset, [units[number] for number in numbers], method)
        return _numbered(found, numbers), []
    except Expected as error:
        if len(numbers) == 1:
            return [], [Failure(numbers[0], " ".join(str(error).split()))]
    rows: list[Row] = []
    failures: list[Failure] = []
    for number in numbers:
        more, failed = measure_chunk(metric, model, dataset, units, range(number, number + 1), method)
        rows += more
        failures += failed
    return rows, failures


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
    units = metric.units(model, dataset, ranking)
    rows: list[Row] = []
    failures: list[Failure] = []
    for numbers in chunks(len(units), batch_size):
        more, failed = measure_chunk(metric, model, dataset, units, numbers, method)
        rows += more
        failures += failed
        check_hopeful(rows, failures, len(units))
        if progress is not None:
            progress(numbers.stop, len(units))
    name = name_of(method) if metric.needs_method else None
    return Result(metric.name, name, tuple(rows), settings_of(metric), tuple(failures))


def check_hopeful(rows: Sequence[Row], failures: Sequence[Failure], total: int) -> None:
    """Raise the first reason if nothing has succeeded, and enough has failed to expect nothing else."""
    if not rows and len(failures) >= min(_PATIENCE, total):
        raise ValueError(failures[0].reason)


def settings_of(metric: Metric) -> dict[str, Any]:
    """The fields of a metric."""
    assert is_dataclass(metric) and not isinstance(metric, type)
    return asdict(metric)


def stacked(model: nn.Module, items: Sequence[Tensor]) -> Tensor:
    """Encoded images as one batch on the device of the network.

    Raises:
        ValueError: If their shapes differ.
    """
    shapes = {tuple(item.shape) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"`dataset` holds images of different shapes, {' and '.join(map(str, sorted(shapes)))}")
    first = next(chain(model.parameters(), model.buffers()), None)
    batch = torch.stack(list(items))
    return batch if first is None else batch.to(first.device)
