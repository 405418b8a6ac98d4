"""Training on Lightning; the only part of the package that imports it."""

from bcoskit.training._align import align
from bcoskit.training._finetune import FineTuning
from bcoskit.training._guidance import energy_loss, l1_loss, matching_loss, right_reasons_loss
from bcoskit.training._losses import classification_loss, soft_targets
from bcoskit.training._options import Augmentation, Hardware, Loading, Loss, Optimization
from bcoskit.training._run import train

__all__ = [
    "Augmentation",
    "FineTuning",
    "Hardware",
    "Loading",
    "Loss",
    "Optimization",
    "align",
    "classification_loss",
    "energy_loss",
    "l1_loss",
    "matching_loss",
    "right_reasons_loss",
    "soft_targets",
    "train",
]
