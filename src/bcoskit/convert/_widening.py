"""Inputs of pairs `[x, 1 - x]`: wider first layers, or a step before the network where these do not work."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit._double import DoublePrecision
from bcoskit._layers import in_double_precision
from bcoskit.convert._config import BcosConfig
from bcoskit.convert._input import PairedInput, normalization, widen
from bcoskit.convert._modules import TOLERANCE, contents, is_bcos, is_skipped, restore
from bcoskit.convert._probe import Probe, probe
from bcoskit.convert._report import ConvertedModule
from bcoskit.nn import Normalize

_ROUNDING = 0.1  # relative; a larger difference is none of rounding


def with_pairs(
    root: nn.Module, config: BcosConfig, seen: Probe, notes: list[ConvertedModule], skip: tuple[str, ...]
) -> nn.Module:
    """The network with an input of pairs: by wider first layers, or behind a step if that does not work."""
    channels, dimensions = seen.example.shape[1], seen.example.ndim - 2
    normalize = normalization(config, channels, dimensions)
    readers = _readers(root, seen)
    inside = (f"{path}.{below}".strip(".") for path in readers for below, _ in root.get_submodule(path).named_modules())
    if readers and not any(is_skipped(path, skip) for path in inside):
        before = contents(root.modules())
        if _widened(root, readers, normalize, seen.example):
            notes += [
                ConvertedModule(path, "first layer", "changed", f"reads {2 * channels} channels, normalised")
                for path in readers
            ]
            return root
        restore(before)
    notes.append(ConvertedModule("", type(root).__name__, "changed", f"behind PairedInput, {2 * channels} channels"))
    around = PairedInput(root, normalize)
    around.training = normalize.training = root.training
    return around


def _widened(root: nn.Module, readers: list[str], normalize: Normalize, example: Tensor) -> bool:
    """Widen the layers that read the image; whether the network then gives for pairs what it gave for the image.

    It does not where more than these layers reads the image, or their code does more than to convolve it.
    """
    pair = paired(torch.rand(example.shape, generator=torch.Generator().manual_seed(1)).to(example))
    before = contents(root.modules())
    try:
        difference = _difference_of_widening(root, readers, normalize, pair)
        if TOLERANCE < difference < _ROUNDING:  # by rounding, which a deep network lets grow?
            restore(before)
            double = in_double_precision(root)
            with DoublePrecision():
                difference = _difference_of_widening(double, readers, normalize, pair.double())
            widen(root, readers, normalize)
    except Exception:  # whatever the code around the first layer says to more channels
        return False
    return difference <= TOLERANCE


def _difference_of_widening(root: nn.Module, readers: list[str], normalize: Normalize, pair: Tensor) -> float:
    """Widen, and compare all outputs, relative to the largest of each; 0 if they are not finite, and tell nothing.

    Infinite if there are none.

    With exponent 1 and raw filters: by others the pair has another cosine than the image. What a last layer of zeros
    makes of all images alike is compared by the outputs of the layers instead.
    """
    image, complement = normalize(pair).chunk(2, 1)
    image = (image - complement) / 2
    with _linear_layers(root):
        expected = probe(root, image)
        of_another = probe(root, -image).outputs
    widen(root, readers, normalize)
    with _linear_layers(root):
        found = probe(root, pair)
    if not expected.outputs:  # but an object that nobody looks into
        return math.inf
    pairs = list(zip_longest(found.outputs, expected.outputs))
    if all(map(torch.equal, expected.outputs, of_another)):
        pairs += [(found.inner[path], each) for path, each in expected.inner.items() if path in found.inner]
    return max(_difference(ours, theirs) for ours, theirs in pairs)


def _difference(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None or expected is None or found.shape != expected.shape:
        return math.inf
    if not found.numel() or not bool(expected.isfinite().all()):
        return 0.0
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - expected.double()).abs().max() / scale)


@contextmanager
def _linear_layers(root: nn.Module) -> Iterator[None]:
    """The B-cos layers compute linear transforms inside, and are as before afterwards."""
    layers: list[Any] = [module for module in root.modules() if is_bcos(module)]
    before = contents(layers)
    try:
        for layer in layers:
            layer._parameters.pop("b", None)
            layer.b, layer.normalize_weight = 1.0, False
        yield
    finally:
        restore(before)


def _readers(root: nn.Module, seen: Probe) -> list[str]:
    """The layers that read the image: those that were seen, and those that timm names, which may read a resized one.

    If none of them has weights, the modules that say of themselves how they read pairs.
    """
    if not any(root.get_submodule(path)._parameters for path in seen.readers):
        return [path for path, module in root.named_modules() if hasattr(module, "read_pairs")]
    named: Any = (getattr(root, "pretrained_cfg", None) or {}).get("first_conv") or ()
    known = dict(root.named_modules())
    paths = [path for path in ((named,) if isinstance(named, str) else named) if path in known]
    fitting = [path for path in paths if getattr(known[path], "in_channels", None) == seen.example.shape[1]]
    return list(dict.fromkeys((*seen.readers, *fitting)))


def paired(x: Tensor) -> Tensor:
    return torch.cat([x, 1 - x], 1)
