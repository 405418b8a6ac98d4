"""Trainings on CIFAR-10 that the papers' claims are compared with: values of B, norms and MaxOut, parity.

    python benchmarks/sweep.py --data FOLDER [--only PATTERN] [--report]

Every run is one of `bcoskit train`, in `runs/sweep`, followed by a 3×3 pointing game of 200 grids, or of 100 after five
epochs, or of as many as there are confident images for; those that are finished are passed over, and one that was cut
off goes on; several calls at once share the work.
Adds those that are finished to `docs/results/b_sweep.*`, `ablation.*` and `parity.*`: JSON, tables and figures.
"""

import argparse
import importlib.metadata
import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import filelock
from curves import accuracies
from rich.console import Console
from rich.progress import track
from speed import machine

import bcoskit
from bcoskit.data import open_dataset
from bcoskit.evaluation import accuracy, choose_grids, grid_pointing_game
from bcoskit.training import train

RUNS = Path("runs", "sweep")
RESULTS = Path(__file__).parent.parent / "docs" / "results"
COMMAND = "python benchmarks/sweep.py --data FOLDER"
EXPONENTS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
# Accuracy on CIFAR-10 in the first paper (Böhle et al., CVPR 2022, table 1): 100 epochs, wide layers, MaxOut, no norms.
PAPER = {1.0: 93.53, 1.25: 93.81, 1.5: 93.69, 1.75: 93.69, 2.0: 93.19, 2.25: 92.60, 2.5: 92.37}
NORMS = {
    "none": "",
    "bnu": "bnu_",
    "bnu-linear": "bnu_linear_",
    "lnu-linear": "lnu_linear_",
    "pnu-linear": "pnu_linear_",
}
STANDARD = "cnn9_narrow.standard_cifar10"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        table: The table in which it stands.
        model: Name of the network.
        epochs: How many.
        row: What tells it from the others of its table.
        seed: Of weights, order and augmentation.
        grids: Of the pointing game, if there are confident images for so many.
    """

    table: str
    model: str
    epochs: int
    row: dict[str, Any]
    seed: int = 42
    grids: int = 200

    @property
    def folder(self) -> Path:
        """Where it is."""
        return RUNS / f"{self.table} {self.model} seed {self.seed}"

    @property
    def pointing(self) -> Path:
        """The pointing game's figures."""
        return self.folder / f"pointing {self.grids}.json"


def exponent(b: float) -> str:
    """As in the names of networks."""
    return f"b{b:g}".replace(".", "_")


def runs() -> list[Run]:
    """All runs in the order in which they are made."""
    # The ends first: a sweep that is cut off shows the most then.
    sweep = [
        Run("b_sweep", STANDARD, 10, {"network": "ordinary", "b": None}),
        *(
            Run("b_sweep", f"cnn9_narrow.bcos_{exponent(b)}_cifar10", 10, {"network": "B-cos", "b": b})
            for b in sorted(EXPONENTS, key=lambda b: -abs(b - 1.75))
        ),
    ]
    ablation = [
        Run(
            "ablation",
            f"cnn9_narrow.bcos_{tag}{'' if max_out == 2 else 'nomaxout_'}cifar10",
            5,
            {"norm": norm, "max_out": max_out},
            grids=100,
        )
        for max_out in (1, 2)
        for norm, tag in NORMS.items()
    ]
    parity = [
        Run("parity", name, 30, {"network": title}, seed)
        for title, name in (
            ("ordinary ResNet-20", "resnet20.standard_cifar10"),
            ("B-cos ResNet-20", "resnet20.bcos_v2_bnu_linear_nomaxout_cifar10"),
            ("B-cos ResNet-20, MaxOut 2", "resnet20.bcos_cifar10"),
        )
        for seed in (42, 420)
    ]
    return [*sweep, *ablation, *parity]


