"""The grid pointing game of many methods on B-cos and ordinary networks, and other metrics: the tables of the docs.

    python benchmarks/evaluation.py --cifar FOLDER --weights FILE [--imagenet FOLDER --lite0 FILE] [--only PATTERN]
    python benchmarks/evaluation.py --report

`FILE` of `--weights` is `resnet20-12fca82f.th` (Idelbayev, BSD-2), an ordinary ResNet-20; that of `--lite0` is
written by `benchmarks/photographs.py`. Each network and method is a run of its own in `runs/evaluation`, the quick ones
first, and goes on where it was cut off; several calls at once share the work. `--report` adds the runs that are
finished to `docs/results/evaluation.*`; `evaluation.parquet` there keeps their score of every image in every grid.

The B-cos ResNet-20 has no ReLU: there Guided Backpropagation is the gradient, and DeepLIFT, which has no rule for
B-cos layers, is Input x Gradient. It has no biases but that of the logits, so that f(a·x) = a·f(x) but for
it: its Integrated Gradients from zeros are Input x Gradient too, with any number of points. Occlusion comes near W(x)x,
since it asks the network itself, 121 times for a grid, where W(x)x takes one pass each way; its maps are as coarse as
its window.
"""

import argparse
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import bcoskit
from bcoskit.data import open_dataset
from bcoskit.evaluation import (
    METHODS,
    Completeness,
    GridPointing,
    Perturbation,
    Randomization,
    Result,
    Stability,
    box_plot,
    evaluate,
    example_sheet,
    write_results,
)
from bcoskit.evaluation._write import title_of

RUNS = Path("runs", "evaluation")
RESULTS = Path(__file__).parent.parent / "docs" / "results"
COLUMNS = ("network", "run", "unit", "cell", "image", "target", "score")
# The quickest first.
CIFAR_METHODS: dict[str, Any] = {
    "bcos": "bcos",
    "input_x_gradient": "input_x_gradient",
    "gradient": "gradient",
    "grad_cam": "grad_cam",
    "guided_backprop": "guided_backprop",
    "deep_lift": "deep_lift",
    "guided_grad_cam": "guided_grad_cam",
    "occlusion": partial(METHODS["occlusion"], window=16, stride=8),
    "integrated_gradients": "integrated_gradients",
    "lime": "lime",
    "rise": "rise",
}
# Where any number of points gives the same.
BCOS_METHODS = CIFAR_METHODS | {"integrated_gradients": partial(METHODS["integrated_gradients"], steps=5)}
# These need many forward passes, of few shapes.
COMPILED = ("lime", "rise")
IMAGENET_METHODS: dict[str, Any] = {
    name: name for name in ("bcos", "input_x_gradient", "gradient", "grad_cam", "guided_backprop")
}
OTHERS = (
    Perturbation("deletion", count=200),
    Perturbation("insertion", count=200),
    Perturbation("perturbation", count=200),
    Stability(count=100),
    Completeness(count=100),
    Randomization(count=20),
)


@dataclass(frozen=True)
class Subject:
    """A network on some data.

    Attributes:
        title: As in tables.
        model: Name of the network.
        weights: Its weights.
        data: Folder of the images.
        metric: The pointing game.
        methods: Attribution methods by the names of their folders.
    """

    title: str
    model: str
    weights: Any
    data: Path | None
    metric: GridPointing
    methods: dict[str, Any]


def subjects(options: argparse.Namespace) -> dict[str, Subject]:
    """What is compared, by the names of their folders."""
    # Of 800 photographs, one of each class, some 700 are named rightly: for 3 x 3 that is enough for 76 grids.
    cifar, imagenet = GridPointing(3, 500), GridPointing(2, 100)
    lite0 = Subject("EfficientNet-Lite0", "timm/tf_efficientnet_lite0", options.lite0, options.imagenet, imagenet,
                    IMAGENET_METHODS)  # fmt: skip
    return {
        "cifar_bcos": Subject("B-cos ResNet-20", "resnet20.bcos_cifar10", True, options.cifar, cifar, BCOS_METHODS),
        "cifar_ordinary": Subject(
            "ordinary ResNet-20", "resnet20.he_cifar10", options.weights, options.cifar, cifar, CIFAR_METHODS
        ),
        "imagenet_ordinary": lite0,
    }


def run(name: str, subject: Subject, method: str, metrics: tuple[Any, ...]) -> list[Result]:
    """One run, with a bar."""
    model = bcoskit.create_model(subject.model, weights=subject.weights)
    model.to(memory_format=torch.channels_last)
    if method in COMPILED:
        model.compile(dynamic=False)
    dataset: Any = open_dataset(subject.data or Path(), "test", model.transform)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def tell(job: str, done: int, total: int) -> None:
            if job not in tasks:
                tasks[job] = progress.add_task(f"{name}: {job}", total=total)
            progress.update(tasks[job], completed=done)

        out = RUNS / name / method
        chosen = subject.methods[method.removesuffix("_others")]
        results = evaluate(model, dataset, metrics, (chosen,), out=out, name=subject.title, resume=True, progress=tell)
        write_results(results, out)
    return results


def work(options: argparse.Namespace) -> list[tuple[str, Subject, str, tuple[Any, ...]]]:
    """All runs in the order in which they are made."""
    every: list[tuple[int, tuple[str, Subject, str, tuple[Any, ...]]]] = []
    for name, subject in subjects(options).items():
        for order, method in enumerate(subject.methods):
            every.append((order, (name, subject, method, (subject.metric,))))
            if name.startswith("cifar") and order < 5:
                every.append((order, (name, subject, f"{method}_others", OTHERS)))
    return [each for _, each in sorted(every, key=lambda pair: pair[0])]


