"""VGG: timm's, with the layers of a set, without the pooling to 7×7 before its classifier."""

from collections.abc import Sequence
from typing import Any

from timm.models import vgg
from torch import nn

from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename, by_fan_out
from bcoskit.models._substitution import rules_of, substitute

ARCHITECTURES = ("vgg11", "vgg13", "vgg16", "vgg19")


class VGG(Network, vgg.VGG):
    """`timm.models.vgg.VGG` with the layers of a set, and classified before it is averaged.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the encoded image.
        architecture: One of `ARCHITECTURES`.
        layers: The layers.
    """

    initialize_filter = staticmethod(by_fan_out)
    classifier_path = "head.fc"

    def __init__(self, num_classes: int, in_channels: int, *, architecture: str, layers: LayerSet) -> None:
        norm = None if layers.norm == "none" else nn.BatchNorm2d
        super().__init__(vgg.cfgs[architecture], num_classes=0, in_chans=in_channels, norm_layer=norm, global_pool="")
        substitute(self, rules_of(layers))
        # Every position is classified, those at the border with padding, whatever the size of the map.
        pre_logits: Any = self.pre_logits
        pre_logits.fc1 = layers.conv(512, 4096, 7, 1, 3)
        pre_logits.input_kernel_size = 1
        head: Any = self.head
        head.fc = layers.head(4096, num_classes)
        self.num_classes = num_classes
        self.reset_parameters()

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors', who do not number activations that are not there."""
        absent = [index for index, layer in enumerate(self.features) if isinstance(layer, nn.Identity)]

        def renumbered(index: int) -> int:
            return index - sum(other < index for other in absent)

        return (
            (r"^features\.(\d+)", lambda match: f"features.{renumbered(int(match[1]))}"),
            (r"^pre_logits\.fc1", "classifier.0"),
            (r"^pre_logits\.fc2", "classifier.1"),
            (r"^head\.fc\.conv", "classifier.2"),
        )
