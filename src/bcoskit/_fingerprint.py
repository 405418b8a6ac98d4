"""What tells networks apart: a digest of all their values."""

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module, *known: str) -> str:
    """SHA-256 of the names, types, shapes and values of all parameters and buffers, and of further texts.

    Args:
        model: The network, on any device.
        known: Texts that are to count as well.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for text in known:
        digest.update(text.encode())
    return digest.hexdigest()
