"""Run a network from one named layer to another, without touching it; copy one."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit._checks import modules_of
from bcoskit.dynamic._mode import tensors_in

# The child that is the original network in what `torch.compile` returns; its class takes a second to import.
_ORIGINAL = "_orig_mod"


def run_between(
    model: Callable[..., Any],
    x: Tensor,
    enter: Callable[[Tensor], Tensor],
    from_layer: str | None,
    to_layer: str | None,
) -> tuple[Tensor, Tensor]:
    """Run the network on `x`, with `enter(input)` in the place of the input of the explanation.

    The network is run as a copy that shares everything but the named layers, which report their outputs: other
    threads may use the network meanwhile.

    Args:
        model: The network.
        x: Its input.
        enter: Makes the tensor from which the explanation starts.
        from_layer: The layer whose output is the input of the explanation; None for the network's own input.
        to_layer: The layer whose output is explained; None for the network's own output.

    Returns:
        The tensor that `enter` made, and the output that is explained.

    Raises:
        ValueError: If there is no such layer, or it does not run exactly once.
        TypeError: If a layer's output, or the network's, is not one tensor.
    """
    if from_layer is None and to_layer is None:
        start = enter(x)
        return start, _tensor(model(start.clone()), "the network")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`from_layer` and `to_layer` need a torch.nn.Module, got {type(model).__name__}")
    starts: list[Tensor] = []
    ends: list[Tensor] = []

    def start_here(output: Any) -> Tensor:
        starts.append(enter(_tensor(output, f"`from_layer` (={from_layer!r})")))
        return starts[-1].clone()

    def end_here(output: Any) -> Tensor:
        # The network goes on with a copy, since it may write to it.
        ends.append(_tensor(output, f"`to_layer` (={to_layer!r})"))
        return ends[-1].clone()

    if to_layer is not None:
        model = _with_report(model, to_layer, "to_layer", end_here)
    if from_layer is not None:
        model = _with_report(model, from_layer, "from_layer", start_here)
        final = model(x.clone())
    else:
        starts.append(enter(x))
        final = model(starts[0].clone())
    for name, layer, outputs in (("from_layer", from_layer, starts), ("to_layer", to_layer, ends)):
        if layer is not None:
            _require_one(name, layer, outputs)
    return starts[0], ends[0] if to_layer is not None else _tensor(final, "the network")


def outputs_of(model: nn.Module, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Run the network once, and collect the outputs of named layers.

    Args:
        model: The network; it is not touched, other threads may use it meanwhile.
        x: Its input.
        layers: Paths of the layers.

    Returns:
        From each path to that layer's output.

    Raises:
        ValueError: If there is no such layer, or it does not run exactly once.
        TypeError: If a layer's output is not one tensor.
    """
    outputs: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def collector(layer: str) -> Callable[[Any], Tensor]:
        def collect(output: Any) -> Tensor:
            outputs[layer].append(_tensor(output, f"`layers` (={layer!r})"))
            return outputs[layer][-1].clone()  # the network may write to it

        return collect

    for layer in layers:
        model = _with_report(model, layer, "layers", collector(layer))
    model(x)
    for layer, found in outputs.items():
        _require_one("layers", layer, found)
    return {layer: found[0] for layer, found in outputs.items()}


def in_double_precision(model: nn.Module) -> nn.Module:
    """A deep copy in float64, with the plain tensors that modules keep beside parameters and buffers.

    What they have computed of their weights, and keep with its graph, torch would not copy: it stays true, and loses
    its graph.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    plain = {id(tensor): tensor for module in modules_of(model) for tensor in tensors_in(vars(module))}
    copies = {
        key: tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for key, tensor in plain.items()
        if key not in own
    }
    return copy.deepcopy(model, copies).double()


def uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """The network or function that was compiled, since a compiled one has a backward pass of its own.

    Compiled layers are undone in a copy of the network, which shares everything else with it.
    """
    if not isinstance(model, nn.Module):
        return getattr(model, "_torchdynamo_orig_callable", model)
    compiled = any(module._compiled_call_impl or _ORIGINAL in module._modules for module in model.modules())
    return _uncompiled_copy(model, {}) if compiled else model


def _uncompiled_copy(module: nn.Module, copies: dict[nn.Module, nn.Module]) -> nn.Module:
    inner = module._modules.get(_ORIGINAL)
    original = module if inner is None else inner
    if original not in copies:  # a module may be used in several places
        copy = copies[original] = _shallow_copy(original)
        copy._compiled_call_impl = None
        for name, child in original._modules.items():
            copy._modules[name] = None if child is None else _uncompiled_copy(child, copies)
    return copies[original]


def logits_of(output: Any) -> Any:
    """The logits of an output that has them as an attribute, as those of Hugging Face do; others as they are."""
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def _tensor(value: Any, what: str) -> Tensor:
    value = logits_of(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"the output of {what} is {type(value).__name__}, an explanation needs one tensor")
    return value


def _require_one(argument: str, layer: str, outputs: Sequence[Tensor]) -> None:
    if len(outputs) != 1:
        raise ValueError(f"`{argument}` (={layer!r}) runs {len(outputs)} times in a forward pass, it must run once")


def _with_report(root: nn.Module, path: str, argument: str, report: Callable[[Any], Tensor]) -> nn.Module:
    """A copy of the network in which the layer at the path hands its output to `report`, and may get another back."""
    if not isinstance(path, str):
        raise TypeError(f"`{argument}` (={path!r}) must be the path of a layer, such as {_some_path(root)!r}")
    names = path.split(".") if path else []
    copy = module = _shallow_copy(root)
    for name in names:
        child = module._modules.get(name)
        if child is None:
            known = ", ".join(name for name, _ in root.named_modules() if name)
            raise ValueError(f"`{argument}` (={path!r}) is no layer of the network; there are: {_shortened(known)}")
        module._modules[name] = _shallow_copy(child)
        module = module._modules[name]
        assert module is not None
    module._forward_hooks = OrderedDict(module._forward_hooks)
    module.register_forward_hook(lambda _module, _inputs, output: report(output))
    return copy


def _some_path(root: nn.Module) -> str:
    return next((name for name, _ in root.named_modules() if name), "")


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A module that shares parameters, buffers and children, but not its tables of children and hooks."""
    copy = object.__new__(type(module))
    copy.__dict__ = module.__dict__.copy()
    copy._modules = module._modules.copy()
    return copy


def _shortened(text: str, length: int = 300) -> str:
    return text if len(text) <= length else text[:length].rsplit(",", 1)[0] + ", …"
