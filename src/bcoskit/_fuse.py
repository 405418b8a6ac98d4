"""`fuse`: a network for deployment, in which all that evaluation only multiplies with is part of the filters."""

import copy
import inspect
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from bcoskit._checks import check_evaluation_mode
from bcoskit.functional import unit_norm
from bcoskit.nn import (
    AllNorm,
    BatchNorm,
    BcosConv1d,
    BcosConv2d,
    BcosConv3d,
    BcosLinear,
    ClassifierHead,
    TokenClassifierHead,
)
from bcoskit.nn._base import BcosArguments

_Model = TypeVar("_Model", bound=nn.Module)
_CONVNEXT_BLOCK = "timm.models.convnext.ConvNeXtBlock"  # by name, since importing it takes a while


def fuse(model: _Model) -> _Model:
    """Fold what a network multiplies with into its filters: the same logits, the same W(x), fewer passes.

    The transform of `b` is homogeneous of degree `b` in its filters, so that a factor `s` of an output channel is the
    filter times `sign(s) |s|^(1/b)`. Folded are the unit norms of filters and rows, the layers' divisors, batch norms
    and norms over all that follow a convolution (of centred ones the rest becomes its bias), scales of residual
    branches, and the temperature of the logits. What stays: norms that stand before a convolution, which reads their
    output's norm; norms with statistics of the sample; norms behind MaxOut, which a negative factor would turn into a
    minimum, and behind exponents other than 1 and 2, whose epsilon is not homogeneous; and the normalisation of images,
    since the padding of the first convolution is zero behind it.

    Outputs of layers inside are others than before, where a norm behind them was folded.

    Args:
        model: A network in evaluation mode; it is not changed. Norms are found where `torch.fx` can trace the code
            around them. Code that reads the weight of a layer past the layer must be known from the conversion of the
            network, or the layer have a class of its own; and code that cannot be traced must not call a layer by
            itself that another module calls with a norm behind it.

    Returns:
        A fused copy, whose weights require no gradients. It is not meant to be trained. `save_model` stores that it is
        fused, so that `create_model` opens it as such.

    Raises:
        ValueError: If the network is in training mode, or has a learnable exponent.
    """
    check_evaluation_mode(model)
    fused = copy.deepcopy(model).requires_grad_(False)
    layers = {name: module for name, module in fused.named_modules() if isinstance(module, BcosArguments)}
    learnable = [name for name, layer in layers.items() if isinstance(layer.b, Tensor)]
    if learnable:
        raise ValueError(f"`model` has a learnable exponent in {learnable[0]!r}, which cannot be folded")
    with torch.no_grad():
        plain, in_one_place = _foldable_layers(fused), _in_one_place(fused)
        for layer in plain:
            _fold_unit_norm(layer)
        foldable = plain & in_one_place
        _fold_norms(fused, foldable, in_one_place)
        for module in fused.modules():
            _fold_known(module, foldable)
    setattr(fused, "fused", True)  # noqa: B010 - what `save_model` asks for
    return fused


def _foldable_layers(model: nn.Module) -> set[nn.Module]:
    """The layers whose weight holds filters as they are, output by output, and is used by the layer alone."""
    report: Any = getattr(model, "conversion", None)
    bypassed = [note.path for note in report.modules if note.outcome == "bypassed"] if report is not None else []
    return {
        layer
        for path, layer in model.named_modules()
        if _has_plain_filters(layer) and not any(f".{path}".endswith(f".{known}") for known in bypassed)
    }


def _has_plain_filters(layer: nn.Module) -> bool:
    if type(layer) in (BcosConv1d, BcosConv2d, BcosConv3d, BcosLinear):
        return True
    return isinstance(layer, BcosConv2d) and getattr(layer, "standardize", True) is False


