"""Tensors with metadata in one file, written whole or not at all."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

_KEY = "bcoskit"
UNFINISHED = ".*.partial"  # a pattern of the names that `whole_file` gives


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
    with whole_file(path) as unfinished:
        if path.suffix == ".safetensors":
            unfinished.write_bytes(save(arrays, {_KEY: text}))
        else:
            named: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
            named[_KEY] = np.array(text)
            with unfinished.open("wb") as file:
                np.savez_compressed(file, **named)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where a file is written that takes its place when that is done; if it fails, what was there before stays.

    A short name beside it, which no other process has, on any machine; errors tell that of the file.

    Raises:
        OSError: If it cannot be written.
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        # Of a full disk no file is named.
        if error.strerror is not None and (error.filename is None or str(error.filename) == str(unfinished)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


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
