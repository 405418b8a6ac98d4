"""What an explanation refuses, and what it leaves untouched."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def check_inputs(model: Callable[..., Any], x: Tensor, *, indices: bool = False) -> None:
    """Refuse a network or inputs of which an explanation would be wrong; raises as `explain`.

    Args:
        model: The network.
        x: Its input.
        indices: Whether it may hold integers, since the explanation starts behind an embedding.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("explanations need gradients: call `explain` outside `torch.inference_mode()`")
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be a torch.Tensor, got {type(x).__name__}")
    if x.is_inference():
        raise RuntimeError("`x` was made in `torch.inference_mode()` and can have no gradient: give `x.clone()`")
    if not x.is_floating_point() and (not indices or x.is_complex()):
        raise TypeError(
            f"`x` has dtype {x.dtype}, explanations need float32 or float64: encode the images first, explain tokens "
            "from the layer that embeds them (`from_layer`)"
        )
    if x.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"`x` has dtype {x.dtype}, in which W(x) is too coarse to be exact: use `x.float()` and `model.float()`"
        )
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, must be a batch (N, *shape) of at least one sample")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("`x` holds values that are not finite")
    if isinstance(model, nn.Module):
        check_evaluation_mode(model)
    elif not callable(model):
        raise TypeError(f"`model` must be a torch.nn.Module or a function, got {type(model).__name__}")


def check_evaluation_mode(model: nn.Module, name: str = "model") -> None:
    """Refuse the network of the argument `name` of which a part is in training mode; raises as `explain`."""
    if any(module.training for module in modules_of(model)):
        training = next(path for path, module in model.named_modules() if module.training)
        where = f"its module {training!r} is" if training else "it is"
        raise ValueError(f"`{name}` must be in evaluation mode, {where} in training mode: call `{name}.eval()` first")


def check_initialized(path: str, module: nn.Module) -> None:
    """Refuse a lazy module that has seen no input yet."""
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in module._parameters.values()):
        raise ValueError(f"the lazy module {path!r} has no weights yet: run the network once first")


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """As `model.modules()` in another order, several times faster, since small networks notice it."""
    seen = {model}
    stack = [model]
    while stack:
        module = stack.pop()
        yield module
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def check_channel_dim(channel_dim: int | None, start: Tensor) -> None:
    """Refuse an axis that the input of an explanation does not have; raises as `explain`."""
    axes = start.ndim - 1
    if channel_dim is None:
        return
    if not isinstance(channel_dim, int) or (axes > 1 and (channel_dim == 0 or not -axes <= channel_dim <= axes)):
        raise ValueError(
            f"`channel_dim` (={channel_dim!r}) must be an axis after the first of an input of shape "
            f"{tuple(start.shape)}, or None"
        )


def check_output(output: Tensor, samples: int) -> None:
    """Refuse an output that cannot be explained; raises as `explain`."""
    if not output.is_floating_point() or output.ndim < 1 or len(output) != samples:
        raise TypeError(
            f"the output has dtype {output.dtype} and shape {tuple(output.shape)}, must be floating point with "
            f"{samples} samples first"
        )
    if output.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"the output has dtype {output.dtype}, in which W(x) is not exact: let the network run in float32"
        )
    if not output.requires_grad:
        raise ValueError(
            "the output has no gradient path to the input: does the network detach, run in no_grad, or end in a "
            "softmax or sigmoid, which are constants of an explanation? Explain the logits; `bcoskit.audit` names "
            "where the path ends"
        )
    if not bool(torch.isfinite(output).all()):
        raise ValueError("the output holds values that are not finite")


@contextmanager
def untouched(device: torch.device) -> Iterator[None]:
    """Gradients on and autocast off inside; random state afterwards as before."""
    # Torch has one state for all threads: numbers that others draw meanwhile are drawn once more after this.
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if not torch.equal(torch.get_rng_state(), states[0]):
            torch.set_rng_state(states[0])
        if states[1] is not None and not torch.equal(torch.cuda.get_rng_state(device), states[1]):
            torch.cuda.set_rng_state(states[1], device)
