"""Pretrained CIFAR-10 ResNets: converted and fine-tuned, beside the ordinary ones and a B-cos network from scratch.

    python benchmarks/conversion.py --data FOLDER --weights FOLDER [--only PATTERN] [--report]

`--weights`: folder with `resnet20-12fca82f.th` and `resnet56-4bfd9763.th` (Idelbayev, BSD-2). Every run is one of
`bcoskit train`, in `runs/conversion`; those that are finished are passed over, and one that was cut off goes on. Adds
them to `docs/results/conversion.*`: JSON, a table, and the curves. MaxOut 2 doubles the filters, each pair of which
begins as two copies of the pretrained one. Images are CIFAR-10 (JPEG q75), on which the pretrained weights, of the
original pixels, begin lower. While the conversion is gradual, in the first quarter of its epochs (with MaxOut in the
first eighth), what is measured is a network on its way, with an exponent below 2 and some of its biases.
"""

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from curves import accuracies
from rich.console import Console

from bcoskit.training import train

RUNS = Path("runs", "conversion")
RESULTS = Path(__file__).parent.parent / "docs" / "results"
FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
FROM_SCRATCH = "resnet20.bcos_v2_bnu_linear_nomaxout_cifar10"


def settings(weights: Path) -> dict[str, dict[str, Any]]:
    """The runs in the order in which they are made, by name."""
    runs: dict[str, dict[str, Any]] = {}
    for depth in FILES:
        common = {"from_": f"resnet{depth}.he_cifar10", "weights": str(weights / FILES[depth]), "epochs": 12}
        runs[f"resnet{depth} converted"] = {**common, "gradual": 0.25, "learning_rate": 2e-3}
        competing = {"gradual": 0.125, "learning_rate": 2e-3, "max_out": 2}
        runs[f"resnet{depth} converted, MaxOut 2"] = {**common, **competing}
        runs[f"resnet{depth} ordinary"] = {**common, "convert": "none", "learning_rate": 1e-3}
    runs["resnet20 from scratch"] = {"model": FROM_SCRATCH, "epochs": 60, "learning_rate": 1e-3}
    return runs


def curve(name: str) -> list[dict[str, float]]:
    """Accuracy on the test images after each epoch."""
    return [{"epoch": epoch, "accuracy": value} for epoch, value in enumerate(accuracies(RUNS / name), 1)]


def _settings(name: str) -> dict[str, Any]:
    """Those of a run, with the name of the file of weights in the place of its path."""
    found: dict[str, Any] = json.loads((RUNS / name / "settings.json").read_text())
    return found | {"weights": Path(found["weights"]).name} if "weights" in found else found


def report() -> None:
    """The results as JSON, table and figure."""
    import matplotlib.pyplot as plt

    names = [file.parent.name for file in RUNS.glob("*/csv")]
    stored = RESULTS / "conversion.json"
    before: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    found = before | {name: {"settings": _settings(name), "curve": curve(name)} for name in names}
    runs: dict[str, Any] = dict(sorted(found.items()))
    RESULTS.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(runs, indent=1) + "\n")
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    lines = ["| run | epochs | accuracy on the 8,000 test images, % |", "|---|---|---|"]
    for name, run in runs.items():
        axis.plot([row["epoch"] for row in run["curve"]], [100 * row["accuracy"] for row in run["curve"]], label=name)
        wanted = run["settings"]["epochs"]
        done = len(run["curve"])
        shown = f"{wanted}" if done == wanted else f"{done} of {wanted}"
        lines.append(f"| {name} | {shown} | {100 * run['curve'][-1]['accuracy']:.2f} |")
    axis.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(60, 92))
    axis.legend(fontsize=7)
    figure.savefig(RESULTS / "conversion.png", dpi=110)
    head = [
        "# Pretrained CIFAR-10 ResNets, converted and fine-tuned",
        "",
        (__doc__ or "").partition("\n\n")[2].strip("\n"),
        "",
    ]
    foot = ["", "![Curves](conversion.png)"]
    (RESULTS / "conversion.md").write_text("\n".join((*head, *lines, *foot)) + "\n")
    Console(width=120).print("\n".join(lines), markup=False)


def main() -> None:
    """Make the runs, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path, default=Path())
    parser.add_argument("--only", default="*")
    parser.add_argument("--report", action="store_true", help="of what there is, without new runs")
    options = parser.parse_args()
    for name, arguments in settings(options.weights).items():
        if options.report or not fnmatchcase(name, options.only):
            continue
        if not (RUNS / name / "model.safetensors").exists():
            train(options.data, out=RUNS / name, resume=True, **arguments)
    report()


if __name__ == "__main__":
    main()
