"""Files of weights as they are found: safetensors, and what `torch.save` has written of a network or a training run."""

import pickle
import re
import stat
import threading
import zipfile
from collections import OrderedDict
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
_PACKAGES = tuple(
    f"{package}."
    for package in (
        "bcos collections datetime lightning lightning_fabric numpy omegaconf pathlib pytorch_lightning torch.nn "
        "torch.optim torchvision.transforms"
    ).split()
)
_OBJECTS = frozenset(
    "argparse.Namespace decimal.Decimal functools.partial types.SimpleNamespace".split()
    + [f"builtins.{name}" for name in "bytearray complex dict float frozenset int list range set slice".split()]
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


class _PassedOverList(list[Any]):
    """Stands for a list of another class."""

    def __init__(self, *_args: object, **_keywords: object) -> None:
        super().__init__()

    def __setstate__(self, _state: object) -> None:
        pass


class _PassedOverDict:
    """Makes what stands for a dictionary of another class: torch fills no other kind."""

    def __new__(cls, *_args: object, **_keywords: object) -> OrderedDict[Any, Any]:
        return OrderedDict()


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
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
        as_safetensors = is_file and (path.suffix == ".safetensors" or _looks_like_safetensors(path))
    except (OSError, ValueError) as error:  # of names that cannot be, too
        reason = "no such file" if isinstance(error, FileNotFoundError) else _first_line(error)
        raise WeightsError(f"{path}: {reason}") from error
    if not is_file:
        raise WeightsError(f"{path}: is no file")
    if as_safetensors:
        try:
            return Container(*read_tensors(path))
        except ValueError as error:
            raise WeightsError(str(error)) from error
    content = _load(path)
    if not isinstance(content, dict):
        kind = "another object" if isinstance(content, _PassedOver) else f"a {type(content).__name__}"
        raise WeightsError(f"{path}: holds {kind} instead of weights by name")
    nested = next((name for name in _NESTED if isinstance(content.get(name), dict)), None)
    state = content if nested is None else content[nested]
    strange = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if strange or not state:
        found = f", {strange[0]!r:.80} is none" if strange else ""
        places = ", ".join(_NESTED)
        raise WeightsError(
            f"{path}: holds no state dict, whose values are tensors by name, neither itself nor under {places}{found}"
        )
    return Container({key: _plain(value) for key, value in state.items()}, {}, nested is not None)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without what a file may have put on it."""
    return torch.Tensor.detach(tensor)


def _looks_like_safetensors(path: Path) -> bool:
    """Whether a file begins with the length of a header, and the header's bracket."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _load(path: Path) -> Any:
    try:
        _check_sums(path)
        # For that moment other threads may load what is passed over, too: it does nothing there either.
        with _loading, torch.serialization.safe_globals(_harmless(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return _copied(content)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise WeightsError(f"{path}: is no intact file of weights") from error
        raise WeightsError(_REFUSAL.format(path, named[1])) from error
    except Exception as error:  # damaged files are answered with nearly every kind of exception
        raise WeightsError(f"{path}: is no intact file of weights ({_first_line(error)})") from error


def _check_sums(path: Path) -> None:
    """Torch does not look at the checksums that its files have."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is another one")


def _copied(content: Any) -> Any:
    """Dictionaries as plain ones, whatever a file may have put on them."""
    return {key: _copied(value) for key, value in dict.items(content)} if type(content) is OrderedDict else content


def _harmless(path: Path) -> list[Any]:
    """What of the objects in a file is passed over; the file is refused if there are others."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # a file of an older format, in which weights alone are accepted
        return []
    refused = [name for name in names if name not in _OBJECTS and not name.startswith(_PACKAGES)]
    if refused:
        raise WeightsError(_REFUSAL.format(path, f"{', '.join(sorted(refused)[:3]):.200}"))
    return [(_substitute_of(name), name) for name in names]


def _substitute_of(name: str) -> type:
    kind = name.lower()
    if kind.endswith(("dict", "dictconfig")):
        return _PassedOverDict
    return _PassedOverList if kind.endswith(("list", "deque", "listconfig")) else _PassedOver


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__:.200}"
