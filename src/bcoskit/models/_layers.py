"""Which layers take the place of an ordinary network's."""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from torch import nn

from bcoskit.models._norms import norm_layer
from bcoskit.nn import BcosConv2d, BcosLinear, ClassifierHead, Normalize, TokenClassifierHead


@dataclass(frozen=True)
class LayerSet:
    """The layers of one paper's networks, as plain values.

    Attributes:
        b: Exponent of the B-cos transform.
        max_out: Filters that compete for each output.
        normalize_weight: Whether filters are divided by their norm.
        scale: Divisor of every convolution; with `scale_by_patch` times `sqrt(kh · kw · in_channels)`.
        scale_by_patch: See `scale`.
        grouped: Whether convolutions keep their groups.
        norm: A key of `NORMS`.
        norm_eps: Epsilon of the norms.
        activations: Whether the activations are kept.
        temperature: Divisor of the logits.
        logit_bias: Constant of the logits; `"uniform"` for `-log(num_classes - 1)`.
        mean: Mean of the image, if the network itself normalises it.
        std: Standard deviation that goes with `mean`.
    """

    b: float = 2.0
    max_out: int = 1
    normalize_weight: bool = True
    scale: float = 1.0
    scale_by_patch: bool = False
    grouped: bool = True
    norm: str = "bnu-linear"
    norm_eps: float = 1e-5
    activations: bool = False
    temperature: float | None = None
    logit_bias: float | Literal["uniform"] | None = "uniform"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        groups: int = 1,
    ) -> BcosConv2d:
        """A convolution of the set."""
        kernel = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        patch = math.sqrt(kernel[0] * kernel[1] * in_channels) if self.scale_by_patch else 1.0
        return BcosConv2d(
            in_channels,
            out_channels,
            kernel,
            stride,
            padding,
            groups=groups if self.grouped else 1,
            b=self.b,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            scale=self.scale * patch,
        )

    def linear(self, in_features: int, out_features: int) -> BcosLinear:
        """A linear layer of the set."""
        return BcosLinear(
            in_features, out_features, b=self.b, max_out=self.max_out, normalize_weight=self.normalize_weight
        )

    def norm_of(self, channels: int) -> nn.Module:
        """A norm of the set."""
        return norm_layer(self.norm, channels, self.norm_eps)

    def head(self, in_channels: int, num_classes: int, *, logits: bool = True) -> ClassifierHead:
        """A classifier of maps, without temperature and constant unless `logits`."""
        patch = math.sqrt(in_channels) if self.scale_by_patch else 1.0
        return ClassifierHead(
            in_channels,
            num_classes,
            b=self.b,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            scale=self.scale * patch,
            temperature=self.temperature if logits else None,
            logit_bias=self.constant(num_classes) if logits else None,
        )

    def token_head(self, in_features: int, num_classes: int, *, pool: bool) -> TokenClassifierHead:
        """A classifier of tokens."""
        return TokenClassifierHead(
            in_features,
            num_classes,
            pool=pool,
            b=self.b,
            max_out=self.max_out,
            normalize_weight=self.normalize_weight,
            temperature=self.temperature,
            logit_bias=self.constant(num_classes),
        )

    def normalized(self, stem: nn.Module, in_channels: int) -> nn.Module:
        """The first convolution, behind the normalisation of the image if the set has one."""
        if not self.mean:
            return stem
        return nn.Sequential(OrderedDict(normalize=self._normalize(in_channels), conv=stem))

    def _normalize(self, channels: int) -> Normalize:
        # A grey image has the average of the three colours' constants.
        colours = channels // 2
        means = self.mean if colours == len(self.mean) else (sum(self.mean) / len(self.mean),) * colours
        stds = self.std if colours == len(self.std) else (sum(self.std) / len(self.std),) * colours
        return Normalize((*means, *(1 - mean for mean in means)), (*stds, *stds))

    def constant(self, num_classes: int) -> float | None:
        """The constant of the logits."""
        return -math.log(max(num_classes - 1, 1)) if self.logit_bias == "uniform" else self.logit_bias
