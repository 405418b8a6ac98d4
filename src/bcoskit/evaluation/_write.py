"""The outcome of a run: rows as Parquet and JSON, summaries as JSON and Markdown, figures."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import torch
from torch import nn

from bcoskit import viz
from bcoskit._files import whole_file
from bcoskit.evaluation._accuracy import accuracy_figures
from bcoskit.evaluation._grids import make_grid
from bcoskit.evaluation._loop import stacked
from bcoskit.evaluation._methods import attribute, name_of
from bcoskit.evaluation._result import Result, Row
from bcoskit.evaluation._run import SETTINGS, table_rows, write_text
from bcoskit.viz._pictures import photograph

_CURVES = {"deletion", "insertion", "perturbation"}
PERCENTILES = (10, 30, 50, 70, 90)
_CHANCE = {"grid_pointing": lambda settings: 1 / settings["grid"] ** 2}


def write_results(results: Sequence[Result], out: Path) -> dict[str, Any]:
    """Write `rows.parquet`, `rows.jsonl`, `summary.json`, `summary.md` and figures to the folder of a run.

    Args:
        results: Of `evaluate`.
        out: Its folder.

    Returns:
        The summary.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    settings = json.loads((out / SETTINGS).read_text())
    rows = list(table_rows(results, settings))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})
    with whole_file(out / "rows.parquet") as unfinished:
        pq.write_table(table, unfinished)
    write_text(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    summary = summary_of(results, settings)
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(out / "summary.md", markdown(summary))
    for name, chosen in _by_metric(results).items():
        if chosen[0].metric == "randomization":
            layer_plot(chosen, out / f"{name}.png")
            continue
        boxes = [(result.method, part, rows) for result in chosen for part, rows in result.parts().items()]
        labels = [f"{method}, {part}" if part else str(method) for method, part, _ in boxes]
        box_plot([rows for _, _, rows in boxes], out / f"{name}.png", labels=labels)
        if chosen[0].metric in _CURVES:
            curve_plot(chosen, out / f"{name}_curves.png")
    return summary


def _by_metric(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The methods' results of each metric; a metric with other settings has a name with a number."""
    found: dict[str, list[Result]] = {}
    for result in results:
        if result.method is None:
            continue
        names = itertools.chain((result.metric,), (f"{result.metric}_{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in found or found[name][0].settings == result.settings)
        found.setdefault(name, []).append(result)
    return found


def summary_of(results: Sequence[Result], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings, accuracy, and one line per metric and method."""
    lines = [
        {"metric": name, "part": part, "method": result.method, **rows.summary(), "failures": len(result.failures)}
        for name, chosen in _by_metric(results).items()
        for result in chosen
        for part, rows in result.parts().items()
    ]
    failures = [
        {"metric": result.metric, "method": result.method, "unit": failure.unit, "reason": failure.reason}
        for result in results
        for failure in result.failures
    ]
    figures = accuracy_figures(results[0].rows)
    return {**settings, "accuracy": figures, "results": lines, "failures": failures}


def title_of(line: dict[str, Any]) -> str:
    """The metric of a line of a summary, and the kind or layer that it is of."""
    return ", ".join(filter(None, (line["metric"], line["part"])))


def markdown(summary: dict[str, Any]) -> str:
    """The summary as Markdown tables."""
    names = {
        "top1": "top-1",
        "top5": "top-5",
        "calibration_error": "calibration error (probability)",
        "calibration_error_softmax": "calibration error (softmax)",
    }
    lines = [f"# {summary['model']}", "", f"{summary['images']} images.", "", "| figure | value |", "|---|---|"]
    lines += [f"| {names[name]} | {value:.4f} |" for name, value in summary["accuracy"].items()]
    if summary["results"]:
        lines += ["", "| metric | method | rows | median | 95 % interval | quartiles | mean | failed |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {title_of(line)} | {line['method']} | {line['count']} | {line['median']:.4g} "
            f"| {line['interval_low']:.4g} to {line['interval_high']:.4g} "
            f"| {line['first_quartile']:.4g} to {line['third_quartile']:.4g} "
            f"| {line['mean']:.4g} | {line['failures']} |"
            for line in summary["results"]
        ]
    return "\n".join(lines) + "\n"


def box_plot(results: Sequence[Result], file: Path, *, labels: Sequence[str] | None = None) -> None:
    """Scores of one metric, a box per result: median, quartiles, and whiskers to the 5th and 95th percentile.

    Args:
        results: Of one metric.
        file: The picture that is written.
        labels: Names of the boxes; by default the methods.
    """
    figure, axis = _figure(max(4.0, 0.8 * len(results) + 1.5), 3.6)
    names = list(labels) if labels is not None else [str(result.method) for result in results]
    boxes = axis.boxplot([result.scores for result in results], whis=(5, 95), showfliers=False, patch_artist=True)
    for box, name in zip(boxes["boxes"], names, strict=True):
        box.set_facecolor("#e8603c" if name.startswith("bcos") else "#b9c4d0")
    for line in boxes["medians"]:
        line.set_color("black")
    axis.set_xticks(range(1, len(names) + 1), [name.replace("_", " ") for name in names], rotation=35, ha="right")
    axis.set_ylabel(results[0].metric.replace("_", " "))
    axis.spines[["top", "right"]].set_visible(False)
    if results[0].metric in _CHANCE:
        axis.axhline(_CHANCE[results[0].metric](results[0].settings), color="grey", linestyle=":", linewidth=1)
        axis.set_ylim(0, 1)
    _save(figure, file)


def layer_plot(results: Sequence[Result], file: Path) -> None:
    """Median rank correlation after each layer that is made random, from the output to the input, a line per result."""
    layers = list(results[0].parts())
    figure, axis = _figure(max(4.0, 0.3 * len(layers) + 2), 3.6)
    for result in results:
        medians = [part.median for part in result.parts().values()]
        axis.plot(range(len(medians)), medians, marker="o", markersize=3, label=str(result.method).replace("_", " "))
    axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    axis.set(ylabel="rank correlation, median", ylim=(-1, 1), title="random from here to the output")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)
    _save(figure, file)


def curve_plot(results: Sequence[Result], file: Path) -> None:
    """Mean probability over the share of pixels, a line per result."""
    figure, axis = _figure(5, 3.4)
    for result in results:
        curves = np.array([row["curve"] for row in result.rows])
        share = np.linspace(0, 100, curves.shape[1])
        axis.plot(share, curves.mean(0), label=str(result.method).replace("_", " "))
    axis.set(xlabel="pixels, %", ylabel="mean probability", ylim=(0, 1), title=results[0].metric)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7)
    _save(figure, file)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot, whose state is everyone's

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _save(figure: Any, file: Path) -> None:
    with whole_file(file) as unfinished:
        figure.savefig(unfinished, dpi=130, format="png")


def example_sheet(
    model: nn.Module,
    dataset: Any,
    results: Sequence[Result],
    methods: Sequence[Any],
    file: Path,
    *,
    percentiles: Sequence[float] = PERCENTILES,
) -> bool:
    """Grids of the pointing game that percentiles of the first method's scores choose, explained by every method.

    A row per percentile of the mean score of a grid: the grid, the cell that is explained framed, and the contribution
    maps. The cell is that whose score is nearest to the mean of its grid.

    Args:
        model: The network.
        dataset: As of the run.
        results: Of `grid_pointing`, in the order of the methods.
        methods: The methods themselves.
        file: The picture that is written.
        percentiles: From 0 to 100.

    Returns:
        Whether there is a grid that every method was measured on; without one nothing is written.
    """
    everywhere = set[int].intersection(*({row["unit"] for row in result.rows} for result in results))
    by_unit: dict[int, list[Row]] = {}
    for row in results[0].rows:
        if row["unit"] in everywhere:
            by_unit.setdefault(row["unit"], []).append(row)
    means = {unit: float(np.mean([row["score"] for row in rows])) for unit, rows in by_unit.items()}
    if not means:
        return False
    wanted = np.percentile(list(means.values()), percentiles)
    units: list[int] = []
    for value in wanted[: len(means)]:
        units.append(min(means.keys() - units, key=lambda unit, value=value: (abs(means[unit] - value), unit)))
    figure = _grid_figure(len(units), len(methods) + 1)
    axes = figure.subplots(len(units), len(methods) + 1, squeeze=False)
    for line, unit, percentile in zip(axes, units, percentiles[: len(units)], strict=True):
        rows = by_unit[unit]
        row = min(rows, key=lambda each: abs(each["score"] - means[unit]))
        cells = stacked(model, [dataset[each["image"]][0] for each in rows])
        grid = make_grid(cells[None])
        line[0].imshow(photograph(grid[0]))
        line[0].set_ylabel(f"{percentile:g} %", fontsize=8)
        for axis, method, result in zip(line[1:], methods, results, strict=True):
            contributions = attribute(model, grid, torch.tensor([row["target"]], device=grid.device), method)
            axis.imshow(viz.contribution_map(contributions[0]))
            score = next(each["score"] for each in result.rows if (each["unit"], each["cell"]) == (unit, row["cell"]))
            name = fill(name_of(method).replace("_", " "), 24) + "\n" if unit == units[0] else ""
            axis.set_title(f"{name}{score:.2f}", fontsize=7)
        side, size = round(len(rows) ** 0.5), cells.shape[-1]
        corner = (row["cell"] // side * size - 0.5, row["cell"] % side * size - 0.5)
        for axis in line:
            axis.add_patch(_frame(corner, size))
            axis.set(xticks=[], yticks=[])
    _save(figure, file)
    return True


def _grid_figure(rows: int, columns: int) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(1.5 * columns, 1.65 * rows), layout="constrained")


def _frame(corner: tuple[float, float], size: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, size, size, fill=False, edgecolor="#18a558", linewidth=1.2)
