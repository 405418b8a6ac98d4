"""What metrics of single images share: which images, and which class of each is explained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from bcoskit._probabilities import check_classes
from bcoskit.evaluation._loop import item_of, stacked
from bcoskit.evaluation._result import Row

Explained: TypeAlias = Literal["predicted", "label"]
"""Which class of an image is explained."""


@dataclass(frozen=True, kw_only=True)
class DrawnImages:
    """What a metric of single images is measured on.

    Attributes:
        count: Number of images, drawn at random; None for all.
        explained: Which class of an image.
        seed: Of the draw.

    Raises:
        ValueError: If `explained` is another word.
    """

    count: int | None = None
    explained: Explained = "predicted"
    seed: int = 42

    needs_method = True

    def __post_init__(self) -> None:
        if self.explained not in ("predicted", "label"):
            raise ValueError(f"`explained` (={self.explained!r}) must be 'predicted' or 'label'")

    def units(self, model: nn.Module, dataset: Any, ranking: Sequence[Row]) -> Sequence[int]:
        """Numbers of the images that are drawn."""
        return drawn(dataset, self.count, self.seed)


def drawn(dataset: Any, count: int | None, seed: int) -> Sequence[int]:
    """Numbers of `count` images drawn at random, in ascending order; of all if `count` is None.

    Raises:
        ValueError: If there are fewer.
    """
    total = len(dataset)
    if count is None:
        return range(total)
    if total and not 1 <= count <= total:
        raise ValueError(f"`count` (={count}) must be between 1 and the number of images, {total}")
    return sorted(int(index) for index in np.random.RandomState(seed).permutation(total)[:count])


def inputs_and_targets(
    model: nn.Module, dataset: Any, units: Sequence[int], explained: Explained
) -> tuple[Tensor, Tensor]:
    """A batch of encoded images (N, C, H, W), and the classes that are explained, (N,)."""
    items = [item_of(dataset, index) for index in units]
    x = stacked(model, [item[0] for item in items])
    labels = [item[1] for item in items]
    with torch.no_grad():
        logits = model(x)
    check_classes(labels if explained == "label" else (), logits)
    return x, torch.tensor(labels, device=x.device) if explained == "label" else logits.argmax(1)


def image_rows(units: Sequence[int], target: Tensor, *columns: Mapping[str, Sequence[Any]]) -> list[list[Row]]:
    """For each image one row per table of columns, each with as many values as there are images."""
    return [
        [
            {
                "image": int(unit),
                "target": int(target[index]),
                **{name: values[index] for name, values in table.items()},
            }
            for table in columns
        ]
        for index, unit in enumerate(units)
    ]
