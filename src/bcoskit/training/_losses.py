"""Losses of logits and targets."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit.training._options import Loss


def soft_targets(labels: Tensor, num_classes: int, loss: Loss) -> Tensor:
    """Targets (N, num_classes) of labels (N,) or of targets that are soft already, see `Loss`.

    Raises:
        TypeError: If labels (N,) are no integers.
        ValueError: If there are none, or one is out of range.
    """
    if labels.ndim == 1:
        if labels.is_floating_point():
            raise TypeError(f"`labels` (N,) must be class indices, integers, not {labels.dtype}")
        if not len(labels):
            raise ValueError("`labels` are none: a loss needs at least one")
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"`labels` from {low} to {high} do not fit {num_classes} classes")
        targets = F.one_hot(labels.long(), num_classes).to(torch.get_default_dtype())
    else:
        targets = labels
    if loss.smoothing:
        targets = targets * (1 - loss.smoothing) + loss.smoothing / num_classes
    if loss.off_labels == "uniform":
        targets = targets.clamp_min(1 / num_classes)
    if loss.threshold is not None:
        targets = (targets > loss.threshold).to(targets.dtype)
    return targets


def classification_loss(logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """The mean loss of a batch.

    Args:
        logits: (N, num_classes).
        labels: Class indices (N,), or targets (N, num_classes) in [0, 1].
        loss: What is minimised.

    Raises:
        TypeError: If labels (N,) are no integers.
        ValueError: If there are none, one is out of range, or the kind of the loss is that of a model, which is not
            known here.
    """
    if loss.kind == "model":
        raise ValueError("`loss.kind` (='model') must be 'bce' or 'cross_entropy' where no model is known")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # losses in half precision are too coarse
    targets = soft_targets(labels, logits.shape[1], loss).to(logits.dtype)
    if loss.kind == "cross_entropy":
        return F.cross_entropy(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets)
