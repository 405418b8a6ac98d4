"""How many images a core decodes, crops and hands over: what a training from disk can use at most.

    python benchmarks/loading.py --data FOLDER [--size 224] [--images 400]

Writes `benchmarks/results/loading.*`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console

from bcoskit.data import ImageTransform, StreamedImages, open_dataset

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure in alternation, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = open_dataset(options.data, "test")
    transform = ImageTransform(options.size, resize=options.size * 8 // 7)
    ways = {
        "resized crops": StreamedImages(dataset, transform, smallest=0.08),
        "centre crops": StreamedImages(dataset, transform),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(5):
        for name, images in ways.items():
            start = time.process_time()
            images.__getitems__(list(range(min(options.images, len(images)))))
            rates[name].append(min(options.images, len(images)) / (time.process_time() - start))
    pixels = statistics.mean(dataset[index][0].width * dataset[index][0].height for index in range(100))
    rows = [
        {"way": name, "images_per_second_and_core": statistics.median(values), "lowest": min(values)}
        for name, values in rates.items()
    ]
    (RESULTS / "loading.json").write_text(json.dumps({"mean_pixels": pixels, "rows": rows}, indent=1) + "\n")
    lines = [
        "# Images from disk",
        "",
        f"JPEG of {pixels / 1e6:.2f} megapixels on average, brought to {options.size} pixels; seconds of a core of an "
        "AMD EPYC, median of five rounds in alternation.",
        "",
        "    python benchmarks/loading.py --data FOLDER",
        "",
        "| images | images per second and core |",
        "|---|---|",
        *(f"| {row['way']} | {row['images_per_second_and_core']:.0f} |" for row in rows),
    ]
    (RESULTS / "loading.md").write_text("\n".join(lines) + "\n")
    Console(width=100).print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
