"""Kill a small training at random moments, resume it each time, and compare its weights with those of an unbroken run.

    python benchmarks/kills.py [--kills 20] [--seed 0]

Each kill is a SIGKILL some random seconds after the process began, anywhere from the imports to the last write. Writes
`benchmarks/results/kills.*`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

import bcoskit

RESULTS = Path(__file__).parent / "results"
OPTIONS = "--epochs 40 --batch_size 16 --no_compile_step --optimization.ema 0.9 --augmentation.policy trivialaugment"


def images(folder: Path, train_images: int = 32) -> None:
    """Noise, dark and light: so many training images of each."""
    source = np.random.default_rng(0)
    for split, count in (("train", train_images), ("test", 8)):
        for label, name in enumerate(("dark", "light")):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(count):
                values = source.integers(0, 128, (32, 32, 3)) + 128 * label
                Image.fromarray(values.astype(np.uint8)).save(place / f"{index}.png")


def start(data: Path, out: Path) -> "subprocess.Popen[bytes]":
    """Begin a run, or go on with it."""
    command = [sys.executable, "-m", "bcoskit", "train", "--data", data, "--out", out, "--resume", *OPTIONS.split()]
    return subprocess.Popen(
        list(map(str, command)),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: "subprocess.Popen[bytes]") -> bool:
    """Whether it ended well."""
    _, errors = process.communicate()
    if process.returncode:
        Console(stderr=True).print(errors.decode()[-500:], markup=False)
    return process.returncode == 0


def same(first: Path, second: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    states = [bcoskit.create_model(out / "model.safetensors").state_dict() for out in (first, second)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )


def write(rows: list[dict[str, Any]], length: float, seed: int) -> str:
    """The runs so far as JSON and as a table, which is returned."""
    text = {"seconds_of_the_whole_run": round(length, 1), "options": OPTIONS, "seed": seed, "runs": rows}
    (RESULTS / "kills.json").write_text(json.dumps(text, indent=1) + "\n")
    kills = sum(len(row["killed_after"]) for row in rows)
    killed = [row for row in rows if row["killed_after"]]
    good = sum(row["ended_well"] and row["same"] for row in killed)
    spared = [row for row in rows if not row["killed_after"]]
    also = sum(row["ended_well"] and row["same"] for row in spared)
    lines = [
        "# Trainings that were killed",
        "",
        f"A run of {length:.0f} seconds, killed {kills} times at random moments and resumed after each: {good} of the "
        f"{len(killed)} runs that were killed ended with the weights of the run that nobody killed, bit for bit, and "
        f"{also} of the {len(spared)} that had ended before their moment came.",
        "",
        "    python benchmarks/kills.py",
        "",
        "| killed after, seconds | resumed to its end | same weights |",
        "|---|---|---|",
        *(
            f"| {', '.join(map(str, row['killed_after'])) or '-'} | {row['ended_well']} | {row['same']} |"
            for row in rows
        ),
    ]
    (RESULTS / "kills.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main() -> None:
    """Kill, resume, compare, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    source = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, Progress(console=Console(stderr=True)) as progress:
        root = Path(place)
        images(root / "data")
        begun = time.monotonic()
        assert finish(start(root / "data", root / "whole")), "the run that nobody kills failed"
        length = time.monotonic() - begun
        task = progress.add_task("Kills", total=options.kills)
        run, kills, table = 0, 0, ""
        while kills < options.kills:
            out = root / f"killed-{run}"
            killed: list[float] = []
            while True:
                process = start(root / "data", out)
                seconds = source.uniform(0, 1.1 * length)
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    killed.append(round(seconds, 2))
                    kills += 1
                    progress.update(task, completed=kills)
                    if kills < options.kills:
                        continue
                    process = start(root / "data", out)
                ended_well = finish(process)
                break
            rows.append({"killed_after": killed, "ended_well": ended_well, "same": same(out, root / "whole")})
            table = write(rows, length, options.seed)  # what is known outlives an interruption
            run += 1
    Console(width=120).print(table, markup=False)


if __name__ == "__main__":
    main()
