"""The fixed normalisation of images, as a step of a network."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from bcoskit.dynamic._formulas import check_floating


class Normalize(nn.Module):
    """`(x - mean) / std` per channel, with constants that are no part of the state dict.

    For images that are encoded as `[x, 1 - x]` the constants of the complement follow from those of the image: mean
    `1 - mean` and the same standard deviation, so that the result is the pair `(z, -z)` of the normalised image `z`
    (Arya et al., NeurIPS 2024, section on the input of converted networks).

    Args:
        mean: One value per channel of the input.
        std: One value per channel of the input.
        dimensions: Spatial axes behind the channels.

    Raises:
        ValueError: If the numbers of values differ, or one of them is not finite, or a standard deviation not above 0.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dimensions: int = 2) -> None:
        super().__init__()
        self.dimensions = dimensions
        mean, std = tuple(mean), tuple(std)
        if len(mean) != len(std):
            raise ValueError(f"`mean` (={mean}) and `std` (={std}) must have as many values as the input has channels")
        if not all(map(math.isfinite, (*mean, *std))) or min(std, default=1) <= 0:
            raise ValueError(f"`mean` (={mean}) and `std` (={std}) must be finite, and `std` above 0")
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, *spatial) to the same shape.

        Raises:
            TypeError: If `x` is not of floating dtype.
            ValueError: If `x` has another number of channels.
        """
        check_floating(x)
        axis = -1 - self.dimensions
        if x.ndim < -axis or x.shape[axis] != len(self.mean):
            raise ValueError(
                f"`x` has shape {tuple(x.shape)}, must have {len(self.mean)} channels before {self.dimensions} axes"
            )
        mean, std = (x.new_tensor(values).reshape(-1, *[1] * self.dimensions) for values in (self.mean, self.std))
        return (x - mean) / std

    def extra_repr(self) -> str:
        """The constants."""
        return f"mean={self.mean}, std={self.std}"
