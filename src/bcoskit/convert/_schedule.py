"""The exponent of a network that is being converted gradually."""

from torch import Tensor, nn

from bcoskit.nn._base import BcosArguments


def set_b(model: nn.Module, b: float) -> nn.Module:
    """Set the exponent of all B-cos layers of a network, for instance step by step while it is fine-tuned.

    Layers with a learnable exponent get the value; it goes on being trained.

    Args:
        model: The network; it is changed.
        b: Exponent of at least 1.

    Returns:
        The network.

    Raises:
        ValueError: If `b` is out of its range, or the network has no B-cos layer.
    """
    if not 1 <= b < float("inf"):
        raise ValueError(f"`b` (={b}) must be a finite exponent of at least 1")
    layers = [module for module in model.modules() if isinstance(module, BcosArguments)]
    if not layers:
        raise ValueError("`model` has no B-cos layer whose exponent could be set")
    for layer in layers:
        if isinstance(layer.b, Tensor):
            layer.b.data.fill_(b)
        else:
            layer.b = float(b)
    return model
