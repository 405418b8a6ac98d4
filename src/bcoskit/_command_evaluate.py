"""`bcoskit evaluate`: accuracy of a network, and the quality of its explanations by any method."""

import json as json_format
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from bcoskit._devices import device_named
from bcoskit._processes import is_first, wait_for_all
from bcoskit.data import ImageDataset, open_dataset
from bcoskit.evaluation import (
    METHODS,
    Completeness,
    EnergyPointing,
    GridPointing,
    Perturbation,
    Randomization,
    Stability,
    evaluate,
    example_sheet,
    write_results,
)
from bcoskit.evaluation._write import title_of
from bcoskit.models import create_model

METRICS = (
    "accuracy",
    "grid_pointing",
    "energy_pointing",
    "deletion",
    "insertion",
    "perturbation",
    "randomization",
    "stability",
    "completeness",
)


def evaluate_model(
    model: str,
    *,
    data: Path,
    metrics: list[str] = ["accuracy", "grid_pointing"],  # noqa: B006 - shown by --help, and never changed
    methods: list[str] = ["bcos"],  # noqa: B006
    weights: str | None = None,
    out: Path = Path("evaluation"),
    count: int = 100,
    grid: int = 3,
    protocol: Literal["bcos", "rao"] = "bcos",
    threshold: float | None = None,
    smooth: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    rescale: bool = False,
    authors_offset: bool = False,
    steps: int = 32,
    patch: int = 1,
    explained: Literal["predicted", "label"] = "predicted",
    boxes: Path | None = None,
    batch_size: int = 1,
    seed: int = 42,
    device: str | None = None,
    resume: bool = False,
    json: bool = False,
) -> int:
    """Measure the accuracy of a network, and the quality of explanations by several methods.

    In `out` appear `rows.parquet` and `rows.jsonl` (a row per image, target and method), `summary.json`, `summary.md`,
    and figures. Every finished part is kept, so that a run that is broken off can be resumed; under `torchrun` the
    processes share the work.

    Args:
        model: Name of a network, or a file that training has written.
        data: Folder with labelled test images: parquet shards, tar files in the layout of WebDataset, the original
            CIFAR-10 files, or class folders in `test` or `val`; `torchvision:NAME` or `hf:NAME` for datasets that these
            libraries know.
        metrics: What is measured, one or more: accuracy (always), grid_pointing, energy_pointing, deletion, insertion,
            perturbation, randomization, stability, completeness.
        methods: Attribution methods, one or more: bcos, gradient, input_x_gradient, integrated_gradients, deep_lift,
            guided_backprop, grad_cam, guided_grad_cam, occlusion, lime, kernel_shap, rise.
        weights: File or URL of the network's weights; by default those that go with its name.
        out: Folder for the results.
        count: Number of grids, and of images for the other metrics, drawn at random; energy_pointing takes all.
        grid: Cells of a grid along each side.
        protocol: How images of grids are chosen: "bcos" by the most confident ones, "rao" at random among those with
            a softmax of at least 0.99.
        threshold: Of that confidence; by default 0.5, with "rao" 0.99.
        smooth: Side of the mean filter on contributions in pointing games, odd; by default 15 for grids of images of
            at least 64 pixels, else 1.
        window: Side of a window that slides over grids, for networks of one input size, such as ViTs.
        stride: Step of the window; by default half its side.
        rescale: Shrink grids to the size of one image.
        authors_offset: Lose an image after each grid, as the authors' code does.
        steps: Steps of the perturbation curves.
        patch: Side of the patches that they replace.
        explained: Which class of an image, for metrics of single images.
        boxes: For energy_pointing: a JSON file with one list of boxes (left, top, right, bottom) per image, in pixels
            of what the network sees.
        batch_size: Grids or images at once.
        seed: Of everything that is drawn.
        device: Where to compute, such as cpu or cuda.
        resume: Go on with the run in `out`, if there is one.
        json: Print the summary as JSON instead of a table.

    Returns:
        The exit code: 0, or 1 if some units could not be measured.

    Raises:
        ValueError: If an option is out of its range, or the data do not fit the network.
    """
    metrics, methods = ([part for each in given for part in each.split(",") if part] for given in (metrics, methods))
    for name, given, known in (("metrics", metrics, METRICS), ("methods", methods, tuple(METHODS))):
        unknown = [each for each in given if each not in known]
        if unknown or not given:
            raise ValueError(f"`{name}` (={unknown or given}) must be of: {', '.join(known)}")
    if (boxes is None) == ("energy_pointing" in metrics):
        raise ValueError("`boxes` and the metric energy_pointing need one another")
    images: dict[str, Any] = {"count": count, "explained": explained, "seed": seed}
    available: dict[str, Any] = {
        "grid_pointing": lambda: GridPointing(
            grid, count, protocol, threshold, smooth, window, stride, rescale, authors_offset, seed
        ),
        "energy_pointing": lambda: EnergyPointing(1 if smooth is None else smooth),
        **{
            kind: partial(Perturbation, kind, None, steps, patch, **images)
            for kind in ("deletion", "insertion", "perturbation")
        },
        "randomization": partial(Randomization, **images),
        "stability": partial(Stability, **images),
        "completeness": partial(Completeness, **images),
    }
    wanted = [available[name]() for name in dict.fromkeys(metrics) if name != "accuracy"]
    network = create_model(model, weights=True if weights is None else weights).to(device_named(device))
    labelled = open_dataset(data, "test", network.transform)
    try:
        labelled.match(network.classes)
    except ValueError as error:
        raise ValueError(f"`data` (={str(data)!r}): {error}") from error
    dataset: Any = labelled if boxes is None else WithBoxes(labelled, _boxes(boxes, len(labelled)))
    methods = list(dict.fromkeys(methods))
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def tell(job: str, done: int, total: int) -> None:
            if job not in tasks:
                tasks[job] = progress.add_task(job, total=total)
            progress.update(tasks[job], completed=done)

        results = evaluate(
            network,
            dataset,
            wanted,
            methods,
            out=out,
            name=network.name,
            batch_size=batch_size,
            resume=resume,
            progress=tell,
        )
    summary = write_results(results, out)
    pointing = [result for result in results if result.metric == "grid_pointing"]
    if pointing and window is None and not rescale:
        example_sheet(network, dataset, pointing, methods, out / "grid_pointing_examples.png")
    failed = summary["failures"]
    if is_first():  # of several processes, which all have all rows, one tells of them
        if json:
            Console(soft_wrap=True, markup=False, highlight=False).print(json_format.dumps(summary))
        else:
            _tell(summary)
        for failure in failed[:20]:
            reason = f"{failure['metric']}, unit {failure['unit']}: {failure['reason']}"
            console.print(reason, markup=False, soft_wrap=True)
    wait_for_all()  # a failure must not cost the others what they are about to write
    return 1 if failed else 0


