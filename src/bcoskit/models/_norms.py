"""The norms of the papers by their short names."""

from collections.abc import Callable

from torch import nn

from bcoskit.nn import AllNorm, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, PositionNorm

_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "an": AllNorm,
    "bn": BatchNorm,
    "gn": GroupNorm,
    "in": InstanceNorm,
    "ln": LayerNorm,
    "pn": PositionNorm,
}
# The letter u stands for uncentred, "linear" for a scale without bias, "unaffine" for neither.
_AFFINE = {"": (True, True), "-linear": (True, False), "-unaffine": (False, False)}

NORMS = ("none", *(f"{name}{u}{affine}" for u in ("", "u") for name in _CLASSES for affine in _AFFINE))


def norm_layer(name: str, channels: int, eps: float = 1e-5) -> nn.Module:
    """A norm by its short name (Böhle et al., TPAMI 2024, experiments on CIFAR-10).

    Args:
        name: One of `NORMS`.
        channels: Channels of the map.
        eps: Added to the variance.

    Returns:
        The norm; `"none"` is the identity.

    Raises:
        ValueError: If there is no norm of that name.
    """
    if name not in NORMS:
        raise ValueError(f"`norm` (={name!r}) must be one of {', '.join(NORMS)}")
    if name == "none":
        return nn.Identity()
    kind, dash, rest = name.partition("-")
    scale, bias = _AFFINE[dash + rest]
    return _CLASSES[kind[:2]](channels, centered=not kind.endswith("u"), scale=scale, bias=bias, eps=eps)
