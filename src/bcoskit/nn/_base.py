"""What all B-cos layers share: the arguments of the transform, checked and kept in one place."""

import math

from torch import Tensor, nn


class BcosArguments(nn.Module):
    """The arguments `b`, `max_out`, `normalize_weight` and `scale` of a layer that is a B-cos transform."""

    b: float | Tensor
    max_out: int
    normalize_weight: bool
    scale: float

    def _set_bcos_arguments(
        self, b: float | Tensor, max_out: int, normalize_weight: bool, scale: float, out_features: int
    ) -> None:
        if isinstance(b, Tensor) and (not b.is_floating_point() or b.shape not in ((), (out_features,))):
            raise ValueError(
                f"`b` of dtype {b.dtype} and shape {tuple(b.shape)} must be a floating-point tensor of shape "
                f"() or ({out_features},), one exponent per output"
            )
        # A meta tensor has no values.
        known = not isinstance(b, Tensor) or not b.is_meta
        if known and not (bool(((b >= 1) & b.isfinite()).all()) if isinstance(b, Tensor) else 1 <= b < math.inf):
            raise ValueError(f"`b` (={b}) must be a finite exponent of at least 1")
        if not math.isfinite(scale) or scale <= 0:
            raise ValueError(f"`scale` (={scale}) must be a finite divisor above 0")
        if isinstance(b, Tensor):
            weight: Tensor = self.get_parameter("weight")
            self.b = b if isinstance(b, nn.Parameter) else nn.Parameter(b.detach().clone().to(weight.device))
        else:
            self.b = float(b)
        self.max_out = max_out
        self.normalize_weight = normalize_weight
        self.scale = scale

    def reset_parameters(self) -> None:
        """The torch layer's initialisation, and a bias of 0."""
        super().reset_parameters()  # pyright: ignore[reportAttributeAccessIssue] - a torch layer stands behind it
        bias = getattr(self, "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)

    def _bcos_repr(self) -> str:
        b = "learnable" if isinstance(self.b, Tensor) else f"{self.b:g}"
        text = f", b={b}, max_out={self.max_out}, normalize_weight={self.normalize_weight}"
        return text if self.scale == 1 else f"{text}, scale={self.scale:g}"


def units(max_out: int) -> int:
    """The number of rows per output, checked before the layer's weight is made.

    Raises:
        ValueError: If it is below 1.
    """
    if max_out < 1:
        raise ValueError(f"`max_out` (={max_out}) must be at least 1")
    return max_out
