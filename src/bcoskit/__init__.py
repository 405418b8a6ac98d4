"""B-cos networks: inherently interpretable networks whose explanations are exact."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bcoskit import data, functional, models, nn, viz
    from bcoskit._audit import AuditReport, audit
    from bcoskit._explain import Explanation, explain
    from bcoskit.data import ImageTransform, decode, encode, read_image
    from bcoskit.dynamic import NotLinearError, explanation_mode, freeze, rule
    from bcoskit.models import create_model, list_models, save_model

__all__ = [
    "AuditReport",
    "Explanation",
    "ImageTransform",
    "NotLinearError",
    "__version__",
    "audit",
    "create_model",
    "data",
    "decode",
    "encode",
    "explain",
    "explanation_mode",
    "freeze",
    "functional",
    "list_models",
    "models",
    "nn",
    "read_image",
    "rule",
    "save_model",
    "viz",
]

# Torch takes a second to import: nothing is loaded before it is used.
_HOMES = {
    "AuditReport": "_audit",
    "Explanation": "_explain",
    "ImageTransform": "data",
    "NotLinearError": "dynamic",
    "audit": "_audit",
    "create_model": "models",
    "decode": "data",
    "encode": "data",
    "explain": "_explain",
    "explanation_mode": "dynamic",
    "freeze": "dynamic",
    "list_models": "models",
    "read_image": "data",
    "rule": "dynamic",
    "save_model": "models",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("bcoskit")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"bcoskit.{_HOMES[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"bcoskit.{name}")
    else:
        raise AttributeError(f"module 'bcoskit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
