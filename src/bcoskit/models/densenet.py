"""DenseNet: timm's, with the layers of a set."""

from collections.abc import Sequence

from timm.models import densenet
from torch import nn

from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename
from bcoskit.models._substitution import rules_of, substitute

# Growth, and layers per block.
ARCHITECTURES: dict[str, tuple[int, tuple[int, ...]]] = {
    "densenet121": (32, (6, 12, 24, 16)),
    "densenet161": (48, (6, 12, 36, 24)),
    "densenet169": (32, (6, 12, 32, 32)),
    "densenet201": (32, (6, 12, 48, 32)),
}

_NUMBERS = {"conv0": 0, "norm0": 1, "norm5": 11} | {
    f"{part}{index}": 2 + 2 * index + shift
    for part, shift, count in (("denseblock", 0, 4), ("transition", 1, 3))
    for index in range(1, count + 1)
}


class DenseNet(Network, densenet.DenseNet):
    """`timm.models.densenet.DenseNet` with the layers of a set, and classified before it is averaged.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the encoded image.
        architecture: A key of `ARCHITECTURES`.
        layers: The layers.
    """

    initialize_filter = staticmethod(nn.init.kaiming_normal_)
    classifier_path = "classifier"

    def __init__(self, num_classes: int, in_channels: int, *, architecture: str, layers: LayerSet) -> None:
        growth, depths = ARCHITECTURES[architecture]
        super().__init__(growth, depths, num_classes=0, in_chans=in_channels, global_pool="")
        substitute(self, rules_of(layers))
        self.features.conv0 = layers.normalized(self.features.get_submodule("conv0"), in_channels)
        self.classifier = layers.head(int(self.num_features), num_classes)
        self.num_classes = num_classes
        self._converted = layers.activations
        self.reset_parameters()

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors', who number the parts of a converted network."""
        classifier: Rename = (r"^classifier\.conv", "classifier")
        if not self._converted:
            return (classifier,)
        return (
            classifier,
            (r"(norm\d?)\.norm", r"\1"),
            (r"^(features\.conv0)\.conv", r"\1"),
            (r"^(features\.transition\d)\.norm", r"\1.0"),
            (r"^(features\.transition\d)\.conv", r"\1.2"),
            (r"^features\.(\w+)", lambda match: f"features.{_NUMBERS[match[1]]}"),
        )
