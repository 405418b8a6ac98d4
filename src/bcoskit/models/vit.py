"""SimpleViT and ViT-C: timm's vision transformer with other embeddings, B-cos or ordinary."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import vision_transformer
from torch import Tensor, nn

from bcoskit.models._layers import LayerSet
from bcoskit.models._network import Network, Rename
from bcoskit.nn import LayerNorm, Normalize

# Size of a token, heads, blocks, and the channels of the convolutions that stand in the place of one block in ViT-C.
ARCHITECTURES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "simple_vit_ti_patch16_224": (192, 3, 12, ()),
    "simple_vit_s_patch16_224": (384, 6, 12, ()),
    "simple_vit_b_patch16_224": (768, 12, 12, ()),
    "simple_vit_l_patch16_224": (1024, 16, 14, ()),
    "vitc_ti_patch1_14": (192, 3, 11, (24, 48, 96, 192)),
    "vitc_s_patch1_14": (384, 6, 11, (48, 96, 192, 384)),
    "vitc_b_patch1_14": (768, 12, 11, (64, 128, 128, 256, 256, 512)),
    "vitc_l_patch1_14": (1024, 16, 13, (64, 128, 128, 256, 256, 512)),
}
_PATCH = 16
_EPS = 1e-5


class PatchEmbed(nn.Module):
    """Patches as vectors, channel fastest, then column, then row, and a linear layer of each.

    Args:
        stem: From images to the maps whose patches are embedded.
        proj: The linear layer.
        patch_size: Side of a patch of the stem's maps.
    """

    def __init__(self, stem: nn.Module, proj: nn.Module, patch_size: int) -> None:
        super().__init__()
        self.stem = stem
        self.proj = proj
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to tokens (N, h, w, D).

        Raises:
            ValueError: If patches do not tile the map.
        """
        side = self.patch_size
        maps = self.stem(x)
        if maps.shape[-2] % side or maps.shape[-1] % side:
            height, width = x.shape[-2:]
            raise ValueError(f"`x` of {height}x{width} pixels must have sides that are multiples of {side}")
        patches = maps.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (N, C, h, side, w, side)
        return self.proj(patches.permute(0, 2, 4, 3, 5, 1).flatten(3))

    def read_pairs(self, normalize: Normalize) -> None:
        """Read pairs `[x, 1 - x]` from now on, where there is no stem: `(w, -w) / 2` behind their normalisation.

        Args:
            normalize: What makes `(z, -z)` of the pair.
        """
        linear: Any = self.proj
        with torch.no_grad():
            weight = linear.weight.unflatten(1, (self.patch_size**2, -1))  # channel fastest
            pair = (torch.cat([weight, -weight], 2) / 2).flatten(1)
        linear.weight = nn.Parameter(pair, linear.weight.requires_grad)
        linear.in_features *= 2
        step = Normalize(normalize.mean, normalize.std, normalize.dimensions).train(self.training)
        self.stem = nn.Sequential(OrderedDict(normalize=step, conv=self.stem)).train(self.training)

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of tokens of an image, for timm's `forward_intermediates`."""
        return math.ceil(img_size[0] / _PATCH), math.ceil(img_size[1] / _PATCH)  # each stride of a stem rounds up


class PositionEmbedding(nn.Module):
    """Adds sines and cosines of the position, of whatever grid (Beyer et al., 2022).

    At row i and column j of the grid: `[sin(jω), cos(jω), sin(iω), cos(iω)]` with `ω_m = 10000^(-m / (D/4 - 1))`, in
    single precision. It is a constant of the network, so that explanations name it.

    Args:
        dim: D, a multiple of 4.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, h, w, D) to the same shape."""
        return x + self._table(x.shape[1], x.shape[2], x.device).to(x.dtype)

    def _table(self, height: int, width: int, device: torch.device) -> Tensor:
        quarter = self.dim // 4
        steps = torch.arange(quarter, device=device) / (quarter - 1)
        frequencies = 1.0 / (10_000**steps)
        rows, columns = (torch.arange(size, device=device)[:, None] * frequencies for size in (height, width))
        by_row = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, width, -1)
        by_column = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(height, -1, -1)
        return torch.cat([by_column, by_row], 2)


