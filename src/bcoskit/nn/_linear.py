"""The B-cos linear layer."""

import torch
from torch import Tensor, nn

from bcoskit.functional import bcos_linear
from bcoskit.nn._base import BcosArguments, units


class BcosLinear(BcosArguments, nn.Linear):
    """B-cos transform of vectors, `(ŵ·x) |cos(x, ŵ)|^(b-1) / scale`: see `bcoskit.functional.bcos_linear`.

    A `torch.nn.Linear` whose `weight` has shape (out_features · max_out, in_features) and is stored as it is;
    unit norm is a matter of the forward pass (Böhle et al., CVPR 2022, section 3.1). In training nothing may
    write to its output in place: see `BcosConv2d`.

    Args:
        in_features: Size of the last axis of the input.
        out_features: Size of the last axis of the output.
        bias: Whether a learnable bias is added to the transform; networks that are to be explained by their
            input alone have none.
        device: Of the parameters.
        dtype: Of the parameters.
        b: Exponent of at least 1; a tensor of shape () or (out_features,) becomes the learnable parameter `b`.
        max_out: Rows that compete for each output.
        normalize_weight: Whether the forward pass divides rows by their norm.
        scale: Divides the transform.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        b: float | Tensor = 2.0,
        max_out: int = 1,
        normalize_weight: bool = True,
        scale: float = 1.0,
    ) -> None:
        super().__init__(in_features, out_features * units(max_out), bias=False, device=device, dtype=dtype)
        self.out_features = out_features
        self._set_bcos_arguments(b, max_out, normalize_weight, scale, out_features)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) to (…, out_features)."""
        return bcos_linear(
            input,
            self.weight,
            self.bias,
            b=self.b,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            scale=self.scale,
        )

    def extra_repr(self) -> str:
        """The arguments of `torch.nn.Linear` and those of the transform."""
        return super().extra_repr() + self._bcos_repr()
