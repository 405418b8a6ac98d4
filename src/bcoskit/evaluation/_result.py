"""What a metric finds: rows, and their summary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

Row: TypeAlias = dict[str, Any]
_PARTED_BY = ("kind", "layer")  # columns of rows that have no common summary


@dataclass(frozen=True)
class Failure:
    """A unit that could not be measured.

    Attributes:
        unit: Its number among the units of the metric, or of the image in the dataset.
        reason: Why.
    """

    unit: int
    reason: str


@dataclass(frozen=True)
class Result:
    """The rows of one metric, one per image, target and method, each with a `score`.

    Attributes:
        metric: Its name.
        method: Name of the attribution method, or None where none is measured.
        rows: In the order of the units, whatever order they were measured in.
        settings: Of the metric.
        failures: Units that could not be measured.
    """

    metric: str
    method: str | None
    rows: Sequence[Row]
    settings: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[Failure] = ()

    def parts(self) -> "dict[str, Result]":
        """The rows of each kind or layer by its name, where they differ in what they measure; else all, by ""."""
        column = next((name for name in _PARTED_BY if self.rows and name in self.rows[0]), None)
        if column is None:
            return {"": self}
        names = dict.fromkeys(row[column] for row in self.rows)
        return {name: replace(self, rows=tuple(row for row in self.rows if row[column] == name)) for name in names}

    @property
    def scores(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The scores of all rows, (rows,)."""
        return np.array([row["score"] for row in self.rows], dtype=np.float64)

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return float(self.scores.mean())

    @property
    def median(self) -> float:
        """Median of the scores."""
        return float(np.median(self.scores))

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25th and the 75th percentile of the scores, interpolated linearly."""
        low, high = np.percentile(self.scores, (25, 75))
        return float(low), float(high)

    def interval(self, level: float = 0.95, *, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of the median (Efron, 1979): scores of one unit, such as a grid, are drawn together.

        Args:
            level: Share of the resampled medians inside.
            samples: How often the units are drawn, with replacement.
            seed: Of the draws.

        Raises:
            ValueError: If `level` is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"`level` (={level}) must be between 0 and 1")
        scores = self.scores
        units = np.array([row["unit"] for row in self.rows])
        names, inverse = np.unique(units, return_inverse=True)
        groups = [scores[inverse == index] for index in range(len(names))]
        generator = np.random.default_rng(seed)
        medians = [
            float(
                np.median(
                    np.concatenate([groups[index] for index in generator.integers(len(groups), size=len(groups))])
                )
            )
            for _ in range(samples)
        ]
        low, high = np.percentile(medians, (50 * (1 - level), 50 * (1 + level)))
        return float(low), float(high)

    def summary(self) -> dict[str, float]:
        """Count, mean, median, quartiles and the interval of the median."""
        low, high = self.interval()
        first, third = self.quartiles
        return {
            "count": len(self.rows),
            "mean": self.mean,
            "median": self.median,
            "first_quartile": first,
            "third_quartile": third,
            "interval_low": low,
            "interval_high": high,
        }
