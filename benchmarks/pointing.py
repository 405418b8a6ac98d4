"""What the grid pointing game costs beside its forward and backward passes, and a loop over targets.

    python benchmarks/pointing.py [--grids 12] [--threads 1]

Alternates, on the same 3 × 3 grids of the photographs that ship with the network that ships: the bare passes (one
forward pass and nine backward passes, `torch.autograd.grad` in `explanation_mode`), the game (choosing the images is
left out, reading them is not), and the straightforward loop (one `explain` per target). Prints medians of the ratios,
and the same for the batches of Occlusion, LIME and RISE against one sample at a time. Writes
`benchmarks/results/pointing.json`.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from speed import machine

import bcoskit
from bcoskit.evaluation import METHODS, GridPointing, attribute, grid_scores, make_grid

FILE = Path(__file__).parent / "results" / "pointing.json"


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = bcoskit.create_model("resnet20.bcos_cifar10", weights=True)
    folder = files("bcoskit.assets") / "photographs"
    shown = sorted((path for path in folder.iterdir() if path.name.endswith(".jpg")), key=lambda path: path.name)
    dataset = [(model.transform(path.read_bytes()), index % 10) for index, path in enumerate(shown)]
    unit = tuple(range(9))
    metric = GridPointing()

    def passes() -> None:
        x = make_grid(torch.stack([dataset[index][0] for index in unit])[None]).requires_grad_()
        with bcoskit.explanation_mode():
            logits = model(x)
            for target in range(9):
                torch.autograd.grad(logits[0, target], x, retain_graph=target < 8)

    def loop() -> None:
        x = make_grid(torch.stack([dataset[index][0] for index in unit])[None])
        maps = [bcoskit.explain(model, x, target).contributions for target in range(9)]
        grid_scores(torch.stack(maps, 1), 3)

    works: dict[str, Callable[[], object]] = {
        "passes": passes,
        "game": lambda: metric.measure(model, dataset, [unit], "bcos"),
        "loop": loop,
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(options.grids + 2):
        for name, work in works.items():
            taken = seconds(work)
            if index >= 2:
                times[name].append(taken)
    ratios = {
        "game / passes": median(a / b for a, b in zip(times["game"], times["passes"], strict=True)),
        "loop / game": median(a / b for a, b in zip(times["loop"], times["game"], strict=True)),
    }
    x = make_grid(torch.stack([dataset[index][0] for index in unit])[None])
    target = torch.arange(9)[None]
    few: dict[str, dict[str, Any]] = {
        "occlusion": {"window": 16, "stride": 16},
        "lime": {"count": 32},
        "rise": {"count": 32},
    }
    for name, arguments in few.items():
        batched = partial(METHODS[name], **arguments)
        single = partial(METHODS[name], **arguments, batch_size=1)
        pairs = [
            (
                seconds(lambda: [attribute(model, x, target[:, k], single) for k in range(9)]),  # noqa: B023
                seconds(lambda: attribute(model, x, target, batched)),  # noqa: B023
            )
            for _ in range(3)
        ]
        ratios[f"{name}: one by one / batched, all targets"] = median(slow / fast for slow, fast in pairs)
    found = {
        "ratios": {name: round(value, 2) for name, value in ratios.items()},
        "seconds of a grid": {name: round(median(values), 3) for name, values in times.items()},
        "threads": options.threads,
        "machine": f"{machine()}; torch {torch.__version__}",
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
