"""Tensors with metadata in one file, written whole or not at all."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

_KEY = "bcoskit"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write tensors and metadata to `.safetensors` or `.npz`; the file appears complete or not at all.

    Raises:
        ValueError: If the suffix is another one.
    """
    arrays = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(metadata)
    if path.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"`path` (={str(path)!r}) must end in .safetensors or .npz")
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            unfinished.write_bytes(save(arrays, {_KEY: text}))
        else:
            with unfinished.open("wb") as file:
                named: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
                np.savez_compressed(file, **named, **{_KEY: np.array(text)})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` has written, or any `.safetensors` file; no code in a file is run.

    Returns:
        The tensors, and the metadata (empty if the file has none).

    Raises:
        ValueError: If the file is missing, corrupt or of another format.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                text = str(arrays[_KEY]) if _KEY in arrays else "{}"
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != _KEY}
        else:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                text = (file.metadata() or {}).get(_KEY, "{}")
        metadata = json.loads(text)
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        EOFError,
        RecursionError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"{path}: is no intact {path.suffix.lstrip('.')} file ({error})") from error
    return tensors, metadata if isinstance(metadata, dict) else {}
