"""Which networks may be explained without a look at each of their operations: those whose code is known."""

import torch.nn.modules.module as torch_module
from torch import nn

from bcoskit._checks import modules_of
from bcoskit.dynamic.rules import are_built_in
from bcoskit.nn import (
    AllNorm,
    BatchNorm,
    BcosConv1d,
    BcosConv2d,
    BcosConv3d,
    BcosLinear,
    ClassifierHead,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    LogitLayer,
    MeanOverTokens,
    Normalize,
    PositionNorm,
    TokenClassifierHead,
)

# Layers without a rule: linear, or linear once `freeze` has made its constants.
_LAYERS = frozenset(
    {
        *(AllNorm, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, PositionNorm),
        *(BcosConv1d, BcosConv2d, BcosConv3d, BcosLinear, ClassifierHead, LogitLayer, MeanOverTokens, Normalize),
        *(TokenClassifierHead, nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Conv2d, nn.Dropout, nn.Flatten, nn.Identity),
        *(nn.Linear, nn.MaxPool2d, nn.ReLU, nn.Sequential),
    }
)
# Packages whose containers do no more than call their layers, add, concatenate and reshape; what else they might do is
# no linear node of the graph, which the audit finds.
_CONTAINERS = ("bcoskit.models.", "timm.models.", "timm.layers.")
_LEAVES = ("DropPath", "PositionEmbedding")  # of these packages, which add a constant or nothing in evaluation
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def is_known(model: object) -> bool:
    """Whether all code of a network is known, none of its layers needs a rule, and nobody has put hooks on it."""
    if not are_built_in():  # a user's rule may be for an operation that needs none
        return False
    if not isinstance(model, nn.Module) or any(getattr(torch_module, f"_global{hooks}") for hooks in _HOOKS):
        return False
    return all(_is_known(module) for module in modules_of(model))


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    if any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in vars(module):
        return False
    if kind in _LAYERS:
        return True
    return kind.__module__.startswith(_CONTAINERS) and (bool(module._modules) or kind.__name__ in _LEAVES)
