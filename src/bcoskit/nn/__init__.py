"""The layers of B-cos networks, as subclasses of torch's own."""

from bcoskit.nn._activation import GELU, Gate, Hardswish, Mish, SigmoidGate, SiLU
from bcoskit.nn._attention import Attention
from bcoskit.nn._conv import BcosConv1d, BcosConv2d, BcosConv3d
from bcoskit.nn._conv_transpose import BcosConvTranspose1d, BcosConvTranspose2d, BcosConvTranspose3d
from bcoskit.nn._head import ClassifierHead, LogitLayer, MeanOverTokens, TokenClassifierHead
from bcoskit.nn._linear import BcosLinear
from bcoskit.nn._norm import AllNorm, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, PositionNorm
from bcoskit.nn._normalize import Normalize

__all__ = [
    "GELU",
    "AllNorm",
    "Attention",
    "BatchNorm",
    "BcosConv1d",
    "BcosConv2d",
    "BcosConv3d",
    "BcosConvTranspose1d",
    "BcosConvTranspose2d",
    "BcosConvTranspose3d",
    "BcosLinear",
    "ClassifierHead",
    "Gate",
    "GroupNorm",
    "Hardswish",
    "InstanceNorm",
    "LayerNorm",
    "LogitLayer",
    "MeanOverTokens",
    "Mish",
    "Normalize",
    "PositionNorm",
    "SiLU",
    "SigmoidGate",
    "TokenClassifierHead",
]