def pointing(run: Run, data: Path) -> dict[str, Any]:
    """The pointing game of a trained network; by Input x Gradient as well if it is an ordinary one."""
    model = bcoskit.create_model(run.folder / "model.safetensors")
    dataset: Any = open_dataset(data, "test", model.transform)
    count = min(run.grids, len(choose_grids(accuracy(model, dataset).rows, grid=3, count=None)))
    found: dict[str, Any] = {"grids": count}
    for method in ("bcos", "input_x_gradient") if count else ():
        result = grid_pointing_game(model, dataset, method, grid=3, count=count)
        found[method] = {"median": result.median, "quartiles": list(result.quartiles)}
    return found


def make(run: Run, data: Path) -> None:
    """Train and measure, if that is not done."""
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(run.folder / "lock", timeout=0):
            if not (run.folder / "model.safetensors").exists():
                Console(stderr=True).print(f"{run.folder.name}")
                train(data, out=run.folder, model=run.model, epochs=run.epochs, seed=run.seed, resume=True)
            if not run.pointing.exists():
                run.pointing.write_text(json.dumps(pointing(run, data), indent=1) + "\n")
    except filelock.Timeout:
        return


def rows_of(table: str) -> list[dict[str, Any]]:
    """Of the runs that are finished, and of those that were when the table was written last; none if nothing is new."""
    if not any(run.pointing.exists() for run in runs() if run.table == table):
        return []
    stored = RESULTS / f"{table}.json"
    old = json.loads(stored.read_text())["rows"] if stored.exists() else []
    before = {(row["model"], row["seed"]): row for row in old}
    rows = list[dict[str, Any]]()
    for run in runs():
        if run.table != table:
            continue
        if not run.pointing.exists():
            if old_row := before.get((run.model, run.seed)):
                rows.append({**old_row, "grids": old_row.get("grids", run.grids)})
            continue
        found = json.loads(run.pointing.read_text())
        ordinary = ".standard" in run.model
        method = found.get("input_x_gradient" if ordinary else "bcos", {})
        measured = accuracies(run.folder)
        rows.append(
            {
                **run.row,
                "model": run.model,
                "epochs": run.epochs,
                "seed": run.seed,
                "accuracy": round(100 * measured[-1], 2),
                "pointing_method": "input_x_gradient" if ordinary else "bcos",
                "pointing_median": method.get("median"),
                "pointing_quartiles": method.get("quartiles"),
                "pointing_input_x_gradient": found.get("input_x_gradient", {}).get("median"),
                "grids": found.get("grids", run.grids),
                "curve": [round(100 * value, 2) for value in measured],
            }
        )
    return rows


