"""Time of an explanation by an exported file, against `explain` and compiled explanations, in one run.

    python benchmarks/export.py [--networks resnet18.bcos_v2_in1k …] [--rounds 20] [--threads 2]

Subjects, in alternation: `explain`; `fused`, the same of `bcoskit.fuse`; `compiled`, `bcoskit.compile_explain`; `onnx`,
the file in onnxruntime, on the CPU, with as many threads. The networks have random weights. Each call explains the
prediction for one image and gives the contributions. Times are medians of the ratios to `explain` of the same round,
with quartiles. Writes JSON and Markdown.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.progress import track
from speed import machine

import bcoskit
from bcoskit.export import export_onnx

NETWORKS = ("resnet18.bcos_v2_in1k", "simple_vit_ti_patch16_224.bcos_v2_in1k")
SUBJECTS = ("explain", "fused", "compiled", "onnx")


def subjects(name: str, folder: Path, threads: int, chosen: list[str]) -> tuple[dict[str, Callable[[], Any]], Any]:
    """What is called for each subject, and what is known of the file."""
    torch.manual_seed(0)
    network = bcoskit.create_model(name).requires_grad_(False)
    start = time.perf_counter()
    written = export_onnx(network, folder / f"{name}.onnx")
    facts = {
        "error": written.error,
        "megabytes": written.path.stat().st_size / 1e6,
        "export_seconds": time.perf_counter() - start,
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(written.path, options, providers=["CPUExecutionProvider"])
    size = network.transform.size
    image = torch.rand(1, 3, size, size)
    x = bcoskit.encode(image)
    feed = {"image": image.numpy(), "target": np.array([-1])}
    calls = {
        "explain": partial(_contributions, partial(bcoskit.explain, network), x),
        "fused": partial(_contributions, partial(bcoskit.explain, bcoskit.fuse(network)), x),
        "compiled": partial(_contributions, bcoskit.compile_explain(network), x),
        "onnx": partial(session.run, ["logits", "contributions"], feed),
    }
    return {subject: calls[subject] for subject in chosen}, facts


def _contributions(explain: Callable[..., bcoskit.Explanation], x: torch.Tensor) -> torch.Tensor:
    return explain(x).contributions


def measured(name: str, rounds: int, threads: int, chosen: list[str]) -> list[dict[str, Any]]:
    """One row for each subject."""
    with tempfile.TemporaryDirectory() as folder:
        calls, facts = subjects(name, Path(folder), threads, chosen)
        for call in calls.values():
            call()
            call()
        times: dict[str, list[float]] = {subject: [] for subject in calls}
        for _ in range(rounds):
            for subject, call in calls.items():
                start = time.perf_counter()
                call()
                times[subject].append(time.perf_counter() - start)
    first = times["explain"]
    rows: list[dict[str, Any]] = []
    for subject, values in times.items():
        low, median, high = statistics.quantiles([base / value for value, base in zip(values, first, strict=True)], n=4)
        row = {"network": name, "subject": subject, "speed": median, "low": low, "high": high}
        rows.append({**row, "milliseconds": 1e3 * statistics.median(values), **(facts if subject == "onnx" else {})})
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "| network | subject | times as fast as `explain` | quartiles | ms | MB of the file | differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        figures = f"{row['speed']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['milliseconds']:.1f}"
        file = f"{row['megabytes']:.1f} | {row['error']:.0e}" if "error" in row else " | "
        lines.append(f"| {row['network']} | {row['subject']} | {figures} | {file} |")
    command = f"`python benchmarks/export.py {results['command']}`".replace(" `", "`")
    lines += ["", f"{command}: one image, median of {results['rounds']} rounds in alternation."]
    lines += [f"{results['machine']}; {', '.join(f'{key} {value}' for key, value in results['versions'].items())}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if "explain" not in options.subjects:
        parser.error("--subjects must name explain, which the others are compared with")
    torch.set_num_threads(options.threads)
    versions = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "python": platform.python_version()}
    results: dict[str, Any] = {
        "command": " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": versions,
        "rounds": options.rounds,
        "rows": [],
    }
    console = Console(width=160)
    for name in track(options.networks, "networks", console=Console(stderr=True), transient=True):
        results["rows"] += measured(name, options.rounds, options.threads, options.subjects)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "export.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "export.md").write_text(markdown(results))
    console.print(markdown(results), highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
