"""`bcoskit models`."""

import json as json_module
from functools import cache
from importlib import resources
from typing import Any

from rich.console import Console
from rich.table import Table

from bcoskit.models import list_models, model_row

_WIDTH = 160  # of a table that goes to a file


def show_models(pattern: str = "*", *, json: bool = False) -> int:
    """List the networks that are known by name.

    Args:
        pattern: Shell pattern that names must match.
        json: Print JSON instead of a table.

    Returns:
        The exit code.

    Raises:
        ValueError: If no name matches.
    """
    names = list_models(pattern)
    if not names:
        raise ValueError(f"`pattern` (={pattern!r}) matches no model; `bcoskit models` lists all")
    rows = [_row(name) for name in names]
    if json:
        Console().print_json(json_module.dumps(rows))
        return 0
    table = Table()
    for title in ("model", "parameters", "input", "accuracy", "weights"):
        table.add_column(title, overflow="fold", justify="right" if title == "parameters" else "left")
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:g} % ({row['measured_on']})"
        table.add_row(row["model"], f"{row['parameters']:,}", row["input"], accuracy, row["weights"] or "-")
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(table)
    return 0


def _row(name: str) -> dict[str, Any]:
    row = model_row(name)
    size, checkpoint = row.transform.size, row.checkpoint
    return {
        "model": name,
        "parameters": _parameters()[name],
        "input": f"{row.in_channels}x{size}x{size}",
        "accuracy": None if checkpoint is None else checkpoint.accuracy,
        "measured_on": None if checkpoint is None or checkpoint.accuracy is None else checkpoint.measured_on,
        "weights": None if checkpoint is None else checkpoint.source,
        "licence": None if checkpoint is None else checkpoint.licence,
        "sha256": None if checkpoint is None else checkpoint.sha256,
    }


@cache
def _parameters() -> dict[str, int]:
    """How many parameters each network has; to build all of them would take half a minute."""
    return json_module.loads((resources.files("bcoskit.assets") / "parameters.json").read_text())
