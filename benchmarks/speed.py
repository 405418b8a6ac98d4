"""Time and memory of B-cos networks against the ordinary ones and the authors', in one run and in alternation.

    python benchmarks/speed.py [--networks resnet18 …] [--works forward …] [--modes eager compiled] [--rounds 10]
    python benchmarks/speed.py --check benchmarks/results/speed.json [the same options]

Subjects: `ordinary`, timm's network of the same shape; `six channels`, the same for images as B-cos networks read them,
which is the least that these can cost; `bcoskit`; `authors`, their package `bcos` in the same mode and layout;
`as shipped`, the same eagerly and channels first, as it comes, where that differs; and in forward passes and
explanations `fused`, ours after `bcoskit.fuse`. Works: `forward` of a batch without graph; `explain`, one
image, for ordinary networks the gradient of a logit with respect to the input; `explain batch`, for the authors one
image after the other; `ten targets` of one image; `train`, one step of SGD. Times are medians of the ratios to the
first subject of the same round, with quartiles. Memory is the growth of the peak of the process during one call
(allocated memory on a GPU, which is used if there is one). Writes JSON and Markdown; `--check` measures what an
earlier file has, and fails if something got slower by more than both spreads.
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch._functorch.config
import torch.nn.functional as F
from authors import authors_network
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import bcoskit
from bcoskit.models import create_model, model_row
from bcoskit.models.cifar import cifar_resnet


def _timm_network(name: str, channels: int) -> nn.Module:
    return timm.create_model(name, in_chans=channels)


# From our names to the ordinary network for images of so many channels.
NETWORKS: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "resnet20": ("resnet20.bcos_v2_bnu_linear_nomaxout_cifar10", lambda n: cifar_resnet(20, 10, in_channels=n)),
    "resnet18": ("resnet18.bcos_v2_in1k", partial(_timm_network, "resnet18")),
    "resnet50": ("resnet50.bcos_v2_in1k", partial(_timm_network, "resnet50")),
    "densenet121": ("densenet121.bcos_v2_in1k", partial(_timm_network, "densenet121")),
    "convnext_tiny": ("convnext_tiny.bcos_v2_bnu_in1k", partial(_timm_network, "convnext_tiny")),
    "simple_vit_s": ("simple_vit_s_patch16_224.bcos_v2_in1k", partial(_timm_network, "vit_small_patch16_224")),
}
WORKS = ("forward", "explain", "explain batch", "ten targets", "train")
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    network: str
    work: str
    mode: str
    layout: str
    dtype: str

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.network}, {self.work}, {self.mode}, channels {self.layout}, {self.dtype}"


def subjects(setting: Setting, batch: int) -> dict[str, Callable[[], object]]:
    """What is called for each subject, the ordinary network first."""
    name, ordinary = NETWORKS[setting.network]
    row = model_row(name)
    torch.manual_seed(0)
    networks = {"ordinary": ordinary(3), "six channels": ordinary(6)}
    networks |= {"bcoskit": create_model(name), "authors": authors_network(row)}
    if (setting.mode, setting.layout) != ("eager", "first"):
        networks["as shipped"] = authors_network(row)
    if setting.work != "train":
        networks["fused"] = bcoskit.fuse(create_model(name))
    count = batch if setting.work in ("forward", "explain batch", "train") else 1
    size = row.transform.size
    pixels = torch.rand(count, 3, size, size)
    calls: dict[str, Callable[[], object]] = {}
    for subject, network in networks.items():
        how = replace(setting, mode="eager", layout="first") if subject == "as shipped" else setting
        x = (pixels if subject == "ordinary" else bcoskit.encode(pixels)).to(DEVICE)
        x = x.contiguous(memory_format=FORMATS[how.layout])
        network = network.to(DEVICE, memory_format=FORMATS[how.layout]).train(setting.work == "train")
        # Explanations need no gradients of weights, which a compiled backward pass would compute.
        network = network.requires_grad_(setting.work == "train")
        autocast = partial(torch.autocast, DEVICE.type, DTYPES[setting.dtype], setting.dtype != "float32")
        calls[subject] = partial(_under, autocast, _call(how, subject, network, x))
    return calls


def _under(context: Callable[[], Any], call: Callable[[], object]) -> None:
    with context():
        call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _call(setting: Setting, subject: str, network: nn.Module, x: Tensor) -> Callable[[], object]:
    compiled: Callable[..., Any] = torch.compile(network) if setting.mode == "compiled" else network
    if setting.work == "forward":
        return partial(_forward, compiled, x)
    if setting.work == "train":
        return partial(_step, compiled, torch.optim.SGD(network.parameters(), 1e-3), x)
    targets = 10 if setting.work == "ten targets" else 1
    if subject in ("ordinary", "six channels"):
        return partial(_gradient, compiled, x, targets)
    if subject in ("authors", "as shipped"):
        return partial(_one_by_one, network, x, targets)
    explain = bcoskit.compile_explain(network) if setting.mode == "compiled" else partial(bcoskit.explain, network)
    target = None if targets == 1 else torch.arange(targets).expand(len(x), targets)
    return partial(explain, x, target)


def _forward(network: Callable[..., Any], x: Tensor) -> None:
    with torch.no_grad():
        network(x)


@torch._functorch.config.patch(donated_buffer=False)  # compiled graphs are kept from one target to the next
def _gradient(network: Callable[..., Any], x: Tensor, targets: int) -> None:
    start = x.detach().requires_grad_()
    logits = network(start)
    if targets == 1:
        torch.autograd.grad(logits.amax(1).sum(), start)
    for index in range(targets if targets > 1 else 0):
        torch.autograd.grad(logits[:, index].sum(), start, retain_graph=index < targets - 1)


def _one_by_one(network: Any, x: Tensor, targets: int) -> None:
    for image in x.split(1):
        start = image.detach().requires_grad_()
        with network.explanation_mode():
            for index in range(targets):
                logits = network(start)
                (logits.amax() if targets == 1 else logits[0, index]).backward(inputs=[start])
                start.grad = None


def _step(network: Callable[..., Any], optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    logits = network(x)
    F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits)).backward()
    optimizer.step()


def measured(setting: Setting, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each subject."""
    calls = subjects(setting, batch)
    for call in calls.values():
        call()
        call()
    peaks = {subject: _peak(call) for subject, call in calls.items()}
    times: dict[str, list[float]] = {subject: [] for subject in calls}
    for _ in range(rounds):
        for subject, call in calls.items():
            start = time.perf_counter()
            call()
            times[subject].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    rows: list[dict[str, Any]] = []
    for subject, values in times.items():
        relative = [value / base for value, base in zip(values, first, strict=True)]
        low, median, high = statistics.quantiles(relative, n=4)
        rows.append(
            {
                **vars(setting),
                "subject": subject,
                "ratio": median,
                "low": low,
                "high": high,
                "milliseconds": 1e3 * statistics.median(values),
                "peak_megabytes": peaks[subject],
            }
        )
    return rows


