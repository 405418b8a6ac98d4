"""The classifier of a converted network: before or after the pooling, with a bias and a temperature of the logits."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit._double import DoublePrecision
from bcoskit._layers import in_double_precision
from bcoskit.convert._config import BcosConfig
from bcoskit.convert._modules import HOOKS, TOLERANCE, contents, is_skipped, restore
from bcoskit.convert._probe import Probe, probe
from bcoskit.convert._report import ConvertedModule
from bcoskit.nn import LogitLayer


def move_classifier(
    model: nn.Module, config: BcosConfig, seen: Probe, skip: tuple[str, ...], notes: list[ConvertedModule]
) -> str | None:
    """The path of the last layer, after it has been put before the pooling where that is wanted and possible.

    None if the output is not that of a linear layer.
    """
    if seen.last is None or is_skipped(seen.last, skip) or not isinstance(model.get_submodule(seen.last), nn.Linear):
        return None
    if config.classifier == "before pooling":
        for pool_path in _pools_before(model, seen.last):
            if not is_skipped(pool_path, skip) and _can_be_moved(model, pool_path, seen.last, seen.example):
                _put_before(model, pool_path, seen.last)
                detail = f"classifies positions, then averages; was {pool_path} and {seen.last}"
                notes.append(ConvertedModule(seen.last, "classifier", "changed", detail))
                return f"{seen.last}.logits"
        notes.append(ConvertedModule(seen.last, "classifier", "kept", "no pool that it could be put before"))
    return seen.last


def _can_be_moved(model: nn.Module, pool_path: str, last: str, example: Tensor) -> bool:
    """Whether the output is the same with the classifier before the pool; the network is as before afterwards."""
    linear: Any = model.get_submodule(last)
    above = last.rpartition(".")[0]
    changed = (module for path, module in model.named_modules() if path in (last, pool_path, _flatten_in(above)))
    if any(vars(module)[name] for module in changed for name in HOOKS):
        return False
    is_half = torch.finfo(linear.weight.dtype).bits < 32
    tried = in_double_precision(model) if is_half else model
    before = contents(tried.modules())
    with DoublePrecision() if is_half else nullcontext(), _random_values(tried.get_submodule(last)):
        # An image with which the map has one position tells nothing: the next one is larger.
        for image, expected in _larger(tried, example.double() if is_half else example):
            try:
                conv = _put_before(tried, pool_path, last)
                same = _same_outputs(tried, conv, image, expected)
            except Exception:  # code between pool and classifier that needs a vector
                same = False
            finally:
                restore(before)
            if same is not None:
                return same
    return False


@contextmanager
def _random_values(linear: Any) -> Iterator[None]:
    """A classifier of other values inside: one of zeros gives the same output wherever it is."""
    parameters = [each for each in (linear.weight, linear.bias) if each is not None]
    values = [each.detach().clone() for each in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for each in parameters:
                each.copy_(torch.randn(each.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for each, value in zip(parameters, values, strict=True):
                each.copy_(value)


def _pools_before(model: nn.Module, last: str) -> list[str]:
    """Pools over all positions, beside the classifier or at the top."""
    above = last.rpartition(".")[0]
    names = ("global_pool", "avgpool", "pool")
    paths = [f"{prefix}.{name}" if prefix else name for prefix in dict.fromkeys((above, "")) for name in names]
    known = {path for path, _ in model.named_modules()}
    return [path for path in paths if path in known]


def _larger(model: nn.Module, small: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of several sizes and the outputs for them: of a small one the last map may have one position."""
    for factor in (1, 2, 4):
        example = small.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        example = example + torch.randn(example.shape, generator=torch.Generator().manual_seed(factor)).to(example)
        try:
            output = probe(model, example).output
        except Exception:  # not this size
            continue
        if output is not None:
            yield example, output


def _flatten_in(above: str) -> str:
    return f"{above}.flatten" if above else "flatten"


def _put_before(model: nn.Module, pool_path: str, last: str) -> nn.Module:
    """Put the classifier before the pool: the convolution of one position that it becomes."""
    linear: Any = model.get_submodule(last)
    flatten_path = _flatten_in(last.rpartition(".")[0])
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
    conv.weight = nn.Parameter(linear.weight.detach()[..., None, None], linear.weight.requires_grad)
    conv.bias = linear.bias
    head = nn.Sequential(OrderedDict(conv=conv, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(-3)))
    if any(path == flatten_path for path, _ in model.named_modules()):
        model.set_submodule(flatten_path, nn.Identity().train(linear.training))
    model.set_submodule(pool_path, nn.Identity().train(linear.training))
    model.set_submodule(last, head.train(linear.training))
    return conv


def _same_outputs(model: nn.Module, conv: nn.Module, example: Tensor, expected: Tensor) -> bool | None:
    """Whether the outputs are as before, on a map of several positions; None if there is one position."""
    positions = list[int]()
    handle = conv.register_forward_hook(lambda _module, _inputs, output: positions.append(output[0, 0].numel()))
    try:
        output = probe(model, example).output
    finally:
        handle.remove()
    if output is None or output.shape != expected.shape or not positions:
        return False
    if positions[-1] == 1:
        return None
    return bool((output - expected).abs().max() <= TOLERANCE * expected.abs().max())


def add_constants(root: nn.Module, config: BcosConfig, path: str) -> None:
    """Add bias and temperature behind the last layer, under each name that it has."""
    name = path.removesuffix(".logits")
    layer: Any = root.get_submodule(name)
    last = layer.conv if path != name else layer
    classes = last.out_channels if path != name else last.out_features
    bias = -math.log(max(classes - 1, 1)) if config.logit_bias == "uniform" else config.logit_bias
    logits = LogitLayer(config.temperature, bias).train(layer.training)
    if path != name:
        layer.add_module("logits", logits)
        return
    places = [(above, key) for above in root.modules() for key, child in above._modules.items() if child is layer]
    both = nn.Sequential(OrderedDict(linear=layer, logits=logits)).train(layer.training)
    for above, key in places:
        above._modules[key] = both
