"""The plain network of nine convolutions for CIFAR-10, which no library has (Böhle et al., CVPR 2022)."""

from collections.abc import Sequence

from torch import Tensor, nn

from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename

# In multiples of the width.
_CHANNELS_AND_STRIDES = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1), (4, 2), (4, 1), (4, 1))


class Cnn9(Network):
    """Eight 3×3 convolutions and a 1×1 convolution that classifies every position, then the mean.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the encoded image, or of the normalised one.
        layers: The layers, with a norm and a ReLU behind every convolution but the last if the set has them; None
            for ordinary ones: convolution, batch norm, ReLU, and a linear classifier.
        width: Channels of the first convolutions; the next have two and four times as many.
    """

    classifier_path = "head"

    def __init__(self, num_classes: int, in_channels: int, *, layers: LayerSet | None, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.feature_info = []
        before, reduction = in_channels, 1
        for multiple, stride in _CHANNELS_AND_STRIDES:
            channels = multiple * width
            for module in _block(before, channels, stride, layers):
                self.layers.append(module)
            before, reduction = channels, reduction * stride
            module = f"layers.{len(self.layers) - 1}"
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": module})
        self.num_features = before
        self.head = _ordinary_head(before, num_classes) if layers is None else layers.head(before, num_classes)
        self.num_classes, self.in_chans = num_classes, in_channels

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to the last map, (N, 4 · width, H / 4, W / 4)."""
        return self.layers(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits (N, num_classes), or itself, which is what is classified."""
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors', who have no norms here."""
        if len(self.layers) != len(_CHANNELS_AND_STRIDES):
            return ()
        return ((r"^layers\.", ""), (r"^head\.conv", str(len(_CHANNELS_AND_STRIDES))))


def _block(in_channels: int, channels: int, stride: int, layers: LayerSet | None) -> list[nn.Module]:
    if layers is None:
        convolution = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
    norm = [] if layers.norm == "none" else [layers.norm_of(channels)]
    activation = [nn.ReLU()] if layers.activations else []
    return [layers.conv(in_channels, channels, 3, stride, 1), *norm, *activation]


def _ordinary_head(channels: int, num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
