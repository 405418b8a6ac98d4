"""What runs of `bcoskit train` and `bcoskit align` have logged, read back."""

import csv
from pathlib import Path


def logged(run: Path, column: str) -> list[dict[str, str]]:
    """The rows that have a value in a column, one per epoch: of one that was resumed, what it logged last."""
    rows: dict[int, dict[str, str]] = {}
    for file in sorted((run / "csv").glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        with file.open() as lines:
            rows |= {int(row["epoch"]): row for row in csv.DictReader(lines) if row.get(column)}
    return [rows[epoch] for epoch in sorted(rows)]


def accuracies(run: Path) -> list[float]:
    """On the test images, after each epoch."""
    return [float(row["test_accuracy"]) for row in logged(run, "test_accuracy")]
