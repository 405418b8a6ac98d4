"""B-cos networks: inherently interpretable networks whose explanations are exact."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bcoskit import convert, data, functional, models, nn, viz
    from bcoskit._audit import AuditReport, audit
    from bcoskit._compile_explain import compile_explain
    from bcoskit._explain import Explanation, explain
    from bcoskit._fuse import fuse
    from bcoskit.convert import BcosConfig, bcosify, set_b
    from bcoskit.data import ImageTransform, decode, encode, read_image
    from bcoskit.dynamic import NotLinearError, explanation_mode, freeze, rule
    from bcoskit.export import export_onnx
    from bcoskit.models import create_model, from_pretrained, list_models, push_to_hub, save_model, save_pretrained

__all__ = [
    "AuditReport",
    "BcosConfig",
    "Explanation",
    "ImageTransform",
    "NotLinearError",
    "__version__",
    "audit",
    "bcosify",
    "compile_explain",
    "convert",
    "create_model",
    "data",
    "decode",
    "encode",
    "explain",
    "explanation_mode",
    "export_onnx",
    "freeze",
    "from_pretrained",
    "functional",
    "fuse",
    "list_models",
    "models",
    "nn",
    "push_to_hub",
    "read_image",
    "rule",
    "save_model",
    "save_pretrained",
    "set_b",
    "viz",
]

# Torch takes a second to import: nothing is loaded before it is used.
_HOMES = {
    "AuditReport": "_audit",
    "BcosConfig": "convert",
    "Explanation": "_explain",
    "ImageTransform": "data",
    "NotLinearError": "dynamic",
    "audit": "_audit",
    "bcosify": "convert",
    "compile_explain": "_compile_explain",
    "create_model": "models",
    "decode": "data",
    "encode": "data",
    "explain": "_explain",
    "explanation_mode": "dynamic",
    "export_onnx": "export",
    "freeze": "dynamic",
    "from_pretrained": "models",
    "fuse": "_fuse",
    "list_models": "models",
    "push_to_hub": "models",
    "read_image": "data",
    "rule": "dynamic",
    "save_model": "models",
    "save_pretrained": "models",
    "set_b": "convert",
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
