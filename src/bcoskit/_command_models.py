"""`bcoskit models`."""

import json as json_module
from typing import Any

from rich.console import Console
from rich.table import Table

from bcoskit.models import create_model, list_models, model_row


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
    for title in ("model", "parameters", "input", "weights", "accuracy"):
        table.add_column(title, no_wrap=title != "accuracy")
    for row in rows:
        weights = "yes" if row["weights"] else "-"
        table.add_row(row["model"], f"{row['parameters']:,}", row["input"], weights, row["accuracy"] or "-")
    Console().print(table)
    return 0


def _row(name: str) -> dict[str, Any]:
    row = model_row(name)
    parameters = sum(parameter.numel() for parameter in create_model(name).parameters())
    return {
        "model": name,
        "parameters": parameters,
        "input": f"{row.transform.size}x{row.transform.size}",
        "weights": row.weights is not None,
        "accuracy": row.accuracy,
    }
