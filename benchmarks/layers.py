"""Where the time of a forward pass goes: operations and bytes of every kind of layer against the machine's limits.

    python benchmarks/layers.py [--network resnet18.bcos_v2_in1k] [--batch 16]

Limits are measured: operations per second of a large matrix product, bytes per second of a copy into memory that is in
use, and of one into fresh memory. Of each kind of convolution that the network has, with its norm and ReLU, the table
tells how often it is there, the operations, what an ordinary block moves, what the B-cos block moves beside that, the
time that the limits allow for either, and the time that both take (medians, in alternation). Writes Markdown under
`benchmarks/results`.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from speed import machine
from torch import Tensor, nn

import bcoskit
from bcoskit.models import create_model
from bcoskit.nn import BatchNorm, BcosConv2d


@dataclass(frozen=True)
class Kind:
    """A convolution and the size of its input."""

    channels: int
    filters: int
    kernel: int
    stride: int
    padding: int
    size: int

    @property
    def outputs(self) -> int:
        """Positions along one side of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1


def seconds(*calls: Callable[[], object], rounds: int = 15) -> list[float]:
    """Medians of calls in alternation."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 2):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[2:]) for found in times]


def limits() -> tuple[float, float, float]:
    """Operations per second; bytes per second into memory in use and into fresh memory."""
    matrix = torch.rand(2048, 2048)
    values, used = torch.rand(1 << 26), torch.rand(1 << 26)
    product, copy, clone = seconds(
        lambda: matrix @ matrix, lambda: used.copy_(values), lambda: values.clone(), rounds=7
    )
    moved = 2 * values.nbytes
    return 2 * 2048**3 / product, moved / copy, moved / clone


def kinds(name: str) -> Counter[Kind]:
    """The convolutions of a network, and how often each is there."""
    model = create_model(name).eval()
    found = Counter[Kind]()

    def note(module: Any, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        if module.groups == 1 and module.max_out == 1 and module.kernel_size[0] == module.kernel_size[1]:
            filters, channels, kernel, _ = module.weight.shape
            padding = module.padding[0] if isinstance(module.padding, tuple) else 0
            found[Kind(channels, filters, kernel, module.stride[0], padding, arguments[0].shape[-1])] += 1

    for module in model.modules():
        if isinstance(module, BcosConv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(bcoskit.encode(torch.rand(1, 3, model.transform.size, model.transform.size)))
    return found


def row(kind: Kind, count: int, batch: int, rates: tuple[float, float, float]) -> str:
    """One line of the table."""
    arguments = (kind.channels, kind.filters, kind.kernel, kind.stride, kind.padding)
    ordinary = nn.Sequential(nn.Conv2d(*arguments, bias=False), nn.BatchNorm2d(kind.filters), nn.ReLU(inplace=True))
    ours = nn.Sequential(BcosConv2d(*arguments), BatchNorm(kind.filters), nn.ReLU(inplace=True))
    fused = bcoskit.fuse(ours.eval())
    x = torch.rand(batch, kind.channels, kind.size, kind.size).contiguous(memory_format=torch.channels_last)
    calls: list[Callable[[], object]] = []
    for block in (ordinary, ours, fused):
        block.eval().to(memory_format=torch.channels_last)
        calls.append(lambda block=block: block(x))
    with torch.no_grad():
        milliseconds = [1e3 * value for value in seconds(*calls)]
    weight = 4 * kind.filters * kind.channels * kind.kernel**2
    read, written = x.nbytes, 4 * batch * kind.filters * kind.outputs**2
    operations = written / 4 * 2 * kind.channels * kind.kernel**2
    moved = read + weight + 5 * written  # the convolution writes, the norm reads and writes, and so does the ReLU
    added = read + weight + 2 * written  # norms of patches, norms of filters, the scaling in place
    bound = 1e3 * max(operations / rates[0], moved / rates[1]), 1e3 * added / rates[1]
    shape = f"{kind.kernel}x{kind.kernel}, {kind.channels} to {kind.filters}, {kind.size} px"
    shape += f", stride {kind.stride}" if kind.stride > 1 else ""
    figures = (operations / 1e9, moved / 1e6, added / 1e6, bound[0], sum(bound), *milliseconds)
    return f"| {shape} | {count} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18.bcos_v2_in1k")
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    rates = limits()
    lines = [
        "| layer | times | GFLOP | MB, ordinary | MB, added | ms allowed, ordinary | B-cos "
        "| ms taken, ordinary | B-cos | fused |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row(*item, options.batch, rates) for item in track(kinds(options.network).items(), transient=True)]
    lines += [
        "",
        f"Limits: {rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.1f} GB/s into memory in use, "
        f"{rates[2] / 1e9:.1f} GB/s into fresh memory.",
        f"`python benchmarks/layers.py --network {options.network} --batch {options.batch}`: evaluation, channels "
        f"last, float32; {machine()}; torch {torch.__version__}.",
    ]
    text = "\n".join(lines) + "\n"
    Console(width=150).print(text, markup=False, highlight=False)
    (Path(__file__).parent / "results" / "layers.md").write_text(text)


if __name__ == "__main__":
    main()
