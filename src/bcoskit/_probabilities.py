"""What the logits of a network are as probabilities."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def probabilities_of(model: Any, logits: Tensor) -> Tensor:
    """A softmax where the network says that it was trained by cross-entropy (`loss`), else a sigmoid.

    Networks that say nothing, such as a plain `nn.Module`, get the sigmoid, as in the papers.
    """
    return logits.softmax(-1) if getattr(model, "loss", None) == "cross_entropy" else logits.sigmoid()


def check_classes(labels: Sequence[int], logits: Tensor) -> None:
    """Refuse labels that are no classes of a network.

    Raises:
        ValueError: If one is out of range, or the output is no finite logits (N, classes).
    """
    if logits.ndim != 2 or not bool(logits.isfinite().all()):
        raise ValueError(f"the output has shape {tuple(logits.shape)}, must be finite logits (N, classes)")
    outside = [label for label in labels if not 0 <= label < logits.shape[1]]
    if outside:
        raise ValueError(f"the label {outside[0]} is no class of the network, which has {logits.shape[1]}")
