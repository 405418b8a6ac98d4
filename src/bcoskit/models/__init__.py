"""Networks by name."""

from bcoskit.models._containers import WeightsError
from bcoskit.models._hub import from_pretrained, push_to_hub, save_pretrained
from bcoskit.models._network import Network
from bcoskit.models._registry import create_model, list_models, model_row, save_model
from bcoskit.models._row import CIFAR10_CLASSES, Checkpoint, Loss, ModelRow

__all__ = [
    "CIFAR10_CLASSES",
    "Checkpoint",
    "Loss",
    "ModelRow",
    "Network",
    "WeightsError",
    "create_model",
    "from_pretrained",
    "list_models",
    "model_row",
    "push_to_hub",
    "save_model",
    "save_pretrained",
]