def _in_one_place(model: nn.Module) -> set[nn.Module]:
    """The modules that are registered once, and are nothing but what they compute."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    return {
        module
        for module, count in places.items()
        if count == 1 and not module._forward_hooks and not module._forward_pre_hooks
    }


def _fold_unit_norm(layer: Any) -> None:
    if layer.normalize_weight:
        layer.weight = nn.Parameter(unit_norm(layer.weight.detach()), requires_grad=False)
        layer.normalize_weight = False
    if layer.scale != 1 and layer.b in (1, 2):
        bias = layer.bias  # which is added behind the division
        layer.bias = None
        _multiply(layer, layer.weight.new_full((len(layer.weight) // layer.max_out,), 1 / layer.scale))
        layer.bias, layer.scale = bias, 1.0


def _multiply(layer: Any, factor: Tensor) -> None:
    """Make the transform of a layer `factor` times as large, per output."""
    root = factor.sign() * factor.abs().pow(1 / layer.b)
    rows = root.repeat_interleave(layer.max_out).reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight = nn.Parameter(layer.weight * rows.to(layer.weight.dtype), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias * factor, requires_grad=False)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's layers and ours."""
        inner = isinstance(m, nn.Sequential)
        return not inner and type(m).__module__.startswith(("torch.nn.", "bcoskit.nn."))


def _fold_norms(module: nn.Module, foldable: set[nn.Module], in_one_place: set[nn.Module]) -> None:
    """Fold the norms that follow a convolution which nothing else reads; in parts where code cannot be traced."""
    if not any(isinstance(part, (AllNorm, BatchNorm)) for part in module.modules()):
        return
    try:
        graph = None if _has_options(module) else _Tracer().trace(module)
    except Exception:  # control flow on values, in any of the ways in which code can have it
        graph = None
    if graph is None:
        for child in module.children():
            _fold_norms(child, foldable, in_one_place)
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses = Counter(str(node.target) for node in calls)
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        path, layer_path = str(node.target), str(before.target)
        if uses[path] == uses[layer_path] == 1:
            norm, layer = module.get_submodule(path), module.get_submodule(layer_path)
            if layer in foldable and norm in in_one_place and _fits(layer, norm):
                _fold_norm(layer, norm)
                module.set_submodule(path, nn.Identity().eval())


def _has_options(module: nn.Module) -> bool:
    """Whether a call may leave out arguments, with which code is traced as if all of them were given."""
    return any(each.default is not each.empty for each in inspect.signature(module.forward).parameters.values())


def _fits(layer: Any, norm: Any) -> bool:
    running = isinstance(norm, (AllNorm, BatchNorm)) and norm.running_var is not None
    return running and layer.max_out == 1 and layer.b in (1, 2)


def _fold_norm(layer: Any, norm: Any) -> None:
    factor = torch.rsqrt(norm.running_var + norm.eps)
    factor = factor if norm.weight is None else factor * norm.weight
    constant = torch.zeros_like(factor) if norm.bias is None else norm.bias
    if norm.centered:
        constant = constant - norm.running_mean * factor
    outputs = len(layer.weight)
    _multiply(layer, factor.expand(outputs))
    if norm.centered or norm.bias is not None:
        bias = constant.expand(outputs)
        layer.bias = nn.Parameter((bias if layer.bias is None else layer.bias + bias).clone(), requires_grad=False)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _fold_known(module: Any, foldable: set[nn.Module]) -> None:
    """Fold the factors that a module of known code applies behind a layer."""
    if _name(module) == _CONVNEXT_BLOCK and module.gamma is not None:
        last: Any = module.mlp.fc2
        if last in foldable and last.max_out == 1 and last.b in (1, 2):
            _multiply(last, module.gamma)
            module.gamma = None
    elif isinstance(module, (ClassifierHead, TokenClassifierHead)):
        layer: Any = module.conv if isinstance(module, ClassifierHead) else module.linear
        if module.logits.temperature is not None and layer in foldable and layer.b in (1, 2):
            factor = 1 / module.logits.temperature
            _multiply(layer, layer.weight.new_full((len(layer.weight) // layer.max_out,), factor))
            module.logits.temperature = None