def _peak(call: Callable[[], object]) -> float | None:
    """Megabytes by which memory in use grows at most during a call; None where that cannot be told."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that it counts when it is taken again
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1e3


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])


def slower(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """What is slower than before by more than both spreads."""
    keys = ("network", "work", "mode", "layout", "dtype", "subject")
    before = {tuple(row[key] for key in keys): row for row in old}
    found: list[str] = []
    for row in new:
        earlier = before.get(tuple(row[key] for key in keys))
        if earlier is not None and row["subject"] != "ordinary" and row["low"] > earlier["high"]:
            title = Setting(*(row[key] for key in keys[:-1])).title
            found.append(f"{title}: {row['subject']} {earlier['ratio']:.2f} -> {row['ratio']:.2f}")
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        "| network | work | mode | channels | dtype | subject | ratio | quartiles | ms | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        peak = "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}"
        cells = (row["network"], row["work"], row["mode"], row["layout"], row["dtype"], row["subject"])
        figures = (f"{row['ratio']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}", f"{row['milliseconds']:.1f}", peak)
        lines.append(f"| {' | '.join((*cells, *figures))} |")
    command = f"`python benchmarks/speed.py {results['command']}`".replace(" `", "`")
    lines += ["", f"{command}: batch {results['batch']}, median of {results['rounds']} rounds in alternation."]
    lines += [f"{results['machine']}; {', '.join(f'{key} {value}' for key, value in results['versions'].items())}."]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """The processor and the threads, or the GPU."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{next(iter(names), platform.processor() or platform.machine())}, {torch.get_num_threads()} threads"


def main() -> int:
    """Measure, print, and write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--layouts", nargs="+", choices=FORMATS, default=["last"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--budget", type=float, default=1.0, help="activation_memory_budget of torch's compiler")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default="speed", help="of the files that are written")
    parser.add_argument("--check", type=Path, help="results of an earlier run")
    options = parser.parse_args()
    torch._functorch.config.activation_memory_budget = options.budget
    settings = [
        Setting(network, work, mode, layout, dtype)
        for network in options.networks
        for work in options.works
        for mode in options.modes
        for layout in options.layouts
        for dtype in options.dtypes
    ]
    console = Console(width=150)
    results: dict[str, Any] = {
        "command": " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "batch": options.batch,
        "rounds": options.rounds,
        "rows": [],
    }
    for setting in track(settings, "settings", console=Console(stderr=True), transient=True):
        torch.compiler.reset()
        results["rows"] += measured(setting, options.batch, options.rounds)
        if options.check is None:  # what is measured outlives an interruption
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"{options.name}.json").write_text(json.dumps(results, indent=1) + "\n")
            (options.out / f"{options.name}.md").write_text(markdown(results))
    console.print(markdown(results), highlight=False, markup=False)
    if options.check is not None:
        found = slower(json.loads(options.check.read_text())["rows"], results["rows"])
        console.print("\n".join(found) if found else "nothing got slower", highlight=False, markup=False)
        return int(bool(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
