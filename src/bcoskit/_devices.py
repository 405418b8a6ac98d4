"""The device that a command computes on."""

import os
from itertools import chain

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of the first weight of a network; the CPU if it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def device_named(name: str | None) -> torch.device:
    """The device of that name; without one, CUDA where there is one, under torchrun the one of this process.

    Raises:
        ValueError: If it cannot be used.
    """
    if name is None:
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`device` (={name!r}) cannot be used: {error}") from error
    if device.type == "meta":
        raise ValueError(f"`device` (={name!r}) cannot be used: its tensors have no values")
    return device