class VisionTransformer(Network, vision_transformer.VisionTransformer):
    """`timm.models.vision_transformer.VisionTransformer` without class token, with fixed positions.

    Args:
        num_classes: Number of logits.
        in_channels: Channels of the image.
        architecture: A key of `ARCHITECTURES`.
        layers: The layers; None for the ordinary transformer.
        classify_tokens: Whether every token is normalised and classified, and the results averaged, as in converted
            networks; if not, the mean of the tokens is.
    """

    classifier_path = "head"

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        architecture: str,
        layers: LayerSet | None,
        classify_tokens: bool = False,
    ) -> None:
        dim, heads, depth, stem = ARCHITECTURES[architecture]
        gated = layers is None or layers.activations
        super().__init__(
            patch_size=_PATCH,
            in_chans=in_channels,
            num_classes=0,
            global_pool="" if classify_tokens else "avg",
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            qkv_bias=False,
            class_token=False,
            pos_embed="none",
            norm_layer=partial(nn.LayerNorm, eps=_EPS, bias=layers is None),
            act_layer=nn.GELU if gated else nn.Identity,
        )
        for block in self.blocks:
            attn, mlp = block.get_submodule("attn"), block.get_submodule("mlp")
            if layers is None:
                attn.get_submodule("proj").register_parameter("bias", None)
            else:
                attn.proj = layers.linear(dim, dim)
                mlp.fc1, mlp.fc2 = layers.linear(dim, 4 * dim), layers.linear(4 * dim, dim)
        channels, side = (stem[-1], 1) if stem else (in_channels, _PATCH)
        size = side * side * channels
        self.patch_embed = PatchEmbed(
            _stem(in_channels, stem, layers), nn.Linear(size, dim) if layers is None else layers.linear(size, dim), side
        )
        self.pos_embed = PositionEmbedding(dim)
        if layers is None:
            self.head = nn.Linear(dim, num_classes)
        else:
            self.head = layers.token_head(dim, num_classes, pool=classify_tokens)
        self.num_classes = num_classes
        self.reset_parameters()

    def _pos_embed(self, x: Tensor) -> Tensor:
        return self.pos_embed(x).flatten(1, 2)

    def set_input_size(self, *_arguments: Any, **_keywords: Any) -> None:
        """Does nothing: positions are computed for whatever grid comes."""

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors'."""
        return (
            (r"^patch_embed\.proj", "to_patch_embedding.linear"),
            (r"^patch_embed\.stem(\.normalize|\.conv)?\.", "to_patch_embedding.conv_stem."),
            (r"^blocks\.(\d+)\.", r"transformer.encoder_\1."),
            (r"\.norm1\.", ".attn.norm."),
            (r"\.attn\.qkv", ".attn.to_qkv"),
            (r"\.attn\.proj", ".attn.to_out"),
            (r"\.norm2\.", ".ff.net.norm."),
            (r"\.mlp\.fc(\d)", r".ff.net.linear\1"),
            (r"^(fc_)?norm\.", "linear_head.norm."),
            (r"^head\.linear", "linear_head.linear"),
            (r"^head\.", "linear_head.linear."),
        )


def _stem(in_channels: int, widths: Sequence[int], layers: LayerSet | None) -> nn.Module:
    """Per width a 3×3 convolution, of stride 2 where the width grows, a norm and an activation."""
    parts: list[nn.Module] = []
    before = in_channels
    for width in widths:
        stride = 2 if width > before else 1
        if layers is None:
            parts += [nn.Conv2d(before, width, 3, stride, 1), nn.GroupNorm(1, width), nn.GELU()]
        else:
            norm = LayerNorm(width, centered=True, eps=_EPS)
            activation = nn.GELU() if layers.activations else nn.Identity()
            parts += [layers.conv(before, width, 3, stride, 1), norm, activation]
        before = width
    stem = nn.Sequential(*parts)
    return stem if layers is None else layers.normalized(stem, in_channels)
