"""The table of all networks: parameters, published accuracy, parity with the authors, completeness.

    python benchmarks/networks.py [--pattern '*'] [--out docs] [--resume]

Each network gets random weights in the authors' format, read from a file as anyone would. Parity is the largest
difference of W(x) of one class relative to its largest entry: against the authors' package `bcos` in single precision
(random running statistics) and in double precision (those of random images); against stored outputs, in double
precision, for networks that are in no package. Completeness is the residual `logit - Σ W(x)·x - Σ shares` relative to
the largest of the three, in both precisions. Writes networks.json and the table networks.md, and the numbers of
parameters that `bcoskit models` lists.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from authors import authors_network, explanation, has_counterpart
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import bcoskit
from bcoskit.models import ModelRow, create_model, list_models, model_row
from golden import NETWORKS, golden

_TARGET = 7
_ROOT = Path(__file__).parent.parent
_PARAMETERS = _ROOT / "src" / "bcoskit" / "assets" / "parameters.json"  # for `bcoskit models`


def measured(name: str) -> dict[str, Any]:
    """What the table says of one network."""
    row = model_row(name)
    torch.manual_seed(0)
    figures: dict[str, Any] = {"network": name}
    if has_counterpart(row):
        single = _against_package(row, torch.float32)
        double = _against_package(row, torch.float64)
        figures |= {"parity_single": single, "parity_double": double, "parity_with": "bcos"}
    elif name in NETWORKS:
        figures |= {"parity_single": None, "parity_double": _against_golden(row), "parity_with": "stored outputs"}
    else:
        figures |= {"parity_single": None, "parity_double": None, "parity_with": None}
    network = _randomized(row, create_model(name))
    figures["parameters"] = _parameters(name)
    x = _image(row)
    for precision, dtype in (("single", torch.float32), ("double", torch.float64)):
        e = bcoskit.explain(network.to(dtype), x.to(dtype), shares=True)
        figures[f"residual_{precision}"] = float(e.residual.abs().max())
        figures["constants"] = sorted(e.shares)
    return figures


def _parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_row(name).build().parameters())


def _against_package(row: ModelRow, dtype: torch.dtype) -> float:
    theirs = authors_network(row, calibrated=dtype is torch.float64)
    ours = _from_their_file(row, theirs.state_dict()).to(dtype)
    x = _image(row).to(dtype)
    logits, weights = explanation(theirs.to(dtype), x, _TARGET)
    e = bcoskit.explain(ours, x, _TARGET)
    worst = _difference(e.logits, logits)
    # The package does not explain the ordinary transformers.
    return worst if row.loss == "cross_entropy" else max(worst, _difference(e.weights, weights))


def _against_golden(row: ModelRow) -> float:
    stored = golden(row.name, row.transform.size)
    e = bcoskit.explain(_from_their_file(row, stored.weights).double(), stored.image)
    return _difference(stored.cells(e.contributions[0]), stored.contributions)


def _randomized(row: ModelRow, network: nn.Module) -> nn.Module:
    """Norms and biases as no initialisation leaves them, and statistics with which activations keep their size."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if name.endswith(("bias", "running_mean")):
            nn.init.normal_(tensor, std=0.1)
        elif tensor.ndim < 2 and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    running = [module for module in network.modules() if getattr(module, "running_var", None) is not None]
    for module in running:
        module.momentum = 1.0
    if running:
        size = min(row.transform.size, 96)
        with torch.no_grad():
            network.train()(torch.rand(4, row.in_channels, size, size))
    return network.eval()


def _from_their_file(row: ModelRow, weights: dict[str, Tensor]) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(weights, path)
        return create_model(row.name, weights=path)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _image(row: ModelRow) -> Tensor:
    pixels = torch.rand(1, 3, row.transform.size, row.transform.size, dtype=torch.float64)
    return bcoskit.encode(pixels) if row.transform.encoding == "bcos" else pixels


def table(results: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        "# Networks",
        "",
        "Made by `python benchmarks/networks.py`, which tells what is measured. Accuracies are those that the authors",
        "published, of weights that `create_model(name, weights=True)` loads; all else is of random weights. Parity is",
        "the largest relative difference from the authors' W(x), in single and double precision, where their package",
        "or stored outputs have the network; completeness the largest residual relative to the largest of the logit",
        "and the sums of contributions and of constants. Constants are what of a logit does not pass through the",
        "input, beside the constant of the logits itself.",
        "",
        "| network | parameters | published accuracy | parity (single) | parity (double) | completeness (single) | "
        "completeness (double) | constants |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        checkpoint = model_row(result["network"]).checkpoint
        accuracy = None if checkpoint is None else checkpoint.accuracy
        kinds = sorted({_kind(name) for name in result["constants"]} - {"logits"})
        cells = (
            f"`{result['network']}`",
            f"{result['parameters']:,}",
            "-" if checkpoint is None or accuracy is None else f"{accuracy:g} % ({checkpoint.measured_on})",
            *(_figure(result[key]) for key in ("parity_single", "parity_double", "residual_single", "residual_double")),
            ", ".join(kinds) or "-",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kind(constant: str) -> str:
    """What a constant is, without the layer that has it."""
    if constant.endswith("logits.bias"):
        return "logits"
    if "normalize" in constant:
        return "mean of the images"
    return "position embedding" if constant.startswith("pos_embed") else "biases and means"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def main() -> None:
    """Measure, write, and print the largest figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="*")
    parser.add_argument("--out", type=Path, default=_ROOT / "docs")
    parser.add_argument("--resume", action="store_true", help="keep what networks.json has")
    options = parser.parse_args()
    path = options.out / "networks.json"
    results = {each["network"]: each for each in json.loads(path.read_text())} if options.resume else {}
    console = Console()
    counts = {name: _parameters(name) for name in track(list_models(), "parameters", console=console)}
    _PARAMETERS.write_text(json.dumps(counts, indent=1) + "\n")
    missing = [name for name in list_models(options.pattern) if name not in results]
    for name in track(missing, "networks", console=console):
        results[name] = measured(name)
        ordered = [results[key] for key in sorted(results)]
        path.write_text(json.dumps(ordered, indent=1) + "\n")
        (options.out / "networks.md").write_text(table(ordered))
    for key in ("parity_single", "parity_double", "residual_single", "residual_double"):
        having = [each for each in results.values() if each[key] is not None]
        if having:
            worst = max(having, key=lambda each: each[key])
            console.print(f"largest {key} of {len(having)} networks: {worst[key]:.1e} ({worst['network']})")


if __name__ == "__main__":
    main()
