"""Solar cells: a network that tells defective ones from electroluminescence photographs, and shows why.

    pip install elpv-dataset
    python benchmarks/solar_cells.py [--runs FOLDER] [--report]

Writes the cells as class folders to `runs/solar_cells`; trains there with the commands that it prints, which go on
where they were cut off; measures, and writes `docs/results/solar_cells.*` and `docs/images/solar_cells.png`. `--report`
measures what is trained already.

The data set is that of Buerhop-Lutz et al. (EU PVSEC 2018) and Deitsch et al. (Machine Vision and Applications 2021;
Solar Energy 2019), CC BY-NC-SA 4.0.
"""

import argparse
import importlib.metadata
import importlib.resources
import importlib.util
import json
import platform
import random
import shlex
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from curves import accuracies
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

import bcoskit
from bcoskit import cli, viz
from bcoskit.models import create_model

DOCS = Path(__file__).parent.parent / "docs"
CLASSES = ("defective", "functional")
COMMAND = "python benchmarks/solar_cells.py"
TEST_SHARE, SPLIT_SEED = 4, 0
BATCH, PATCH = 32, 8
SHOWN = "fine-tuned"
RUNS = {
    "fine-tuned": "--model resnet20.bcos_cifar10 --weights pretrained --size 64 --epochs 6 --batch_size 16 "
    "--learning_rate 1e-3 --fine_tuning.frozen 2 --fine_tuning.head 3 --no_compile_step",
    "fresh": "--model cnn9_narrow.bcos_b2_cifar10 --size 64 --channels 1 --epochs 20 --batch_size 32 "
    "--learning_rate 2e-3 --no_compile_step",
}
# Of the cells called defective, ordered by confidence: which ones are shown.
PERCENTILES = {"rightly": (95, 75, 50, 25), "wrongly": (95, 50)}
ATTRIBUTION = "Cells: ELPV dataset (Buerhop-Lutz et al. 2018; Deitsch et al. 2019, 2021), CC BY-NC-SA 4.0"


@dataclass(frozen=True)
class Cell:
    """One photograph.

    Attributes:
        file: Where it is.
        probability: That the cell is defective, as an expert has judged: 0, 1/3, 2/3 or 1.
        kind: "mono" or "poly": of one crystal or many.
        split: "train" or "test".
    """

    file: Path
    probability: float
    kind: str
    split: str

    @property
    def label(self) -> str:
        """The class: a cell is defective if that is more probable than not."""
        return CLASSES[0] if self.probability > 0.5 else CLASSES[1]

    @property
    def is_sure(self) -> bool:
        """Whether the expert was sure."""
        return self.probability in (0.0, 1.0)


def all_cells() -> list[Cell]:
    """The cells, every fourth of each kind and probability for testing, in an order that a seed determines."""
    folder = Path(str(importlib.resources.files("elpv_dataset"))) / "data"
    groups = defaultdict[tuple[str, float], list[Path]](list)
    with (folder / "labels.csv").open() as lines:
        for name, probability, kind in (line.split() for line in lines):
            groups[kind, round(float(probability) * 3) / 3].append(folder / name)
    source = random.Random(SPLIT_SEED)
    found: list[Cell] = []
    for (kind, probability), files in sorted(groups.items()):
        shuffled = source.sample(sorted(files), len(files))
        found += [
            Cell(file, probability, kind, "train" if index % TEST_SHARE else "test")
            for index, file in enumerate(shuffled)
        ]
    return found


def write_cells(cells: list[Cell], folder: Path) -> None:
    """Class folders in `train` and `test`, complete or not at all."""
    if folder.exists():
        return
    unfinished = folder.with_name("unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for cell in track(cells, "Cells", console=Console(stderr=True), transient=True):
        place = unfinished / cell.split / cell.label
        place.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cell.file, place / cell.file.name)
    unfinished.rename(folder)


def train_command(runs: Path, name: str) -> str:
    """What trains a network."""
    return f"bcoskit train --data {runs / 'cells'} --out {runs / name} {RUNS[name]}"


@dataclass(frozen=True)
class Judged:
    """What a network says of the test cells.

    Attributes:
        cells: The cells.
        x: Their encoded images (N, 2C, H, W).
        score: Logit of "defective" minus logit of "functional".
        contributions: Of each place to the score (N, H, W).
    """

    cells: list[Cell]
    x: Tensor
    score: Tensor
    contributions: Tensor

    @property
    def labels(self) -> Tensor:
        """1 for defective cells."""
        return torch.tensor([int(cell.label == CLASSES[0]) for cell in self.cells])


