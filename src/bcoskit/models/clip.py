"""The image tower of CLIP's ResNet-50: timm's, with the layers of a set and an attention pool of its own."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import byobnet
from torch import Tensor, nn

from bcoskit.dynamic import freeze
from bcoskit.functional import attention
from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename
from bcoskit.models._substitution import rules_of, substitute

_HEADS = 32


class AttentionPool(nn.Module):
    """Pools a map into one embedding, by attention of its mean to all positions, or position by position.

    - By attention: with tokens `X`, the mean of the positions and the positions, `W_out · softmax(q kᵀ / √d) v`,
      where `q` comes from the mean, `k` and `v` from all tokens, by ordinary linear layers. In `explanation_mode` the
      attention matrix is a constant.
    - By position (`unpool`): each position by itself goes through the values' layer and the output layer, which is
      B-cos here, and is divided by its norm, a constant in `explanation_mode`; the result is their mean.

    There are neither biases nor positions (Arya et al., NeurIPS 2024, section on CLIP).

    Args:
        in_channels: Channels of the map.
        out_features: Size of the embedding.
        layers: The layers.
    """

    def __init__(self, in_channels: int, out_features: int, layers: LayerSet) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(in_channels, in_channels, bias=False) for _ in range(3))
        self.proj = layers.linear(in_channels, out_features)
        self.unpool = False

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, in_channels, h, w) to (N, out_features), or what is pooled by attention, (N, in_channels).

        Raises:
            ValueError: If `pre_logits` is asked for position by position, where nothing is pooled before the output.
        """
        if self.unpool:
            if pre_logits:
                raise ValueError("`pre_logits` (=True) needs `unpool` to be False")
            return self.positions(x).mean((2, 3))
        positions = x.flatten(2).mT
        mean = positions.mean(1, keepdim=True)
        tokens = torch.cat([mean, positions], 1)
        query, key, value = (
            layer(entry).unflatten(-1, (_HEADS, -1)).transpose(1, 2)
            for layer, entry in ((self.q, mean), (self.k, tokens), (self.v, tokens))
        )
        pooled = attention(query, key, value).transpose(1, 2).flatten(2)[:, 0]
        return pooled if pre_logits else F.linear(pooled, self.proj.weight)

    def positions(self, x: Tensor) -> Tensor:
        """The embedding of each position, of unit norm: (N, in_channels, h, w) to (N, out_features, h, w)."""
        embeddings = self.proj(self.v(x.movedim(1, -1)))
        return (embeddings / freeze(embeddings).norm(dim=-1, keepdim=True)).movedim(-1, 1)

    def extra_repr(self) -> str:
        """The mode."""
        return f"unpool={self.unpool}"


class ClipResNet(Network, byobnet.ByobNet):  # pyright: ignore[reportIncompatibleMethodOverride]
    """`timm.models.byobnet.ByobNet` in the shape of CLIP's ResNet-50, with the layers of a set.

    Its output is an embedding, to be compared with those of texts. `unpool` chooses how the map is pooled: see
    `AttentionPool`. `model.head.positions(model.forward_features(x))` has the embedding of each position.

    Args:
        num_classes: Size of the embedding.
        in_channels: Channels of the encoded image.
        layers: The layers.
    """

    classifier_path = "head.proj"

    def __init__(self, num_classes: int, in_channels: int, *, layers: LayerSet) -> None:
        super().__init__(byobnet.model_cfgs["resnet50_clip"], num_classes=0, in_chans=in_channels, img_size=224)
        substitute(self, rules_of(layers))
        for pool in self.modules():
            if isinstance(pool, nn.AvgPool2d):
                pool.ceil_mode = False  # as in the original, so that odd sizes fit beside the convolutions
        stem = self.stem.get_submodule("conv1")
        stem.conv = layers.normalized(stem.get_submodule("conv"), in_channels)
        self.head = AttentionPool(self.num_features, num_classes, layers)
        self.num_classes = num_classes
        self.reset_parameters()

    @property
    def unpool(self) -> bool:
        """Whether positions are embedded one by one and averaged, instead of pooled by attention."""
        return self.head.unpool

    @unpool.setter
    def unpool(self, value: bool) -> None:
        self.head.unpool = value

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors'."""
        return (
            (r"^stem\.conv(\d)\.conv(\.conv)?", r"conv\1"),
            (r"^stem\.conv(\d)\.bn\.norm", r"bn\1"),
            (r"^stages\.(\d)", lambda match: f"layer{int(match[1]) + 1}"),
            (r"\.conv(\d)_(1x1|kxk)\.conv", r".conv\1"),
            (r"\.conv(\d)_(1x1|kxk)\.bn\.norm", r".bn\1"),
            (r"\.shortcut\.conv\.conv", ".downsample.1"),
            (r"\.shortcut\.conv\.bn\.norm", ".downsample.2"),
            (r"^head\.([qkv])\.", r"attnpool.\1_proj."),
            (r"^head\.proj", "attnpool.c_proj"),
        )
