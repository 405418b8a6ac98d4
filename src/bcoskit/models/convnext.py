"""ConvNeXt: timm's, with the layers of a set."""

from collections.abc import Sequence
from functools import partial
from re import Match
from typing import Any

from timm.models import convnext
from torch import Tensor, nn

from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename
from bcoskit.models._substitution import rules_of, substitute

# Blocks and channels per stage, and the stochastic depth of the last block.
ARCHITECTURES: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
    "convnext_atto": ((2, 2, 6, 2), (40, 80, 160, 320), 0.1),
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768), 0.1),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768), 0.4),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024), 0.5),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536), 0.5),
}
_LAYER_SCALE = 1e-6


class ConvNeXt(Network, convnext.ConvNeXt):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`timm.models.convnext.ConvNeXt` with the layers of a set; normalised and classified before it is averaged.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the encoded image.
        architecture: A key of `ARCHITECTURES`.
        layers: The layers.
    """

    initialize_filter = staticmethod(partial(nn.init.trunc_normal_, std=0.02))
    classifier_path = "head.fc"

    def __init__(self, num_classes: int, in_channels: int, *, architecture: str, layers: LayerSet) -> None:
        depths, widths, drop_path_rate = ARCHITECTURES[architecture]
        super().__init__(
            in_channels,
            num_classes=0,
            global_pool="",
            depths=depths,
            dims=widths,
            ls_init_value=_LAYER_SCALE,
            conv_mlp=True,
            drop_path_rate=drop_path_rate,
        )
        substitute(self, rules_of(layers))
        head: Any = self.head
        head.fc = layers.head(widths[-1], num_classes)
        self.num_classes = num_classes
        self.reset_parameters()

    def initialize(self, module: nn.Module) -> None:
        """The scales of the residual branches are 1e-6."""
        if isinstance(module, convnext.ConvNeXtBlock):
            assert module.gamma is not None
            nn.init.constant_(module.gamma, _LAYER_SCALE)
        else:
            super().initialize(module)

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors'."""

        def stage(match: Match[str], shift: int) -> str:
            return f"features.{2 * int(match[1]) + shift}"

        return (
            (r"^stem\.", "features."),
            (r"^stages\.(\d)\.downsample", lambda match: stage(match, 1)),
            (r"^stages\.(\d)\.blocks", lambda match: stage(match, 2)),
            (r"\.conv_dw\b", ".block.0"),
            (r"^(features\.\d+\.\d+)\.norm", r"\1.block.1"),
            (r"\.mlp\.fc1", ".block.2"),
            (r"\.mlp\.fc2", ".block.3"),
            (r"\.gamma$", ".layer_scale"),
            (r"^head\.norm", "classifier.0"),
            (r"^head\.fc\.conv", "classifier.1"),
        )

    def from_authors(self, key: str, tensor: Tensor) -> Tensor:
        """The scale of a residual branch is a vector here, theirs has two spatial axes."""
        return tensor.flatten() if key.endswith(".gamma") and tensor.shape[1:] == (1, 1) else tensor
