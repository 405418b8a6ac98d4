"""The throughput of a training on two processes, as a multiple of that of one process on one core.

    python benchmarks/processes.py [--rounds 3]

Generated images, 128 a step and process, one thread each, not compiled, at a learning rate by which little is learnt,
since gradients that vanish are slow; what counts is the time from the end of the first epoch to that of the second.
`cnn9_narrow.bcos_cifar10` has no norms; `resnet20.bcos_cifar10` has batch norms, whose statistics the processes
exchange at each of 21 layers, so that the slower one is waited for 42 times a step.

Writes `benchmarks/results/processes.*`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from kills import images
from rich.console import Console
from rich.progress import track
from speed import machine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESULTS = Path(__file__).parent / "results"
EPOCHS = 2
IMAGES = 2048
NETWORKS = ("cnn9_narrow.bcos_cifar10", "resnet20.bcos_cifar10")


def images_per_second(model: str, data: Path, out: Path, processes: int) -> float:
    """Of a run, by the times that TensorBoard's log has of the ends of epochs."""
    command = ["taskset", "-c", "0"] if processes == 1 else []
    command += [sys.executable, "-m", "bcoskit", "train", "--model", model, "--data", str(data), "--out", str(out)]
    command += f"--epochs {EPOCHS} --batch_size {128 * processes} --hardware.devices {processes}".split()
    command += ["--hardware.accelerator", "cpu", "--no_compile_step", "--learning_rate", "1e-6"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    log = EventAccumulator(str(next(out.glob("tensorboard/**/events*"))))
    log.Reload()
    ends = [event.wall_time for event in log.Scalars("train_loss")]
    assert len(ends) == EPOCHS, "the log has other epochs"
    return (EPOCHS - 1) * IMAGES / (ends[-1] - ends[0])


def main() -> None:
    """Measure in alternation, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates = {model: {processes: list[float]() for processes in (1, 2)} for model in NETWORKS}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place, "data")
        images(data, IMAGES // 2)
        rounds = [(number, model) for number in range(options.rounds) for model in NETWORKS]
        for number, model in track(rounds, "Rounds", console=Console(stderr=True)):
            for processes, found in rates[model].items():
                out = Path(place, f"{model}-{number}-{processes}")
                found.append(images_per_second(model, data, out, processes))
    processor = machine().partition(",")[0]
    results = {"machine": processor, "images_per_second": rates}
    (RESULTS / "processes.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        "# Two processes",
        "",
        *(__doc__ or "").partition("[--rounds 3]\n\n")[2].partition("\n\nWrites")[0].splitlines(),
        "",
        f"{options.rounds} rounds in alternation on two cores, {processor} (`python benchmarks/processes.py`):",
        "",
        "| network | images per second, one process | two | two / one, median and range |",
        "|---|---|---|---|",
    ]
    for model, found in rates.items():
        ratios = sorted(two / one for one, two in zip(found[1], found[2], strict=True))
        lines.append(
            f"| `{model}` | {statistics.median(found[1]):.1f} | {statistics.median(found[2]):.1f} "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    (RESULTS / "processes.md").write_text("\n".join(lines) + "\n")
    Console(width=120).print("\n".join(lines), markup=False)


if __name__ == "__main__":
    main()
