"""Which networks `bcosify` converts: one small member of every model family of timm, and torchvision's classifiers.

    python benchmarks/coverage.py [--only PATTERN] [--variants] [--resume]

A family is a module of timm's models, or of torchvision's; its member is the one with the fewest parameters, as the
registry tells it. Each is built with fresh weights, converted by the default configuration, calibrated so that the
signal arrives (the uncentred norms get the mean squares of one batch, and filters without norm a size), and then
explained and audited: the graph (no operation that is not linear), the numbers (derivative of W(x) exactly 0),
completeness in single precision, W(x) finite and not 0. The exact start is the difference between the logits of the
network and of its conversion with exponent 1 and biases kept; bypassed are layers whose weight a network reads past
them, and which stay as they are. Of networks above 150 million parameters the first three blocks are taken.
`--variants` goes through further networks with unusual parts. Writes `docs/coverage.md` and `.json`.
"""

import argparse
import copy
import gc
import json
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import bcoskit
from bcoskit._audit import weights_gradient
from bcoskit.convert import BcosConfig, bcosify
from bcoskit.models._building import WithoutValues
from bcoskit.nn import BatchNorm
from bcoskit.nn._base import BcosArguments

DOCS = Path(__file__).parent.parent / "docs"
_RESIDUAL, _EXACT = 1e-4, 1e-5
_LARGE, _BLOCKS = 150_000_000, 3
VARIANTS = (
    "resnet50_gn resnetv2_50x1_bit resnetv2_50d_frn resnetv2_50d_evos resnet10t resnet26t seresnet50 ecaresnet26t "
    "resnetblur18 resnetaa50 skresnet18 resnest14d gcresnet50t lambda_resnet26t halonet26t botnet26t_256 "
    "lamhalobotnet50ts_256 convnextv2_atto convnext_atto_rms poolformerv2_s12 mobilevitv2_050 efficientvit_l1 "
    "efficientnet_cc_b0_4e mixnet_s tf_mixnet_s nf_resnet26 nf_regnet_b0 dm_nfnet_f0 eca_nfnet_l0 "
    "eva02_tiny_patch14_224 vit_tiny_r_s16_p8_224 vit_base_patch16_rope_224 resnet50_clip swinv2_cr_tiny_224 "
    "cs3darknet_focus_s regnetz_b16 vit_small_patch16_dinov3 deit_tiny_distilled_patch16_224 xception41p "
    "repvgg_a0 vgg11_bn"
).split()


def families() -> dict[str, str]:
    """From each family to its member with the fewest parameters."""
    found: dict[str, tuple[int, str]] = {}
    for family in track(timm.list_modules(), "sizes", console=Console(stderr=True), transient=True):
        sizes: list[tuple[int, str]] = []
        for name in timm.list_models(module=family):
            try:
                with WithoutValues():
                    model = timm.create_model(name)
            except Exception:  # some cannot be built without values
                continue
            sizes.append((sum(parameter.numel() for parameter in model.parameters()), name))
        found[family] = min(sizes) if sizes else min(map(_size, timm.list_models(module=family)))
    # The largest ones, which take minutes, come last.
    return {family: name for family, (_, name) in sorted(found.items(), key=lambda item: item[1])}


def _size(name: str) -> tuple[int, str]:
    return sum(parameter.numel() for parameter in timm.create_model(name).parameters()), name


def torchvision_members() -> dict[str, str]:
    """The smallest classifier of each of torchvision's families."""
    found: dict[str, tuple[int, str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        builder: Any = torchvision.models.get_model_builder(name)
        weights: Any = torchvision.models.get_model_weights(name)
        size = weights.DEFAULT.meta["num_params"]
        family = builder.__module__.rpartition(".")[2]
        found[family] = min(found.get(family, (sys.maxsize, "")), (size, name))
    return {f"torchvision {family}": f"torchvision/{name}" for family, (_, name) in found.items()}


def built(name: str) -> tuple[nn.Module, int]:
    """A network with weights that let every branch be seen, and the side of its images."""
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        options = {"init_weights": True} if name.endswith(("googlenet", "inception_v3")) else {}
        model = torchvision.models.get_model(name.partition("/")[2], num_classes=10, **options)
        side, fixed = 224, False
    else:
        model = timm.create_model(name, num_classes=10)
        side, fixed = int(model.pretrained_cfg["input_size"][-1]), bool(model.pretrained_cfg.get("fixed_input_size"))
    _shorten(model.eval())
    for smaller in () if fixed else (64, 96, 128, 160, 192):
        try:
            with torch.no_grad():
                model(torch.rand(1, 3, smaller, smaller))
        except Exception:  # not this size
            continue
        side = min(side, smaller)
        break
    return _awake(model), side


def _shorten(model: nn.Module) -> None:
    """Of a network that would not fit into memory the first blocks of each stage."""
    if sum(parameter.numel() for parameter in model.parameters()) < _LARGE:
        return
    for module in model.modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(block) for block in module}) == 1:
            del module[_BLOCKS:]


def _awake(model: nn.Module) -> nn.Module:
    """Weights that start at 0 or nearly so, such as scales of branches, hide what they multiply."""
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) < 1e-3:
                parameter.normal_(std=0.5)
    return model


