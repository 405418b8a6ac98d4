"""What an explanation and a training step cost, as ratios measured in alternation on one machine.

    python benchmarks/explain.py [--batch 16] [--rounds 10] [--compile] [--out benchmarks/results]

For ResNet-20 (32×32) and a B-cos network of ResNet-50's size (224×224): `explain` against the forward pass with graph
of the same batch, and K targets against one. For training steps of ResNet-20 at batch 64: B-cos against the ordinary
network, compiled and not, and against the authors' package `bcos`, where it is installed.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import bcoskit
from bcoskit.models.cifar import bcos_cifar_resnet, cifar_resnet

Work = dict[str, Callable[[], object]]


def bcos_resnet50() -> nn.Module:
    """A network of ResNet-50's size: timm's, with B-cos convolutions, uncentred norms, and no activations."""
    network = timm.create_model("resnet50", in_chans=6, act_layer=nn.Identity)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                options = (child.kernel_size, child.stride, child.padding)
                setattr(parent, name, bcoskit.nn.BcosConv2d(child.in_channels, child.out_channels, *options))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, bcoskit.nn.BatchNorm(child.num_features))
            elif isinstance(child, nn.MaxPool2d):
                setattr(parent, name, nn.AvgPool2d(3, 2, 1))
    return network.eval()


def explanations(model: nn.Module, size: int, batch: int) -> Work:
    """A forward pass with graph, and explanations of one and of four targets."""
    x = bcoskit.encode(torch.rand(batch, 3, size, size)).contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    targets = torch.arange(4).expand(batch, 4)
    return {
        "forward": lambda: model(x.requires_grad_()),
        "explain, 1 target": lambda: bcoskit.explain(model, x),
        "explain, 4 targets": lambda: bcoskit.explain(model, x, targets),
    }


def authors_resnet20() -> nn.Module:
    """The network of the authors' package."""
    from bcos.models.resnet import cifar10_resnet20
    from bcos.modules import BcosConv2d, norms

    norm = norms.NoBias(norms.BatchNormUncentered2d)
    return cifar10_resnet20(num_classes=10, in_chans=6, norm_layer=norm, conv_layer=partial(BcosConv2d, b=2))


def training_steps(compiled: bool) -> Work:
    """One step of Adam at batch 64, of ours, the ordinary network, and the authors'."""
    x = bcoskit.encode(torch.rand(64, 3, 32, 32)).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (64,))
    targets = F.one_hot(labels, 10).float()
    binary = partial(F.binary_cross_entropy_with_logits, target=targets)
    ordinary = partial(F.cross_entropy, target=labels)
    networks: list[tuple[str, Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor]]] = [
        ("ordinary", lambda: cifar_resnet(20, 10), x[:, :3].contiguous(memory_format=torch.channels_last), ordinary),
        ("B-cos", lambda: bcos_cifar_resnet(20, 10), x, binary),
        ("bcos (authors)", authors_resnet20, x, binary),
    ]
    work: Work = {}
    for name, make, images, loss in networks:
        try:
            network = make().train().to(memory_format=torch.channels_last)
        except ModuleNotFoundError:
            continue
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        work[name] = partial(_step, torch.compile(network) if compiled else network, optimizer, images, loss)
    return work


def _step(
    network: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, x: Tensor, loss: Callable[[Tensor], Tensor]
) -> None:
    optimizer.zero_grad()
    loss(network(x)).backward()
    optimizer.step()


def ratios(work: Work, rounds: int, title: str) -> dict[str, dict[str, float]]:
    """Times in alternation, each as the median of its ratios to the first one of the same round, with quartiles."""
    for function in work.values():
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in track(range(rounds), title, transient=True):
        for name, function in work.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    table: dict[str, dict[str, float]] = {}
    for name, values in times.items():
        relative = [value / base for value, base in zip(values, first, strict=True)]
        low, median, high = statistics.quantiles(relative, n=4)
        table[name] = {"ratio": median, "low": low, "high": high, "seconds": statistics.median(values)}
    return table


def _processor() -> str:
    """The name of the processor, which Linux tells in a file of its own."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def main() -> None:
    """Measure, print a table, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="also compiled training steps, which take minutes")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    torch.manual_seed(0)
    resnet20 = bcoskit.create_model("resnet20.bcos_cifar10")
    works: dict[str, Callable[[], Work]] = {
        f"ResNet-20, batch {options.batch}": partial(explanations, resnet20, 32, options.batch),
        f"ResNet-50, batch {options.batch}": partial(explanations, bcos_resnet50(), 224, options.batch),
        "ResNet-20 training step, eager": partial(training_steps, False),
    }
    if options.compile:
        works["ResNet-20 training step, compiled"] = partial(training_steps, True)
    results: dict[str, Any] = {
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "bcoskit": bcoskit.__version__, "python": platform.python_version()},
        "ratios": {title: ratios(make(), options.rounds, title) for title, make in works.items()},
    }
    lines = ["| work | of | ratio | quartiles |", "|---|---|---|---|"]
    for title, table in results["ratios"].items():
        for name, row in table.items():
            lines.append(f"| {title} | {name} | {row['ratio']:.2f} | {row['low']:.2f} to {row['high']:.2f} |")
    lines += ["", f"Median of {options.rounds} rounds in alternation, relative to the first line of each work."]
    lines += [f"{results['machine']}; torch {torch.__version__}."]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "explain.json").write_text(json.dumps(results, indent=2) + "\n")
    (options.out / "explain.md").write_text("\n".join(lines) + "\n")
    Console(width=120).print("\n".join(lines), highlight=False, markup=False)


if __name__ == "__main__":
    main()
