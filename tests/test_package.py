"""The package as a whole: what it imports and when, and its public names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bcoskit

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bcoskit"
HEAVY = {"torch", "numpy", "PIL", "lightning", "matplotlib", "rich", "timm", "torchvision"}

ONLY_IN = {
    "captum": {"evaluation"},
    "fastapi": {"app"},
    "gradio": {"app"},
    "lightning": {"training"},
    "matplotlib": {"evaluation"},
    "onnx": {"export"},
    "onnx_ir": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "skimage": {"evaluation"},
    "sklearn": {"evaluation"},
    "starlette": {"app"},
    "torchmetrics": {"evaluation", "training"},
    "uvicorn": {"app"},
}

# From the bottom to the top: a module imports from its own level and from below.
LEVELS = [
    {"data", "viz", "_devices", "_files", "_fingerprint", "_processes", "_random", "_text"},
    {"dynamic"},
    {"_double", "_passes"},
    {"functional"},
    {"nn", "_checks", "_layers", "_probabilities", "_targets"},
    {"_fuse", "convert"},
    {"_trust", "_linear_map"},
    {"_explain", "models"},
    {"_audit", "_compile_explain", "evaluation", "gallery", "training", "_command_pictures"},
    {"export"},
    {"app", "_command_audit", "_command_evaluate", "_command_export", "_command_models", "_command_report"},
    {"_command_app", "_command_explain"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: height for height, names in enumerate(LEVELS) for name in names}


def loaded(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_loads_nothing_heavy():
    assert not HEAVY & loaded("import bcoskit")
    assert not {"torch", "lightning", "numpy"} & loaded("import bcoskit.cli")
    assert "torch" in loaded("import bcoskit; bcoskit.encode")


def test_public_names():
    assert set(dir(bcoskit)) == set(bcoskit.__all__)
    for name in bcoskit.__all__:
        value = getattr(bcoskit, name)
        assert name == "__version__" or value.__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bcoskit.nothing  # noqa: B018 - the access is what raises
    importlib.import_module("bcoskit._explain")  # a submodule must not take a function's name

    assert callable(bcoskit.explain)
    assert callable(bcoskit.audit)


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            if node.module == "bcoskit":
                names.update(f"bcoskit.{alias.name}" for alias in node.names if alias.name != "__version__")
    return names


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_one_way(file):
    relative = file.relative_to(SOURCE)
    part = relative.parts[0].removesuffix(".py")
    names = imported(file)
    packages = {name.split(".")[0] for name in names}
    assert "bcos" not in packages
    for package, parts in ONLY_IN.items():
        assert package not in packages or part in parts
    if part not in LEVEL:
        assert part in {"__init__", "assets"}
        return
    ours = {name.split(".")[1] for name in names if name.startswith("bcoskit.")}
    assert all(LEVEL[name] <= LEVEL[part] for name in ours), ours
    if part in {"data", "viz"}:
        assert ours <= {part}