def judged(network: Any, cells: list[Cell]) -> Judged:
    """Classify and explain all cells."""
    assert network.classes == CLASSES
    x = torch.stack([network.transform(cell.file) for cell in cells])
    found = [
        bcoskit.explain(network, part, 0, versus=1)
        for part in track(x.split(BATCH), "Explanations", console=Console(stderr=True), transient=True)
    ]
    score, contributions = (
        torch.cat([getattr(e, name) for e in found]).detach() for name in ("value", "contributions")
    )
    return Judged(cells, x, score, contributions)


def largest_residual(network: Any, x: Tensor) -> float:
    """What of a score neither contributions nor constants explain, relative, at most."""
    residual = bcoskit.explain(network, x, 0, versus=1, shares=True).residual
    assert residual is not None
    return float(residual.abs().max())


def accuracy_figures(score: Tensor, labels: Tensor) -> dict[str, float]:
    """How well scores tell the classes apart; the threshold is 0, which nothing was fitted for."""
    called = score > 0
    right, defective = called == labels.bool(), labels.bool()
    return {
        "cells": len(labels),
        "defective": int(defective.sum()),
        "accuracy": float(right.float().mean()),
        "balanced_accuracy": float((right[defective].float().mean() + right[~defective].float().mean()) / 2),
        "found": float(right[defective].float().mean()),
        "called_rightly": float(right[called].float().mean()) if bool(called.any()) else float("nan"),
        "roc_auc": float(binary_auroc(score, labels)),
        "average_precision": float(binary_average_precision(score, labels)),
    }


