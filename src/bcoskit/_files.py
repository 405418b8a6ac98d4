"""Tensors with metadata in one file, written whole or not at all."""

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

_KEY = "bcoskit"
UNFINISHED = ".*.partial"  # a pattern of what `unfinished_file` names


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and metadata to `.safetensors` or `.npz`; the file appears complete or not at all.

    Raises:
        ValueError: If the suffix is another one.
    """
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"`path` (={str(path)!r}) must end in .safetensors or .npz")
    # Copies, since one tensor may be a view of another, which a .safetensors file refuses.
    arrays = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(metadata)
    unfinished = unfinished_file(path)
    try:
        if path.suffix == ".safetensors":
            unfinished.write_bytes(save(arrays, {_KEY: text}))
        else:
            named: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
            named[_KEY] = np.array(text)
            with unfinished.open("wb") as file:
                np.savez_compressed(file, **named)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def unfinished_file(path: Path) -> Path:
    """Where a file is written before it takes its place; a short name that no other process has, on any machine."""
    return path.with_name(f".{uuid.uuid4().hex}.partial")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` has written, or any `.safetensors` file; no code in a file is run.

    Returns:
        The tensors, and the metadata (empty if the file has none).

    Raises:
        ValueError: If the file is missing, corrupt or of another format.
    """
    try:
        tensors, text = _read(path)
        metadata = json.loads(text)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except Exception as error:  # damaged and hostile files are answered with nearly every kind of exception
        kind = "npz" if path.suffix == ".npz" else "safetensors"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: is no intact {kind} file ({reason})") from error
    return tensors, metadata if isinstance(metadata, dict) else {}


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors, and the text of the metadata."""
    if not path.is_file():
        raise FileNotFoundError(path)  # of a pipe too, since opening one would wait for its other end
    if path.suffix == ".npz":
        # Numpy leaves the file open where it is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            text = str(arrays[_KEY]) if _KEY in arrays else "{}"
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != _KEY}, text
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY, "{}")
        # Copies, since what is read is the file itself, mapped into memory: it might change.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, text  # noqa: SIM118 - no mapping
