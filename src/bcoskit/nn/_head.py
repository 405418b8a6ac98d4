"""What stands at the end of a B-cos network."""

import math

import torch
from torch import Tensor, nn

from bcoskit.nn._conv import BcosConv2d
from bcoskit.nn._linear import BcosLinear


class LogitLayer(nn.Module):
    """`logits = activations / temperature + bias`: two constants, no parameters, nothing in the state dict.

    A bias of `-log(N - 1)` starts the training of N classes with binary cross-entropy at uniform probabilities
    (Böhle et al., TPAMI 2024). It is a constant of the logit, which the explanation names.

    Args:
        temperature: Divisor, None for 1.
        bias: Added to every logit, None for 0; a 0 stays 0.

    Raises:
        ValueError: If a constant is not finite, or the temperature is not above 0.
    """

    def __init__(self, temperature: float | None = None, bias: float | None = None) -> None:
        super().__init__()
        if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"`temperature` (={temperature}) must be a finite divisor above 0, or None")
        if bias is not None and not math.isfinite(bias):
            raise ValueError(f"`bias` (={bias}) must be finite, or None")
        self.temperature = temperature
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same shape; within `torch.autocast` to single precision, in which classes stay apart."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        logits = x if self.temperature is None else x / self.temperature
        return logits if self.bias is None else logits + self.bias

    def extra_repr(self) -> str:
        """The two constants."""
        return f"temperature={self.temperature}, bias={self.bias}"


class ClassifierHead(nn.Sequential):
    """Classify every position, then average: 1×1 B-cos convolution, global mean, `LogitLayer`.

    The order matters, since a B-cos classifier is not linear (Böhle et al., CVPR 2022, section 4).

    Args:
        in_channels: Channels of the map.
        num_classes: Number of logits.
        b: As of `BcosConv2d`.
        max_out: As of `BcosConv2d`.
        normalize_weight: As of `BcosConv2d`.
        scale: As of `BcosConv2d`.
        temperature: As of `LogitLayer`.
        logit_bias: The `bias` of `LogitLayer`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        b: float | Tensor = 2.0,
        max_out: int = 1,
        normalize_weight: bool = True,
        scale: float = 1.0,
        temperature: float | None = None,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.conv = BcosConv2d(
            in_channels, num_classes, 1, b=b, max_out=max_out, normalize_weight=normalize_weight, scale=scale
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(-3)
        self.logits = LogitLayer(temperature, logit_bias)


class MeanOverTokens(nn.Module):
    """The mean over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) to (N, D)."""
        return x.mean(-2)


class TokenClassifierHead(nn.Sequential):
    """Classify tokens, or their mean: B-cos linear layer, mean over the tokens if `pool`, `LogitLayer`.

    Args:
        in_features: Size of a token.
        num_classes: Number of logits.
        pool: Whether every token is classified, and the results averaged; if not, the input is one vector per sample.
        b: As of `BcosLinear`.
        max_out: As of `BcosLinear`.
        normalize_weight: As of `BcosLinear`.
        temperature: As of `LogitLayer`.
        logit_bias: The `bias` of `LogitLayer`.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        pool: bool = False,
        b: float | Tensor = 2.0,
        max_out: int = 1,
        normalize_weight: bool = True,
        temperature: float | None = None,
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        self.linear = BcosLinear(in_features, num_classes, b=b, max_out=max_out, normalize_weight=normalize_weight)
        if pool:
            self.pool = MeanOverTokens()
        self.logits = LogitLayer(temperature, logit_bias)
