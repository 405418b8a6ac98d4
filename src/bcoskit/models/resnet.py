"""ResNet, ResNeXt and wide ResNet: timm's, with the layers of a set."""

from collections.abc import Sequence

from timm.models import resnet
from torch import nn

from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename, by_fan_out
from bcoskit.models._substitution import rules_of, substitute

# Layers per stage, groups and width per group of the inner convolutions; blocks of two or of three convolutions.
ARCHITECTURES: dict[str, tuple[tuple[int, ...], int, int, type[nn.Module]]] = {
    "resnet18": ((2, 2, 2, 2), 1, 64, resnet.BasicBlock),
    "resnet34": ((3, 4, 6, 3), 1, 64, resnet.BasicBlock),
    "resnet50": ((3, 4, 6, 3), 1, 64, resnet.Bottleneck),
    "resnet101": ((3, 4, 23, 3), 1, 64, resnet.Bottleneck),
    "resnet152": ((3, 8, 36, 3), 1, 64, resnet.Bottleneck),
    "resnext50_32x4d": ((3, 4, 6, 3), 32, 4, resnet.Bottleneck),
    "resnext101_32x8d": ((3, 4, 23, 3), 32, 8, resnet.Bottleneck),
    "wide_resnet50_2": ((3, 4, 6, 3), 1, 128, resnet.Bottleneck),
    "wide_resnet101_2": ((3, 4, 23, 3), 1, 128, resnet.Bottleneck),
}


class ResNet(Network, resnet.ResNet):
    """`timm.models.resnet.ResNet` with the layers of a set, and classified before it is averaged.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the encoded image.
        architecture: A key of `ARCHITECTURES`.
        layers: The layers.
        drop_path_rate: Stochastic depth of the last block, in training.
    """

    initialize_filter = staticmethod(by_fan_out)
    classifier_path = "fc"

    def __init__(
        self, num_classes: int, in_channels: int, *, architecture: str, layers: LayerSet, drop_path_rate: float = 0.0
    ) -> None:
        depths, groups, width, block = ARCHITECTURES[architecture]
        super().__init__(
            block,  # pyright: ignore[reportArgumentType] - timm means the class
            depths,
            num_classes=0,
            in_chans=in_channels,
            global_pool="",
            cardinality=groups,
            base_width=width,
            drop_path_rate=drop_path_rate,
            zero_init_last=False,
        )
        substitute(self, rules_of(layers))
        self.conv1 = layers.normalized(self.conv1, in_channels)
        self.fc = layers.head(int(self.num_features), num_classes)
        self.num_classes = num_classes
        self.reset_parameters()

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors'."""
        return ((r"^(conv1|fc)\.conv", r"\1"),)