def finished(name: str, method: str) -> dict[str, Any] | None:
    """The summary of a run, if there is one."""
    file = RUNS / name / method / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def report(options: argparse.Namespace) -> None:
    """The results as JSON, Parquet, tables and figures."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    stored = RESULTS / "evaluation.json"
    before: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    rows = _rows_before()
    lines = ["# Explanations measured", "", *(__doc__ or "").partition("\n\n")[2].strip("\n").splitlines(), ""]
    collected: dict[str, Any] = {}
    for name, subject in subjects(options).items():
        found = _summaries(name, subject, "", before)
        if not found:
            continue
        first = next(iter(found.values()))
        collected[name] = found
        metric = subject.metric
        lines += [f"## {subject.title}: {metric.count} grids of {metric.grid} x {metric.grid}", ""]
        lines += [f"{first['images']} images, top-1 {100 * first['accuracy']['top1']:.2f} %.", ""]
        lines += ["| method | median | 95 % interval | quartiles | mean |", "|---|---|---|---|---|"]
        for summary in found.values():
            row = summary["results"][0]
            lines.append(
                f"| {row['method']} | {row['median']:.3f} | {row['interval_low']:.3f} to {row['interval_high']:.3f} "
                f"| {row['first_quartile']:.3f} to {row['third_quartile']:.3f} | {row['mean']:.3f} |"
            )
        lines.append("")
        others = _summaries(name, subject, "_others", before)
        collected |= {f"{name}_others": others} if others else {}
        lines += _others(others)
        rows |= {(name, method): _rows(name, subject, method) for method in found if finished(name, method)}
        lines += _pictures(name, subject, {method: rows.get((name, method)) for method in found})
    table = [dict(zip(COLUMNS, (*key, *values), strict=True)) for key, every in rows.items() for values in every]
    pq.write_table(pa.Table.from_pylist(table), RESULTS / "evaluation.parquet", compression="zstd")
    stored.write_text(json.dumps(collected, indent=1) + "\n")
    (RESULTS / "evaluation.md").write_text("\n".join(lines).rstrip() + "\n")


def _summaries(name: str, subject: Subject, suffix: str, before: dict[str, Any]) -> dict[str, Any]:
    """Of the runs that are finished, and of those that were when the results were written last."""
    old = before.get(f"{name}{suffix}", {})
    new = {method: finished(name, f"{method}{suffix}") or old.get(method) for method in subject.methods}
    return {method: summary for method, summary in new.items() if summary}


def _rows_before() -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    """The rows that were written last, by network and method."""
    file = RESULTS / "evaluation.parquet"
    rows: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for row in pq.read_table(file).to_pylist() if file.exists() else ():
        rows.setdefault((row["network"], row["run"]), []).append(tuple(row[column] for column in COLUMNS[2:]))
    return rows


def _rows(name: str, subject: Subject, method: str) -> list[tuple[Any, ...]]:
    """The rows of the pointing game of a finished run."""
    table = pq.read_table(RUNS / name / method / "rows.parquet", filters=[("metric", "=", subject.metric.name)])
    return [tuple(row[column] for column in COLUMNS[2:]) for row in table.to_pylist()]


def _others(summaries: dict[str, Any]) -> list[str]:
    if not summaries:
        return []
    tables = {method: _medians(summary) for method, summary in summaries.items()}
    columns = list(next(iter(tables.values())))
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for method, medians in tables.items():
        lines.append(f"| {method} | " + " | ".join(f"{medians[column]:.3g}" for column in columns) + " |")
    return [*lines, ""]


def _medians(summary: dict[str, Any]) -> dict[str, float]:
    """Of each metric; of the sanity check what is left when every layer is random, which comes last."""
    return {
        row["metric"] if row["metric"] == "randomization" else title_of(row): row["median"]
        for row in summary["results"]
    }


def _pictures(name: str, subject: Subject, rows: dict[str, list[tuple[Any, ...]] | None]) -> list[str]:
    """The figures, drawn anew of the methods whose rows are there."""
    metric, settings = subject.metric.name, {"grid": subject.metric.grid}
    results = {
        method: Result(metric, method, [dict(zip(COLUMNS[2:], row, strict=True)) for row in every], settings)
        for method, every in rows.items()
        if every is not None
    }
    if results:
        box_plot(list(results.values()), RESULTS / f"evaluation_{name}.png", labels=list(results))
    if results and subject.data is not None:
        model = bcoskit.create_model(subject.model, weights=subject.weights)
        dataset = open_dataset(subject.data, "test", model.transform)
        chosen = [subject.methods[method] for method in results]
        example_sheet(model, dataset, list(results.values()), chosen, RESULTS / f"evaluation_{name}_examples.png")
    lines = [f"![Scores](evaluation_{name}.png)", ""]
    if results and (missing := [method for method in rows if method not in results]):
        lines += [f"In the pictures are those whose scores of every grid are kept: not {', '.join(missing)}.", ""]
    if (RESULTS / f"evaluation_{name}_examples.png").exists():
        lines += [
            f"Grids at percentiles of the score of {next(iter(rows))}, the cell that is explained framed:",
            "",
            f"![Examples](evaluation_{name}_examples.png)",
            "",
        ]
    return lines


def main() -> None:
    """Make the runs, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cifar", "weights", "imagenet", "lite0"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--only", default="*", help="pattern of network/method")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.report:
        return report(options)
    for name, subject, method, metrics in work(options):
        ready = subject.data is not None and subject.weights is not None
        if ready and fnmatchcase(f"{name}/{method}", options.only) and finished(name, method) is None:
            run(name, subject, method, metrics)
    return None


if __name__ == "__main__":
    main()
