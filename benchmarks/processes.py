"""The throughput of a training on two processes, as a multiple of that of one process on one core.

    python benchmarks/processes.py [--rounds 3]

Both train the B-cos ResNet-20 that ships on generated images, 64 images a step and process, one thread each, not
compiled; what counts is the time of two more epochs, so that starting does not.

Writes `benchmarks/results/processes.*`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kills import images
from rich.console import Console
from rich.progress import track

RESULTS = Path(__file__).parent / "results"
IMAGES = 768


def seconds(data: Path, out: Path, processes: int, epochs: int) -> float:
    """How long a run takes."""
    command = ["taskset", "-c", "0"] if processes == 1 else []
    command += [sys.executable, "-m", "bcoskit", "train", "--data", str(data), "--out", str(out), "--no_compile_step"]
    command += f"--epochs {epochs} --batch_size {64 * processes} --hardware.devices {processes}".split()
    command += ["--hardware.accelerator", "cpu"]
    begun = time.monotonic()
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    return time.monotonic() - begun


def main() -> None:
    """Measure in alternation, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "data")
        images(data, IMAGES // 2)
        for number in track(range(options.rounds), "Rounds", console=Console(stderr=True)):
            for processes, found in rates.items():
                short, long = (
                    seconds(data, Path(place, f"{number}-{processes}-{epochs}"), processes, epochs) for epochs in (1, 3)
                )
                found.append(2 * IMAGES / (long - short))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    ratio = statistics.median(ratios)
    (RESULTS / "processes.json").write_text(json.dumps({"images_per_second": rates, "ratios": ratios}, indent=1) + "\n")
    lines = [
        "# Two processes",
        "",
        f"A training on two processes (gloo) has {ratio:.2f} times the throughput of one process on one core: "
        f"{', '.join(f'{value:.2f}' for value in sorted(ratios))} in {options.rounds} rounds in alternation, "
        "on two cores of an AMD EPYC.",
        "",
        "    python benchmarks/processes.py",
        "",
        "| processes | images per second, median |",
        "|---|---|",
        *(f"| {processes} | {statistics.median(found):.1f} |" for processes, found in rates.items()),
    ]
    (RESULTS / "processes.md").write_text("\n".join(lines) + "\n")
    Console(width=120).print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
