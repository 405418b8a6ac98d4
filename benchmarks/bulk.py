"""Memory and speed of `bcoskit explain` over a folder: a few images, many, by one process and by several.

    python benchmarks/bulk.py [--images 100 10000] [--processes 1 2] [--options …]

The images are the package's photographs, each with one pixel changed, written to a temporary folder. Memory is the
peak of one process. Writes JSON and Markdown under `benchmarks/results`.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

import bcoskit

PHOTOGRAPHS = sorted((Path(bcoskit.__file__).parent / "assets" / "photographs").glob("*.jpg"))
# A process that tells its peak in the end; `resource` counts in kibibytes, on a Mac in bytes.
MEASURED = """
import resource, sys
from bcoskit.cli import main
code = main(sys.argv[2:])
rank = __import__("os").environ.get("RANK", "0")
with open(f"{sys.argv[1]}/{rank}", "w") as file:
    file.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
sys.exit(code)
"""


def write_images(folder: Path, count: int) -> None:
    """Different images of the package's photographs."""
    photographs = [Image.open(path).convert("RGB") for path in PHOTOGRAPHS]
    for index in track(range(count), "images", transient=True):
        image = photographs[index % len(photographs)].copy()
        image.putpixel((index % image.width, 0), (index % 256, index // 256 % 256, 0))
        image.save(folder / f"{index:07}.jpg", quality=90)


def measured(images: int, processes: int, options: list[str]) -> dict[str, Any]:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("in", "out", "peaks")}
        for folder in folders.values():
            folder.mkdir()
        write_images(folders["in"], images)
        script = Path(place) / "measured.py"
        script.write_text(MEASURED)
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, script, folders["peaks"], "explain", folders["in"], "--out", folders["out"], *options]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peaks = [int(file.read_text()) for file in folders["peaks"].iterdir()]
        written = sum(1 for _ in folders["out"].glob("*.png"))
    assert written == images
    assert len(peaks) == processes
    unit = 1 if platform.system() == "Darwin" else 1024
    return {
        "images": images,
        "processes": processes,
        "seconds": seconds,
        "images_per_second": images / seconds,
        "peak_megabytes": max(peaks) * unit / 1e6,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", type=int, default=[100, 10_000])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--options", default="--no-shares --top=1", help="of `bcoskit explain`")
    arguments = parser.parse_args()
    rows = [
        measured(images, processes, arguments.options.split())
        for processes in arguments.processes
        for images in arguments.images
    ]
    lines = ["| processes | images | seconds | images per second | peak MB of a process |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['processes']} | {row['images']:,} | {row['seconds']:.0f} | {row['images_per_second']:.1f} "
        f"| {row['peak_megabytes']:.0f} |"
        for row in rows
    ]
    lines += ["", f"`python benchmarks/bulk.py {' '.join(sys.argv[1:])}`".replace(" `", "`")]
    lines[-1] += f": `bcoskit explain FOLDER {arguments.options}`, start included; torch {torch.__version__}, "
    lines[-1] += f"{torch.get_num_threads()} threads in all."
    text = "\n".join(lines) + "\n"
    Console().print(text, markup=False, highlight=False)
    results = Path(__file__).parent / "results"
    (results / "bulk.json").write_text(json.dumps({"options": arguments.options, "rows": rows}, indent=1) + "\n")
    (results / "bulk.md").write_text(text)


if __name__ == "__main__":
    main()
