"""B-cos layers for convolutions and attention that torch's B-cos layers do not cover."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.padding import pad_same
from torch import Tensor, nn

from bcoskit.dynamic import freeze
from bcoskit.functional import attention, bcos_conv
from bcoskit.nn import BcosConv2d


class StandardizedConv2d(BcosConv2d):
    """A B-cos convolution of timm's kinds: filters standardised in the forward pass, padding after the input's size.

    Filters are `gain · scale · (w - mean(w)) / sqrt(var(w) + eps)` if `standardize`, and what `BcosConv2d` has as it
    is if not. With `same_pad` the input is padded so that the output has ⌈size / stride⌉ positions.
    """

    gain: nn.Parameter | None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.standardize = self.same_pad = False
        self.gain_scale, self.eps = 1.0, 0.0
        self.register_parameter("gain", None)

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H', W')."""
        if self.same_pad:
            input = pad_same(input, list(self.kernel_size), list(self.stride), list(self.dilation))
        return bcos_conv(
            input,
            self._filters(),
            self.bias,
            b=self.b,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            scale=self.scale,
            stride=self.stride,
            padding=0 if self.same_pad else self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _filters(self) -> Tensor:
        if not self.standardize:
            return self.weight
        var, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        filters = (self.weight - mean) * torch.rsqrt(var + self.eps)
        return filters if self.gain is None else filters * (self.gain * self.gain_scale)


class ExplicitMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose output projection is called as the layer that it is.

    Torch's passes the projection's weight to a function, past a B-cos layer in its place.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention`."""
        single = query.ndim == 2
        if single:
            query, key, value = (tokens.unsqueeze(0 if self.batch_first else 1) for tokens in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        if not self.batch_first:
            query, key, value = (tokens.transpose(0, 1) for tokens in (query, key, value))
        heads = [
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in self._projected(query, key, value)
        ]
        mask = self._mask(heads[0], heads[1], key_padding_mask, attn_mask, is_causal)
        if self.training and self.dropout:
            output = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=self.dropout)
        else:
            output = attention(*heads, mask=mask)
        output = self.out_proj(output.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            queries, keys = freeze(heads[0]), freeze(heads[1])
            scores = queries @ keys.mT * queries.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if single else weights
        output = output if self.batch_first else output.transpose(0, 1)
        return output.squeeze(0 if self.batch_first else 1) if single else output, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        biases = (None,) * 3 if self._parameters.get("in_proj_bias") is None else self.in_proj_bias.chunk(3)
        if self._qkv_same_embed_dim:
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        return [
            F.linear(tokens, weight, bias)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]

    def _mask(
        self, query: Tensor, key: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Both masks as one that is added, (N or 1, heads or 1, T, S)."""
        total: Tensor | None = None
        if mask is None and is_causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
        if mask is not None:
            added = self._added(mask, query)
            total = added if added.ndim == 2 else added.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            added = self._added(padding, query)[:, None, None, :]
            total = added if total is None else total + added
        return total

    @staticmethod
    def _added(mask: Tensor, query: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask.to(query.dtype)
        return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(mask, -torch.inf)
