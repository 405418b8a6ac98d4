"""Self-attention whose attention matrix is a constant of the explanation."""

from torch import Tensor, nn

from bcoskit.functional import attention
from bcoskit.nn._linear import BcosLinear


class Attention(nn.Module):
    """Multi-head self-attention `W_out · softmax(q kᵀ / √d) v` on tokens.

    Queries, keys and values come from one ordinary linear layer, neither B-cos nor of unit norm; the output
    projection is B-cos. In `explanation_mode` the attention matrix is a constant, so that the layer is linear in
    its values (Böhle et al., TPAMI 2024, section on transformers).

    Args:
        dim: Size of a token.
        num_heads: Heads; must divide `dim`.
        qkv_bias: Whether queries, keys and values have biases.
        b: Of the output projection, as of `BcosLinear`.
        max_out: Of the output projection, as of `BcosLinear`.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        b: float | Tensor = 2.0,
        max_out: int = 1,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"`num_heads` (={num_heads}) must divide `dim` (={dim})")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = BcosLinear(dim, dim, b=b, max_out=max_out)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, T, dim) to (N, T, dim).

        Args:
            x: The tokens.
            mask: As of `bcoskit.functional.attention`: (T, T) for all, (N, T, T) for each sample, or (N, num_heads, T,
                T) for each head as well.

        Raises:
            ValueError: If the mask has another shape.
        """
        if mask is not None:
            samples, tokens = x.shape[:-2].numel(), x.shape[-2]
            mask = mask.unsqueeze(-3) if mask.ndim == 3 else mask
            known = zip(mask.shape[::-1], (tokens, tokens, self.num_heads, samples), strict=False)
            if mask.ndim not in (2, 4) or any(size not in (1, most) for size, most in known):
                raise ValueError(f"`mask` of shape {tuple(mask.shape)} does not fit `x` of shape {tuple(x.shape)}")
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-3, -2)
        query, key, value = heads.unbind(0)
        return self.proj(attention(query, key, value, mask=mask).transpose(-3, -2).flatten(-2))
