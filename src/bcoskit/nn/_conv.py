"""The B-cos convolutions: one class for any number of dimensions, and its three faces."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from bcoskit.functional import bcos_conv
from bcoskit.nn._base import BcosArguments, units


class _BcosConv(BcosArguments):
    """The B-cos part of the convolutions, mixed into the torch layer of one dimensionality."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        b: float | Tensor = 2.0,
        max_out: int = 1,
        normalize_weight: bool = True,
        scale: float = 1.0,
    ) -> None:
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"`groups` (={groups}) must divide `in_channels` (={in_channels}) and `out_channels` (={out_channels})"
            )
        arguments: tuple[Any, ...] = (kernel_size, stride, padding, dilation, groups, False, padding_mode)
        super().__init__(in_channels, out_channels * units(max_out), *arguments, device=device, dtype=dtype)
        self.out_channels = out_channels
        self._set_bcos_arguments(b, max_out, normalize_weight, scale, out_channels)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_channels, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        """(N, in_channels, *spatial) or (in_channels, *spatial) to (N, out_channels, *out) or (out_channels, *out)."""
        return bcos_conv(
            input,
            self.weight,
            self.bias,
            b=self.b,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            scale=self.scale,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
        )

    def extra_repr(self) -> str:
        """The arguments of the torch layer and those of the transform."""
        return super().extra_repr() + self._bcos_repr()


class BcosConv2d(_BcosConv, nn.Conv2d):
    """B-cos transform of the patches of images: see `bcoskit.functional.bcos_conv`.

    A `torch.nn.Conv2d` whose `weight` has shape (out_channels · max_out, in_channels / groups, *kernel_size) and
    is stored as it is; unit norm is a matter of the forward pass (Böhle et al., CVPR 2022, section 3.2). Other
    arguments are those of `torch.nn.Conv2d`.

    As of `torch.sigmoid`, the backward pass needs the output: in training nothing may write to it in place, as
    `torch.nn.ReLU(inplace=True)` or `y += x` would.

    Args:
        bias: Whether a learnable bias is added to the transform; networks that are to be explained by their
            input alone have none.
        b: Exponent of at least 1; a tensor of shape () or (out_channels,) becomes the learnable parameter `b`.
        max_out: Filters that compete for each output channel.
        normalize_weight: Whether the forward pass divides filters by their norm.
        scale: Divides the transform (the first paper's `sqrt(k·k·C) / 100`, for instance).

    Raises:
        ValueError: If an argument is out of its range.
    """


class BcosConv1d(_BcosConv, nn.Conv1d):
    """As `BcosConv2d`, over sequences: a `torch.nn.Conv1d`."""


class BcosConv3d(_BcosConv, nn.Conv3d):
    """As `BcosConv2d`, over volumes: a `torch.nn.Conv3d`."""