def written(table: str, title: str, text: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
    """The JSON and the page of a table."""
    about = {
        "command": COMMAND,
        "data": "CIFAR-10 (JPEG q75), 50,000 training and 8,000 test images",
        "versions": {name: importlib.metadata.version(name) for name in ("bcoskit", "torch", "timm", "lightning")},
        "machine": machine(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{table}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    lines = [
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_shown(row.get(key)) for key in columns.values())} |" for row in rows),
    ]
    figure = ["", f"![{title}]({table}.png)"] if (RESULTS / f"{table}.png").exists() else []
    page = [f"# {title}", "", text, "", f"    {COMMAND}", "", *lines, *figure]
    (RESULTS / f"{table}.md").write_text("\n".join(page) + "\n")
    Console(width=140).print("\n".join((title, *lines)), markup=False)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and value < 1 else str(value)


def draw_sweep(rows: list[dict[str, Any]]) -> None:
    """Accuracy and pointing game over B, beside the paper's accuracies."""
    import matplotlib.pyplot as plt

    bcos = [row for row in rows if row["b"] is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    best, best_of_paper = max(row["accuracy"] for row in bcos), max(PAPER.values())
    b = [row["b"] for row in bcos]
    left.plot(b, [row["accuracy"] - best for row in bcos], "o-", label=f"here, best {best:.1f} %")
    left.plot(
        list(PAPER), [value - best_of_paper for value in PAPER.values()], "s--", label=f"paper, best {best_of_paper} %"
    )
    for row in rows:
        if row["b"] is None:
            left.axhline(row["accuracy"] - best, color="gray", linestyle=":", label="ordinary network, here")
            right.axhline(row["pointing_median"], color="gray", linestyle=":", label="ordinary, Input x Gradient")
    left.set(xlabel="B", ylabel="accuracy, points below the best")
    right.plot(b, [row["pointing_median"] for row in bcos], "o-", label="W(x)·x")
    right.plot(b, [row["pointing_input_x_gradient"] for row in bcos], "s--", label="Input x Gradient, same network")
    right.axhline(1 / 9, color="black", linewidth=0.8, label="chance")
    right.set(xlabel="B", ylabel="pointing game, median", ylim=(0, 1))
    for axis in (left, right):
        axis.legend(fontsize=7)
    figure.savefig(RESULTS / "b_sweep.png", dpi=110)


def report() -> None:
    """The pages of what is finished."""
    sweep = sorted(rows_of("b_sweep"), key=lambda row: row["b"] or 0.0)
    for row in sweep:
        row["paper_accuracy"] = PAPER.get(row["b"])
    if sum(row["b"] is not None for row in sweep) > 1:
        RESULTS.mkdir(parents=True, exist_ok=True)
        draw_sweep(sweep)
        written(
            "b_sweep",
            "Accuracy and localisation over B",
            "The nine layers of the first paper (Böhle et al., CVPR 2022), a quarter as wide, with uncentred batch "
            "norm and ReLU in the place of MaxOut, ten epochs each with the same seed; the paper trains 100 epochs at "
            "full width, with MaxOut and without norms. The pointing game, on 200 grids, is that of `W(x)·x`; of the "
            "ordinary network it is that of Input x Gradient. Chance is 0.111.",
            {
                "network": "network",
                "B": "b",
                "accuracy, %": "accuracy",
                "paper's accuracy, %": "paper_accuracy",
                "pointing game": "pointing_median",
                "Input x Gradient, same network": "pointing_input_x_gradient",
            },
            sweep,
        )
    if ablation := rows_of("ablation"):
        written(
            "ablation",
            "Norms and MaxOut",
            "The same nine layers at B = 2 without ReLU, five epochs each. A u stands for uncentred, bn, ln and pn for "
            "batch, layer and position norm, linear for a scale without bias; without norms there is the first paper's "
            "scale. The pointing game has fewer than 100 grids where the network is confident of too few images: 13 "
            "say little.",
            {
                "norm": "norm",
                "MaxOut": "max_out",
                "accuracy, %": "accuracy",
                "pointing game": "pointing_median",
                "Input x Gradient, same network": "pointing_input_x_gradient",
                "grids": "grids",
            },
            ablation,
        )
    if parity := rows_of("parity"):
        written(
            "parity",
            "B-cos and ordinary ResNet-20",
            "Thirty epochs each: the B-cos network with uncentred batch norm without bias and binary cross-entropy, "
            "the ordinary one with cross-entropy. MaxOut 2 doubles the filters; without it both have about as many "
            "parameters. The pointing game, on 200 grids, is that of `W(x)·x`, of the ordinary network that of Input x "
            "Gradient. Chance is 0.111, and the standard error of an accuracy 0.4.",
            {"network": "network", "seed": "seed", "accuracy, %": "accuracy", "pointing game": "pointing_median"},
            parity,
        )


def main() -> None:
    """Make the runs, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", default="*", help="pattern of `TABLE MODEL seed SEED`")
    parser.add_argument("--report", action="store_true", help="of what there is, without new runs")
    options = parser.parse_args()
    if not options.report:
        if options.data is None:
            parser.error("give --data, the folder of CIFAR-10")
        chosen = [run for run in runs() if fnmatchcase(run.folder.name, options.only)]
        for run in track(chosen, "Runs", console=Console(stderr=True)):
            make(run, options.data)
    report()


if __name__ == "__main__":
    main()