def covered(network: Any, found: Judged) -> dict[str, Any]:
    """How many cells are still called defective when the patches that speak for it the most are covered.

    The cells are cut into patches of 8 × 8 pixels; a twentieth of them is painted in the cell's median grey: those with
    the largest contributions, and, to compare with, as many at random.
    """
    called = found.score > 0
    x, contributions = found.x[called], found.contributions[called]
    side = x.shape[-1] // PATCH
    patches = torch.nn.functional.avg_pool2d(contributions[:, None], PATCH)[:, 0].flatten(1)
    count = patches.shape[1] // 20
    noise = torch.rand(patches.shape, generator=torch.Generator().manual_seed(SPLIT_SEED))
    remaining: dict[str, Any] = {"cells": len(x), "patches": count, "of": patches.shape[1]}
    for name, ranking in {"largest contributions": patches, "at random": noise}.items():
        mask = torch.zeros_like(patches).scatter(1, ranking.topk(count).indices, 1.0).view(-1, 1, side, side)
        mask = torch.nn.functional.interpolate(mask, scale_factor=PATCH)
        grey = x[:, :1].flatten(1).median(1).values.view(-1, 1, 1, 1)
        painted = torch.where(mask > 0, bcoskit.encode(grey.expand(-1, x.shape[1] // 2, -1, -1)), x)
        with torch.no_grad():
            logits = torch.cat([network(part) for part in painted.split(BATCH)])
        remaining[name] = float((logits[:, 0] > logits[:, 1]).float().mean())
    return remaining


def chosen(found: Judged) -> list[tuple[int, str]]:
    """Cells that are called defective, at fixed percentiles of the score, with what is said of them."""
    places: list[tuple[int, str]] = []
    for word, label in (("rightly", 1), ("wrongly", 0)):
        mine = torch.where((found.score > 0) & (found.labels == label))[0]
        mine = mine[found.score[mine].argsort()]
        for percentile in PERCENTILES[word] if len(mine) else ():
            index = int(mine[round(percentile / 100 * (len(mine) - 1))])
            places.append((index, f"{word} called\n{percentile}th percentile"))
    return places


def draw(found: Judged, file: Path) -> None:
    """Photographs, what speaks for "defective" (red) and against it (blue), and both over each other."""
    rows: list[list[tuple[Any, str]]] = [[], [], []]
    for index, words in chosen(found):
        image = found.x[index, :1].expand(3, -1, -1).movedim(0, -1).numpy()
        picture = viz.contribution_map(found.contributions[index], smooth=5)
        score, cell = float(found.score[index]), found.cells[index]
        rows[0].append((image, f"{words}\nexpert: {cell.probability:.2g}"))
        rows[1].append((picture, f"score {score:.1f}"))
        rows[2].append((viz.overlay(image, picture, opacity=0.5, grey=True), ""))
    page = viz.montage(rows, cell=192)
    note = Image.new("RGB", (page.width, page.height + 20), "white")
    note.paste(page)
    ImageDraw.Draw(note).text((8, page.height + 2), ATTRIBUTION, fill=(32, 32, 32))
    file.parent.mkdir(parents=True, exist_ok=True)
    note.save(file)


def report(runs: Path, cells: list[Cell]) -> None:
    """Measure, and write the page."""
    test = [cell for cell in cells if cell.split == "test"]
    networks = {name: create_model(runs / name / "model.safetensors") for name in RUNS}
    all_found = {name: judged(network, test) for name, network in networks.items()}
    network, found = networks[SHOWN], all_found[SHOWN]
    tables = {f"{name}, all cells": accuracy_figures(each.score, each.labels) for name, each in all_found.items()}
    groups = {"the expert was sure": [cell.is_sure for cell in test]}
    groups |= {f"{name}crystalline": [cell.kind == name for cell in test] for name in ("mono", "poly")}
    for group, mask in groups.items():
        mine = torch.tensor(mask)
        tables[f"{SHOWN}, {group}"] = accuracy_figures(found.score[mine], found.labels[mine])
    results = {
        "command": COMMAND,
        "training": [train_command(Path("runs", "solar_cells"), each) for each in RUNS],
        "versions": {each: importlib.metadata.version(each) for each in ("bcoskit", "torch", "timm", "lightning")},
        "machine": platform.machine(),
        "cells": {split: sum(cell.split == split for cell in cells) for split in ("train", "test")},
        "curves": {each: [round(value, 4) for value in accuracies(runs / each)] for each in RUNS},
        "figures": tables,
        "always_functional": sum(cell.label == CLASSES[1] for cell in test) / len(test),
        "largest_residual": largest_residual(network, found.x[:BATCH]),
        "covered": covered(network, found),
    }
    (DOCS / "results").mkdir(parents=True, exist_ok=True)
    (DOCS / "results" / "solar_cells.json").write_text(json.dumps(results, indent=1) + "\n")
    (DOCS / "results" / "solar_cells.md").write_text("\n".join(page(results)) + "\n")
    draw(found, DOCS / "images" / "solar_cells.png")
    Console(width=140).print("\n".join(page(results)), markup=False)


def page(results: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    columns = {
        "cells": "cells",
        "defective": "defective",
        "accuracy": "accuracy, %",
        "balanced_accuracy": "balanced accuracy, %",
        "found": "defective ones found, %",
        "called_rightly": "of those called defective, rightly, %",
        "roc_auc": "ROC AUC",
        "average_precision": "average precision",
    }
    whole, hundredths = ("cells", "defective"), ("roc_auc", "average_precision")

    def shown(name: str, value: float) -> str:
        return f"{value:.0f}" if name in whole else f"{value:.3f}" if name in hundredths else f"{100 * value:.1f}"

    covering = results["covered"]
    return [
        "# Solar cells",
        "",
        f"    {results['command']}",
        *(f"    {command}" for command in results["training"]),
        "",
        f"{results['cells']['train']} cells to train with and {results['cells']['test']} to test with, of the ELPV "
        "data set. Calling all test cells functional is right for "
        f"{100 * results['always_functional']:.1f} % of them. Accuracy after each epoch, in %:",
        "",
        *(
            f"- {name}: {', '.join(f'{100 * value:.1f}' for value in values)}"
            for name, values in results["curves"].items()
        ),
        "",
        f"| test cells | {' | '.join(columns.values())} |",
        f"|{'---|' * (len(columns) + 1)}",
        *(
            f"| {group} | {' | '.join(shown(name, figures[name]) for name in columns)} |"
            for group, figures in results["figures"].items()
        ),
        "",
        f"Of the fine-tuned network, contributions and constants add up to the scores of {BATCH} cells within "
        f"{results['largest_residual']:.1e}, relative.",
        "",
        f"Of the {covering['cells']} cells called defective, still are with {covering['patches']} of {covering['of']} "
        f"patches painted grey: {100 * covering['at random']:.1f} % where these are drawn at random, "
        f"{100 * covering['largest contributions']:.1f} % where they are those with the largest contributions.",
        "",
        "![Cells called defective, and why](../images/solar_cells.png)",
        "",
        f"{ATTRIBUTION}; changed: made smaller.",
    ]


def main() -> int:
    """Make what is missing, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs", "solar_cells"))
    parser.add_argument("--report", action="store_true", help="of what is trained already")
    options = parser.parse_args()
    if importlib.util.find_spec("elpv_dataset") is None:
        parser.error("needs the data set: pip install elpv-dataset")
    cells = all_cells()
    if not options.report:
        options.runs.mkdir(parents=True, exist_ok=True)
        write_cells(cells, options.runs / "cells")
        for name in RUNS:
            command = train_command(options.runs, name)
            Console(stderr=True).print(command, markup=False, soft_wrap=True)
            finished = (options.runs / name / "model.safetensors").exists()
            code = 0 if finished else cli.main([*shlex.split(command)[1:], "--resume"])
            if code:
                return code
    report(options.runs, cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
