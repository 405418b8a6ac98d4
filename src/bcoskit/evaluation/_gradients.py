"""Attribution by `W(x)`, by gradients, and by what captum makes of them."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcoskit._explain import explain
from bcoskit.evaluation._method import Chosen, all_targets, calls_of, captum_attr, copied, each_target, for_any_target
from bcoskit.nn import ClassifierHead

_WITHOUT_MAPS = "`method` (='grad_cam', or 'guided_grad_cam', which calls it) needs a layer with maps (N, C, H, W)"


@for_any_target
def bcos(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """`W(x)·x` summed over the channels: `bcoskit.explain`, one forward pass for all targets."""
    return explain(model, x, target).contributions


@for_any_target
def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The gradient, signed, summed over the channels (captum's `Saliency` with `abs=False`)."""
    return _gradients(model, x, target).sum(2)


@for_any_target
def input_x_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Input times gradient, summed over the channels (captum's `InputXGradient`)."""
    return (_gradients(model, x, target) * x.unsqueeze(1)).sum(2)


def _gradients(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with torch.enable_grad():
        start = x.detach().clone().requires_grad_()
        return all_targets(Chosen(model, target), (start,))[0].movedim(0, 1)


@for_any_target
def integrated_gradients(
    model: nn.Module, x: Tensor, target: Tensor, *, steps: int = 50, batch_size: int = 8
) -> Tensor:
    """Integrated Gradients from zeros (Sundararajan et al., ICML 2017) by captum, one forward pass for all targets.

    Of a network with `f(a·x) = a·f(x)` for a > 0, as B-cos networks without biases but that of the logits are (up to
    what keeps norms from 0), this is Input x Gradient, with any number of steps.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        steps: Points of the Gauss-Legendre quadrature.
        batch_size: Points that are computed at once, times N.
    """
    attr = captum_attr()
    engine = attr.IntegratedGradients(Chosen(model, target), multiply_by_inputs=False)
    engine.gradient_func = _of_all_targets
    start = x.detach().clone().requires_grad_()
    found = engine.attribute(start, n_steps=steps, internal_batch_size=batch_size * len(x))
    return (found * x.unsqueeze(1)).sum(2)


def _of_all_targets(forward_fn: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor, ...]:
    """In the place of captum's gradients of one target: (N, K, C, H, W)."""
    return tuple(found.movedim(0, 1) for found in all_targets(forward_fn, inputs))


@for_any_target
def deep_lift(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """DeepLIFT from zeros (Shrikumar et al., ICML 2017) by captum: differences pass activations by the rescale rule.

    Raises:
        ValueError: If the network has a ReLU that is no `nn.ReLU`, which it could not see.
    """

    def one(twin: nn.Module, start: Tensor, classes: Tensor) -> Tensor:
        return captum_attr().DeepLift(Chosen(twin, classes[:, None])).attribute(start, target=0)

    with _for_hooks(model, x) as twin:
        return each_target(one, twin, x, target)


@for_any_target
def guided_backprop(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Guided Backpropagation (Springenberg et al., 2015) by captum: gradients pass a ReLU if they are positive.

    One forward pass for all targets. Of activations that are neither ReLU nor ReLU6 it knows nothing: there, as in
    B-cos networks, it is the gradient.

    Raises:
        ValueError: If the network has a ReLU that is no `nn.ReLU`, which it could not see.
    """
    with _for_hooks(model, x) as twin:
        engine = captum_attr().GuidedBackprop(Chosen(twin, target))
        engine.gradient_func = _of_all_targets
        return engine.attribute(x.detach().clone().requires_grad_()).sum(2)


@contextmanager
def _for_hooks(model: nn.Module, x: Tensor) -> Iterator[nn.Module]:
    """A copy of the network on which captum can set its hooks."""
    twin = copied(model)
    _split_relu6(twin)
    _check_activations(twin, x[:1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"captum\.")  # that it sets hooks, which it does on our copy
        yield twin


def _split_relu6(model: nn.Module) -> None:
    """A ReLU and a bound in the place of each ReLU6, which captum does not know."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.ReLU6:
                setattr(module, name, nn.Sequential(nn.ReLU(), nn.Hardtanh(-1.0, 6.0)))


def _check_activations(model: nn.Module, x: Tensor) -> None:
    """Refuse a ReLU that is no module, on which captum's hooks cannot be set: the method would be the plain gradient.

    Raises:
        ValueError: If there is one.
    """
    with torch.enable_grad():
        activations = [module for module in model.modules() if isinstance(module, nn.ReLU)]
        calls, output = calls_of(model, activations, x.detach().clone().requires_grad_())
    seen: set[Any] = set()
    left = [output.grad_fn] if isinstance(output, Tensor) else []
    relus = 0
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        relus += node.name().startswith("ReluBackward")
        left += [following for following, _ in node.next_functions]
    hidden = relus - len(calls)
    if hidden > 0:
        raise ValueError(
            f"`method` needs each ReLU to be a module (`nn.ReLU`), {hidden} of {relus} in the network are not"
        )


@for_any_target
def grad_cam(model: nn.Module, x: Tensor, target: Tensor, *, layer: str | None = None) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017), brought to the size of the input by nearest neighbours.

    `relu(Σ_c A_c · mean(∂logit/∂A_c))` over the channels c of the maps A, one forward pass for all targets.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        layer: Path of the layer whose maps are weighted; by default the last one that has maps.

    Raises:
        ValueError: If the network has no such layer.
    """
    twin = copied(model)
    path = last_map(twin, x[:1]) if layer is None else layer
    # Captum's takes a forward pass for each target.
    maps, logits = _maps_and_logits(Chosen(twin, target), path, x)
    (gradients,) = all_targets(lambda: logits, (maps,))
    found = F.relu((gradients.mean((3, 4), keepdim=True) * maps.detach()).sum(2)).movedim(0, 1)
    return F.interpolate(found, x.shape[-2:], mode="nearest")


def _maps_and_logits(chosen: Chosen, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer of the network returns in a forward pass, and the logits."""
    try:
        layer = chosen.get_submodule(f"model.{path}")
    except AttributeError as error:
        raise ValueError(f"`layer` (={path!r}) is no layer of the network") from error
    returned: list[Any] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        returned.append(output)
        # What follows may write to what it gets.
        return output.clone() if isinstance(output, Tensor) else output

    handle = layer.register_forward_hook(note)
    try:
        with torch.enable_grad():
            logits = chosen(x.detach().clone().requires_grad_())
    finally:
        handle.remove()
    maps = returned[-1] if returned else None
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        shown = "nothing" if not returned else tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"`layer` (={path!r}) returns no maps, but {shown}: Grad-CAM needs (N, C, H, W)")
    return maps, logits


@for_any_target
def guided_grad_cam(model: nn.Module, x: Tensor, target: Tensor, *, layer: str | None = None) -> Tensor:
    """Guided Grad-CAM (Selvaraju et al., ICCV 2017): Guided Backpropagation times Grad-CAM.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        layer: As for `grad_cam`.

    Raises:
        ValueError: If one of the two does not fit the network.
    """
    return grad_cam(model, x, target, layer=layer) * guided_backprop(model, x, target)


def last_map(model: nn.Module, x: Tensor) -> str:
    """Path of the last layer whose output is maps: of a network by name its last stage.

    Raises:
        ValueError: If what comes before the classifier is no map (N, C, H, W), as in transformers.
    """
    found: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def note(path: str, module: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3 and math.prod(output.shape[2:]) > 1:
            found.append((path, module, tuple(output.shape)))

    handles = [
        module.register_forward_hook(lambda module, _inputs, output, path=path: note(path, module, output))
        for path, module in model.named_modules()
        if path
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    stages = getattr(model, "stage_names", ())
    heads = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, ClassifierHead))
    named = [each for each in found if each[0] in stages[-1:]]
    before = [each for each in found if not f"{each[0]}.".startswith(heads)] if heads else found
    if not named and not before:
        raise ValueError(f"{_WITHOUT_MAPS}: no layer returns maps")
    path, module, shape = (named or before)[-1]
    # Layers that work on the last axis have the channels there.
    channels_last = isinstance(module, (nn.Linear, nn.LayerNorm)) and "2d" not in type(module).__name__
    if len(shape) != 4 or channels_last:
        raise ValueError(f"{_WITHOUT_MAPS} before the classifier, but {path!r} returns {shape}")
    return path
