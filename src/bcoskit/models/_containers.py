"""Files of weights as they are found: safetensors, and what `torch.save` has written of a network or a training run."""

import pickle
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bcoskit._files import read_tensors


class WeightsError(ValueError):
    """A file of weights that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Container:
    """What a file of weights holds.

    Attributes:
        tensors: By the file's own keys.
        description: What `save_model` has written beside them; empty for other files.
        of_training: Whether it is a training run's, which holds more than the network.
    """

    tensors: Mapping[str, Tensor]
    description: Mapping[str, Any]
    of_training: bool = False


# Where training code keeps the state dict of the network.
_NESTED = ("state_dict", "model_state_dict", "the_model", "model")

# Training checkpoints hold configurations beside weights: instances of these packages, which are passed over.
# What they would do is never done; and a file that names anything else is refused.
_PASSED_OVER = (
    "argparse.Namespace",
    "bcos.",
    "functools.partial",
    "lightning.",
    "lightning_fabric.",
    "numpy.",
    "omegaconf.",
    "pathlib.",
    "pytorch_lightning.",
    "torch.nn.modules.",
    "torch.optim.",
    "torchvision.transforms.",
)
_REFUSAL = "{}: is refused, since it would run code when it is loaded: {}"
_loading = threading.Lock()


class _PassedOver:
    """Stands for an object of a configuration, without any of its behaviour."""

    def __new__(cls, *_args: object, **_keywords: object) -> "_PassedOver":
        return super().__new__(cls)

    def __init__(self, *_args: object, **_keywords: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass


def read_container(path: Path) -> Container:
    """Read a file of weights; no code in it is run.

    Args:
        path: A `.safetensors` file, or one that `torch.save` has written: a state dict, or a dictionary with one
            under `state_dict`, `model_state_dict`, `the_model` or `model`.

    Returns:
        Its tensors, and what is said of them.

    Raises:
        WeightsError: If the file is missing or damaged, would run code, or holds no tensors by name.
    """
    if path.suffix == ".safetensors":
        try:
            return Container(*read_tensors(path))
        except ValueError as error:
            raise WeightsError(str(error)) from error
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    content = _load(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__} instead of weights by name")
    nested = next((name for name in _NESTED if isinstance(content.get(name), Mapping)), None)
    tensors = content if nested is None else content[nested]
    strange = [key for key, value in tensors.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange or not tensors:
        found = f", {strange[0]!r:.80} is none" if strange else ""
        raise WeightsError(f"{path}: holds no state dict, whose values are tensors by name{found}")
    return Container(dict(tensors), {}, nested is not None)


def _load(path: Path) -> Any:
    try:
        with _loading, torch.serialization.safe_globals(_harmless(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise WeightsError(f"{path}: is no intact file of weights") from error
        raise WeightsError(_REFUSAL.format(path, named[1])) from error
    except Exception as error:  # damaged files are answered with nearly every kind of exception
        raise WeightsError(f"{path}: is no intact file of weights ({_first_line(error)})") from error


def _harmless(path: Path) -> list[Any]:
    """What of the objects in a file is passed over; the file is refused if there are others."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # a file of an older format, in which weights alone are accepted
        return []
    refused = [name for name in names if not name.startswith(_PASSED_OVER)]
    if refused:
        raise WeightsError(_REFUSAL.format(path, f"{', '.join(sorted(refused)[:3]):.200}"))
    return [(_PassedOver, name) for name in names]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__:.200}"
