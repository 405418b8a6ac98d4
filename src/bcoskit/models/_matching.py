"""Which tensor of a file is which weight of a network, in our names or in the authors'."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bcoskit.models._containers import Container
from bcoskit.models._network import Network
from bcoskit.nn._base import BcosArguments

# What training code puts before the keys.
_PREFIXES = ("model.", "module.", "_orig_mod.", "module._orig_mod.", "model.module.", "model._orig_mod.", "")
_AVERAGED = "ema.module."
_LISTED = 3


@dataclass(frozen=True)
class Match:
    """Weights of a network from a file.

    Attributes:
        tensors: By our keys; of the shapes in the file, except for layouts that differ between us and the authors.
        fault: Why they are not all weights of the network, in words that follow "it"; None if they are.
    """

    tensors: dict[str, Tensor]
    fault: str | None


def authors_keys(network: Network, prefix: str = "") -> dict[str, str]:
    """From the authors' keys of a network to ours.

    Their layers keep the weight in a layer inside, `linear`, and some parts have other names.

    Args:
        network: The network.
        prefix: Before all of their keys.

    Returns:
        Their keys, in the order of ours.
    """
    transforms = {name for name, module in network.named_modules() if isinstance(module, BcosArguments)}
    renames = network.authors_renames()
    keys: dict[str, str] = {}
    for key in network.state_dict():
        path, _, name = key.rpartition(".")
        theirs = f"{path}.linear.{name}" if path in transforms else key
        for pattern, replacement in renames:
            theirs = re.sub(pattern, replacement, theirs)
        keys[prefix + theirs] = key
    return keys


def match(container: Container, network: Network, prefix: str, *, fresh: tuple[str, ...] = ()) -> Match:
    """Find a network's weights in a file.

    Args:
        container: The file.
        network: The network, which may be on the meta device.
        prefix: Before the authors' keys.
        fresh: Paths of parts whose weights are not wanted.

    Returns:
        The weights, and what is wrong with them.
    """
    expected = network.state_dict()
    stripped, names, strip = _best_names(container.tensors, network, prefix)
    if not stripped:
        first = next(iter(container.tensors), "none")
        return Match({}, f"has no weights of this network (its first key is {first!r:.80})")
    rest = [] if container.of_training and strip else [key for key in container.tensors if not key.startswith(strip)]
    unknown = [key for key in stripped if key not in names] + rest
    optional = network.optional_path
    if optional is not None and not any(_inside(names.get(key, ""), (optional,)) for key in stripped):
        fresh = (*fresh, optional)
    absent = {key: ours for key, ours in names.items() if key not in stripped and not _inside(ours, fresh)}
    # Files from before torch 0.4.1 have no such counters, which torch's own layers then take for 0.
    tensors = {ours: torch.zeros_like(expected[ours], device="cpu") for ours in absent.values() if _is_counter(ours)}
    missing = [key for key, ours in absent.items() if not _is_counter(ours)]
    faults = [_listed("lacks weights", missing), _listed("has unknown weights", unknown)]
    for key, ours in names.items():
        if key in stripped and not _inside(ours, fresh):
            usable = _kind_fault(key, stripped[key])
            if usable is not None:
                faults.append(usable)
                continue
            tensors[ours] = network.from_authors(ours, stripped[key])
            faults.append(_fault(key, tensors[ours], stripped[key], expected[ours]))
    found = [fault for fault in faults if fault is not None]
    more = f" and has {len(found) - _LISTED} more faults" if len(found) > _LISTED else ""
    return Match(tensors, ", it ".join(found[:_LISTED]) + more if found else None)


def rows_of(container: Container, network: Network, prefix: str, key: str) -> int | None:
    """How many rows a weight has in the file, None if it is not there."""
    stripped, names, _ = _best_names(container.tensors, network, prefix)
    theirs = next((name for name, ours in names.items() if ours == key), None)
    tensor = None if theirs is None else stripped.get(theirs)
    return None if tensor is None or not tensor.ndim else len(tensor)


def _best_names(
    tensors: Mapping[str, Tensor], network: Network, prefix: str
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """The names under which most of the file's keys are known: keys without what is before them, names, and that."""
    best: tuple[dict[str, Tensor], dict[str, str], str] = ({}, {}, "")
    known = 0
    # An averaged copy comes before the network itself, as in timm.
    prefixes = (_AVERAGED,) if any(key.startswith(_AVERAGED) for key in tensors) else _PREFIXES
    for names in ({key: key for key in network.state_dict()}, authors_keys(network, prefix)):
        for strip in prefixes:
            stripped = {key.removeprefix(strip): tensor for key, tensor in tensors.items() if key.startswith(strip)}
            count = len(stripped.keys() & names.keys())
            if count > known:
                best, known = (stripped, names, strip), count
    return best


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _inside(key: str, paths: tuple[str, ...]) -> bool:
    return any(key.startswith(f"{path}.") for path in paths)


def _listed(what: str, keys: list[str]) -> str | None:
    if not keys:
        return None
    listed = ", ".join(f"{key!r:.80}" for key in sorted(keys)[:_LISTED])
    return f"{what}: {listed}" + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")


def _kind_fault(key: str, tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return f"has `{key}` as a tensor of another kind than a dense one"
    return None


def _fault(key: str, tensor: Tensor, found: Tensor, needed: Tensor) -> str | None:
    if tensor.shape != needed.shape:
        return f"has `{key}` of shape {tuple(found.shape)} instead of {tuple(needed.shape)}"
    if tensor.is_floating_point() != needed.is_floating_point() or tensor.is_complex():
        return f"has `{key}` of dtype {tensor.dtype} instead of {needed.dtype}"
    # As the network would hold it: a large number may be finite in double precision only.
    if not bool(torch.isfinite(tensor.to(needed.dtype)).all()):
        return f"has values in `{key}` that are not finite"
    if key.endswith("running_var") and bool((tensor < 0).any()):
        return f"has variances in `{key}` that are negative"
    return None