def _normalized(model: nn.Module, images: Tensor) -> Tensor:
    configuration: Any = getattr(model, "pretrained_cfg", None)
    if not configuration:
        return images
    mean, std = (images.new_tensor(configuration[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


def _calibrated(model: nn.Module, x: Tensor) -> None:
    """Give running statistics to uncentred norms, and filters a size at which the signal stays, by one batch."""

    def resize(layer: Any, _inputs: Any, output: Tensor) -> Tensor:
        size = output.square().mean().sqrt()
        scaled = layer.gain if getattr(layer, "standardize", False) else layer.weight
        if layer.normalize_weight or scaled is None or layer.bias is not None or not size > 0:
            return output
        scaled.div_(size ** (1 / layer.b))  # in filters without unit norm the layer is of degree b
        return output / size

    def set_variance(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        # Of random networks some channels are all but constant: by their variance they would be made huge.
        norm.running_var.copy_(inputs[0].square().mean((0, *range(2, inputs[0].ndim))).clamp_min(1e-6))

    layers = [module for module in model.modules() if isinstance(module, BcosArguments)]
    norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.running_var is not None]
    handles = [layer.register_forward_hook(resize) for layer in layers]
    handles += [norm.register_forward_pre_hook(set_variance) for norm in norms]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()


def _difference(model: nn.Module, images: Tensor) -> float:
    """Between the logits of a network and those of its exact conversion, relative to the largest."""
    with torch.no_grad():
        expected = model(_normalized(model, images))
        exact = bcosify(model, BcosConfig.preset("exact"))(bcoskit.encode(images))
    return float((exact - expected).abs().max() / expected.abs().max())


def measured(name: str) -> dict[str, Any]:
    """One row of the table."""
    start = time.perf_counter()
    row: dict[str, Any] = {"model": name, "problem": None}
    try:
        model, side = built(name)
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        row["side"] = side
        row["exact"] = _difference(model, images)
        if row["exact"] > _EXACT:  # of a network that makes rounding large itself
            row["exact_double"] = _difference(copy.deepcopy(model).double(), images.double())
        converted = bcosify(model, BcosConfig(max_pool="average"), inplace=True)
        row["bypassed"] = len(converted.conversion.of("bypassed"))
        row["left"] = len(converted.conversion.of("left"))
        x = bcoskit.encode(images)
        _calibrated(converted, x)
        explanation = bcoskit.explain(converted, x[:1], shares=True)
        assert explanation.residual is not None
        row["residual"] = float(explanation.residual.abs().max())
        row["largest"] = float(explanation.weights.abs().max())
        row["numeric"] = weights_gradient(converted, x[:1])
        if row["residual"] > _RESIDUAL:
            double = bcoskit.explain(converted.double(), x[:1].double(), shares=True)
            assert double.residual is not None
            found = float(double.residual.abs().max())
            row["problem"] = f"rounding grows through its layers; in double precision the residual is {found:.0e}"
        row["passed"] = (
            row.get("exact_double", row["exact"]) <= _EXACT
            and row["numeric"] == 0
            and row["residual"] <= _RESIDUAL
            and row["largest"] > 0
        )
    except Exception as error:  # what keeps a network from being converted is the result
        row["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        row["passed"] = False
    row["seconds"] = time.perf_counter() - start
    gc.collect()
    return row


def table(title: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    passed = sum(row["passed"] for row in rows.values())
    lines = [f"## {title}: {passed} of {len(rows)}", ""]
    lines += [
        "| family | member | exact start | residual | numeric | bypassed | passed |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, row in sorted(rows.items()):

        def number(key: str, row: dict[str, Any] = row) -> str:
            return "-" if row.get(key) is None else f"{row[key]:.0e}" if row[key] else "0"

        outcome = "yes" if row["passed"] else f"no: {row['problem'] or 'the figures'}"
        exact = number("exact") + (f" (double: {number('exact_double')})" if "exact_double" in row else "")
        cells = (family, f"`{row['model']}`", exact, number("residual"), number("numeric"))
        lines.append(f"| {' | '.join(cells)} | {row.get('bypassed', '-')} | {outcome} |")
    return [*lines, ""]


def page(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """All tables in Markdown."""
    lines = [
        "# Which networks can be converted",
        "",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n")[2].strip(),
        "",
    ]
    for title, rows in results.items():
        lines += table(title, rows)
    lines.append(f"`python benchmarks/coverage.py {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    lines[-1] += f"; torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}."
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern of families")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--resume", action="store_true", help="keep what coverage.json has of networks that passed")
    options = parser.parse_args()
    before = json.loads((DOCS / "coverage.json").read_text()) if options.resume else {"members": {}, "rows": {}}
    groups: dict[str, dict[str, str]] = before["members"] or {"Families": torchvision_members() | families()}
    if options.variants:
        groups["Variants"] = {name: name for name in VARIANTS}
    console = Console(width=180, stderr=True)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for title, members in groups.items():
        chosen = {family: name for family, name in members.items() if fnmatchcase(family, options.only)}
        results[title] = {}
        for family, name in track(chosen.items(), title, console=console, transient=True):
            known = before["rows"].get(title, {}).get(family)
            results[title][family] = known if known is not None and known["passed"] else measured(name)
            row = results[title][family]
            if not row["passed"]:
                console.print(f"{family} {name}: {row['problem'] or row}", markup=False, highlight=False)
            if options.only == "*":  # what is measured outlives an interruption
                (DOCS / "coverage.md").write_text(page(results))
                (DOCS / "coverage.json").write_text(json.dumps({"members": groups, "rows": results}, indent=1) + "\n")
    console.print(page(results), markup=False, highlight=False)


if __name__ == "__main__":
    main()
