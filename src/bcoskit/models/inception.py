"""Inception-v3: timm's, with the layers of a set, average instead of maximum pooling, and its auxiliary classifier."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from timm.layers.conv_bn_act import ConvNormAct
from timm.models.inception_v3 import InceptionB, InceptionD
from timm.models.inception_v3 import InceptionV3 as OrdinaryInceptionV3
from torch import Tensor, nn

from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename
from bcoskit.models._substitution import rules_of, substitute

_SMALLEST_MAP = 17  # of which the auxiliary classifier's average and 5×5 convolution leave one position

_truncated = partial(nn.init.trunc_normal_, std=0.1, a=-0.2, b=0.2)


class InceptionOutputs(NamedTuple):
    """What an Inception network returns in training: its logits, and those of its auxiliary classifier."""

    logits: Tensor
    aux_logits: Tensor


class _ReductionB(InceptionB):
    """The reduction to 17×17 positions, with an average in the place of the maximum."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *convolved, _maximum = super()._forward(x)
        return [*convolved, F.avg_pool2d(x, 3, 2)]


class _ReductionD(InceptionD):
    """The reduction to 8×8 positions, with an average in the place of the maximum."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *convolved, _maximum = super()._forward(x)
        return [*convolved, F.avg_pool2d(x, 3, 2)]


class InceptionV3(Network, OrdinaryInceptionV3):
    """`timm.models.inception_v3.InceptionV3` with the layers of a set, and classified before it is averaged.

    In training, `forward` returns `InceptionOutputs`: the loss of the auxiliary logits, which have neither
    temperature nor constant, is added to that of the logits (Böhle et al., CVPR 2022, appendix on training).

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the encoded image.
        layers: The layers.
    """

    initialize_filter = staticmethod(_truncated)
    classifier_path = "fc"
    optional_path = "AuxLogits"

    def __init__(self, num_classes: int, in_channels: int, *, layers: LayerSet) -> None:
        super().__init__(num_classes=0, in_chans=in_channels, global_pool="")
        unit: Any = partial(ConvNormAct, padding=0)
        self.Mixed_6a, self.Mixed_7a = _ReductionB(288, unit), _ReductionD(768, unit)
        substitute(self, rules_of(layers))
        self.fc = layers.head(2048, num_classes)
        self.AuxLogits = nn.Sequential(
            OrderedDict(
                pool=nn.AvgPool2d(5, 3),
                conv0=nn.Sequential(OrderedDict(conv=layers.conv(768, 128, 1))),
                conv1=nn.Sequential(OrderedDict(conv=layers.conv(128, 768, 5))),
                fc=layers.head(768, num_classes, logits=False),
            )
        )
        self.num_classes = num_classes
        self.reset_parameters()

    def forward(self, x: Tensor) -> Any:
        """(N, in_channels, H, W) to logits (N, num_classes), in training to `InceptionOutputs`.

        Raises:
            ValueError: In training, if the images are too small for the auxiliary classifier.
        """
        if not self.training:
            return self.forward_head(self.forward_features(x))
        maps = self.forward_preaux(x)
        if min(maps.shape[-2:]) < _SMALLEST_MAP:
            height, width = x.shape[-2:]
            raise ValueError(f"`x` of {height}x{width} pixels is too small to train on: 299 are needed")
        return InceptionOutputs(self.forward_head(self.forward_postaux(maps)), self.AuxLogits(maps))

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors'."""
        return ((r"(^|\.)fc\.conv", r"\1fc"),)
