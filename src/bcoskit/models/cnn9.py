"""The plain network of nine convolutions for CIFAR-10, which no library has (Böhle et al., CVPR 2022)."""

from collections.abc import Sequence

from torch import Tensor, nn

from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename

_CHANNELS_AND_STRIDES = ((64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1))


class Cnn9(Network):
    """Eight 3×3 convolutions and a 1×1 convolution that classifies every position, then the mean.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the encoded image.
        layers: The layers.
    """

    classifier_path = "head"

    def __init__(self, num_classes: int, in_channels: int, *, layers: LayerSet) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.feature_info = []
        before, reduction = in_channels, 1
        for index, (channels, stride) in enumerate(_CHANNELS_AND_STRIDES):
            self.layers.append(layers.conv(before, channels, 3, stride, 1))
            before, reduction = channels, reduction * stride
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layers.{index}"})
        self.num_features = before
        self.head = layers.head(before, num_classes)
        self.num_classes, self.in_chans = num_classes, in_channels

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to the last map, (N, 256, H / 4, W / 4)."""
        return self.layers(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits (N, num_classes), or itself, which is what is classified."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors'."""
        return ((r"^layers\.", ""), (r"^head\.conv", str(len(_CHANNELS_AND_STRIDES))))