class WithBoxes:
    """A dataset whose items have a third part, the boxes of the image.

    Args:
        images: The dataset.
        boxes: For each image its boxes (M, 4).
    """

    def __init__(self, images: ImageDataset, boxes: list[Any]) -> None:
        self._images, self.regions = images, boxes
        self.labels = images.labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        x, label = self._images[index]
        return x, label, torch.as_tensor(self.regions[index])


def _boxes(file: Path, count: int) -> list[Any]:
    try:
        boxes = json_format.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from error
    if not isinstance(boxes, list) or len(boxes) != count:
        raise ValueError(f"{file}: must hold a list with the boxes of each of the {count} images")
    return boxes


def _tell(summary: dict[str, Any]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 120
    figures = summary["accuracy"]
    console.print(
        f"{summary['model']}, {summary['images']} images: top-1 {100 * figures['top1']:.2f} %, "
        f"top-5 {100 * figures['top5']:.2f} %, calibration error {figures['calibration_error']:.4f}",
        markup=False,
        highlight=False,
    )
    if not summary["results"]:
        return
    table = Table("metric", "method", "rows", "median", "95 % interval", "quartiles", "mean")
    for line in summary["results"]:
        table.add_row(
            title_of(line),
            line["method"],
            str(line["count"]),
            f"{line['median']:.4g}",
            f"{line['interval_low']:.4g} to {line['interval_high']:.4g}",
            f"{line['first_quartile']:.4g} to {line['third_quartile']:.4g}",
            f"{line['mean']:.4g}",
        )
    console.print(table)
