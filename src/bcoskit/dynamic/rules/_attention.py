"""Attention: the attention matrix is frozen, the values stay linear."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit.dynamic._mode import NotLinearError, freeze
from bcoskit.dynamic.rules._table import frozen, rule


@rule("scaled_dot_product_attention")
def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # Explicit, since the fused kernels have no second derivative.
    if dropout_p > 0:
        raise NotLinearError(f"attention dropout (`dropout_p`={dropout_p}) is random; call `model.eval()` first")
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = freeze(query) @ freeze(key).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is None and not is_causal:
        return torch.softmax(scores, -1) @ value
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + freeze(attn_mask)
    # As in the fused kernels, a query that may attend to nothing has the output 0.
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(nothing, 0.0) @ value


@rule("multi_head_attention_forward")
def _multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if training and dropout_p > 0:
        raise NotLinearError(f"attention dropout (`dropout_p`={dropout_p}) is random; call `model.eval()` first")
    # Torch itself computes the attention matrix, with all its masks and extra keys, from frozen arguments.
    _, weights = F.multi_head_attention_forward(
        freeze(query),
        freeze(key),
        freeze(value),
        embed_dim_to_check,
        num_heads,
        frozen(in_proj_weight),
        frozen(in_proj_bias),
        frozen(bias_k),
        frozen(bias_v),
        add_zero_attn,
        0.0,
        frozen(out_proj_weight),
        frozen(out_proj_bias),
        training=False,
        key_padding_mask=frozen(key_padding_mask),
        need_weights=True,
        attn_mask=frozen(attn_mask),
        use_separate_proj_weight=use_separate_proj_weight,
        q_proj_weight=frozen(q_proj_weight),
        k_proj_weight=frozen(k_proj_weight),
        v_proj_weight=frozen(v_proj_weight),
        static_k=frozen(static_k),
        static_v=frozen(static_v),
        average_attn_weights=False,
        is_causal=is_causal,
    )
    if in_proj_weight is not None and not use_separate_proj_weight:
        v_proj_weight = in_proj_weight.chunk(3)[2]
    assert v_proj_weight is not None and weights is not None
    batched = query.ndim == 3
    values = value if batched else value.unsqueeze(1)
    values = F.linear(values, v_proj_weight, None if in_proj_bias is None else in_proj_bias.chunk(3)[2])
    if bias_v is not None:
        values = torch.cat([values, bias_v.expand(1, values.shape[1], -1)])
    heads = (
        values.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        if static_v is None
        else static_v.unflatten(0, (-1, num_heads))
    )
    if add_zero_attn:
        heads = F.pad(heads, (0, 0, 0, 1))
    matrix = weights if batched else weights.unsqueeze(0)
    mixed = (matrix @ heads).permute(2, 0, 1, 3).flatten(2)
    output = F.linear(mixed, out_proj_weight, out_proj_bias)
    averaged = weights.mean(-3) if average_attn_weights else weights
    return output if batched else output.squeeze(1), averaged if need_weights else None
