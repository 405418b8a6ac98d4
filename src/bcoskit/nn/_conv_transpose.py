"""The transposed B-cos convolutions."""

from typing import Any

import torch
from torch import Tensor, nn

from bcoskit.functional import bcos_conv_transpose
from bcoskit.nn._base import BcosArguments


class _BcosConvTranspose(BcosArguments):
    """The B-cos part of the transposed convolutions, mixed into the torch layer of one dimensionality."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    kernel_size: tuple[int, ...]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: int | tuple[int, ...] = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        b: float | Tensor = 2.0,
        normalize_weight: bool = True,
        scale: float = 1.0,
    ) -> None:
        arguments: tuple[Any, ...] = (kernel_size, stride, padding, output_padding, groups, bias, dilation)
        super().__init__(in_channels, out_channels, *arguments, device=device, dtype=dtype)
        self._set_bcos_arguments(b, 1, normalize_weight, scale, out_channels)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(N, in_channels, *spatial) to (N, out_channels, *out)."""
        layer: Any = self
        dims = self.weight.ndim - 2
        output_padding = layer._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        return bcos_conv_transpose(
            input,
            self.weight,
            self.bias,
            b=self.b,
            normalize_weight=self.normalize_weight,
            scale=self.scale,
            stride=self.stride,
            padding=self.padding,
            output_padding=output_padding,
            groups=self.groups,
            dilation=self.dilation,
        )

    def extra_repr(self) -> str:
        """The arguments of the torch layer and those of the transform."""
        return super().extra_repr() + self._bcos_repr()


class BcosConvTranspose2d(_BcosConvTranspose, nn.ConvTranspose2d):
    """The B-cos form of a `torch.nn.ConvTranspose2d`: see `bcoskit.functional.bcos_conv_transpose`.

    Args:
        bias: Whether a learnable bias is added to the transform.
        b: Exponent of at least 1; a tensor of shape () or (out_channels,) becomes the learnable parameter `b`.
        normalize_weight: Whether the forward pass divides filters by their norm.
        scale: Divides the transform.

    Raises:
        ValueError: If an argument is out of its range.
    """


class BcosConvTranspose1d(_BcosConvTranspose, nn.ConvTranspose1d):
    """As `BcosConvTranspose2d`, over sequences: a `torch.nn.ConvTranspose1d`."""


class BcosConvTranspose3d(_BcosConvTranspose, nn.ConvTranspose3d):
    """As `BcosConvTranspose2d`, over volumes: a `torch.nn.ConvTranspose3d`."""
