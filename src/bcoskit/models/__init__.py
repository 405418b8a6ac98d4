"""Networks by name."""

from bcoskit.models._registry import (
    CIFAR10_CLASSES,
    Loss,
    ModelRow,
    WeightsError,
    create_model,
    list_models,
    model_row,
    save_model,
)

__all__ = [
    "CIFAR10_CLASSES",
    "Loss",
    "ModelRow",
    "WeightsError",
    "create_model",
    "list_models",
    "model_row",
    "save_model",
]
