"""What attribution methods share: targets, networks for hooks, gradients of several targets."""

import copy
import functools
import itertools
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeAlias, cast

import torch
from torch import Tensor, nn

from bcoskit._checks import check_inputs
from bcoskit._layers import uncompiled
from bcoskit._probabilities import check_classes

Method: TypeAlias = Callable[..., Tensor]
"""From a network, inputs (N, C, H, W) and classes (N,) to contributions (N, H, W).

Those of `METHODS` also take several classes per sample, (N, K), to (N, K, H, W).
"""

_Parameters = ParamSpec("_Parameters")


def checked(model: nn.Module, x: Tensor, target: Any) -> Tensor:
    """Classes of all samples, (N,) or (N, K)."""
    check_inputs(model, x)
    if x.ndim != 4:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, must be images (N, C, H, W)")
    classes = torch.as_tensor(target, device=x.device)
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool or classes.ndim > 2:
        raise TypeError(f"`target` (={target!r}) must be class indices, one or several per sample")
    if classes.numel() == 0 or (classes.ndim and len(classes) not in (1, len(x))):
        raise ValueError(f"`target` has {len(classes)} rows for {len(x)} samples")
    if int(classes.min()) < 0:
        raise ValueError(f"`target` (={int(classes.min())}) must not be negative")
    return classes.long().expand(len(x), *classes.shape[1:])


def for_any_target(function: Callable[_Parameters, Tensor]) -> Callable[_Parameters, Tensor]:
    """A method for classes (N, K), for one class per sample as well."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Tensor:
        given: Any = args
        model, x, target = given
        classes = checked(model, x, target)
        if classes.ndim == 2:
            return cast("Any", function)(model, x, classes, **kwargs)
        return cast("Any", function)(model, x, classes[:, None], **kwargs).squeeze(1)

    return call


def each_target(function: Any, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for classes in target.unbind(1):
        found = function(model, x.detach().clone().requires_grad_(), classes)
        if not isinstance(found, Tensor):
            raise TypeError(f"`method` must return a tensor, not {type(found).__name__}")
        found = found.detach()
        columns.append(found.sum(1) if found.ndim == 4 else found)
    return torch.stack(columns, 1)


class Chosen(nn.Module):
    """A network whose outputs are the logits of some targets: (M, C, H, W) to (M, K), M a multiple of N."""

    def __init__(self, model: Callable[..., Any], target: Tensor) -> None:
        super().__init__()
        self.model = model
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        check_classes(self.target.flatten().tolist(), logits)
        return logits.gather(1, self.target.repeat(len(logits) // len(self.target), 1))


def all_targets(forward: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of all targets by one forward pass, (K, N, C, H, W)."""
    with torch.enable_grad():
        outputs = forward() if not isinstance(forward, nn.Module) else forward(*inputs)
        columns = outputs.sum(0)
        rows = [
            torch.autograd.grad(column, inputs, retain_graph=index + 1 < len(columns))
            for index, column in enumerate(columns)
        ]
    return tuple(torch.stack(found) for found in zip(*rows, strict=True))


def copied(model: nn.Module) -> nn.Module:
    """A network that shares all tensors, for hooks; its activations write to no input, which hooks forbid."""
    original: Any = uncompiled(model)
    tensors = itertools.chain(original.parameters(), original.buffers())
    twin = copy.deepcopy(original, {id(tensor): tensor for tensor in tensors})
    for module in twin.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return twin


def calls_of(model: nn.Module, modules: Collection[nn.Module], x: Tensor) -> tuple[list[nn.Module], Any]:
    """The calls of some modules in the order in which a forward pass makes them, and its output."""
    calls: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any) -> None:
        calls.append(module)

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def captum_attr() -> Any:
    try:
        import captum.attr
    except ModuleNotFoundError as error:
        raise ImportError(f"this method needs {error.name}: pip install 'bcoskit[eval]'") from error
    return captum.attr
