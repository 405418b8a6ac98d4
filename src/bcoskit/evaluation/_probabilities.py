"""What the logits of a network are as probabilities."""

from typing import Any

from torch import Tensor


def probabilities_of(model: Any, logits: Tensor) -> Tensor:
    """A softmax where the network says that it was trained by cross-entropy (`loss`), else a sigmoid."""
    return logits.softmax(-1) if getattr(model, "loss", None) == "cross_entropy" else logits.sigmoid()
