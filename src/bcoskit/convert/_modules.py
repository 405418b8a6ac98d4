"""What modules hold, and how one takes the place of another."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from bcoskit.nn._base import BcosArguments

Contents: TypeAlias = list[tuple[nn.Module, type[nn.Module], list[tuple[str, Any, Any]]]]

TOLERANCE = 1e-5  # relative, of outputs that must not change
HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def contents(modules: Iterable[nn.Module]) -> Contents:
    """What modules are and hold, with the entries of their tables, which stay the same objects: hooks know them."""
    return [(module, module.__class__, [_entry(*item) for item in vars(module).items()]) for module in modules]


def _entry(name: str, value: Any) -> tuple[str, Any, Any]:
    return name, value, value.copy() if isinstance(value, dict) else None


def restore(before: Contents) -> None:
    """Give modules the contents that they had."""
    for module, kind, held in before:
        module.__class__ = kind
        module.__dict__.clear()
        for name, value, entries in held:
            if entries is not None:
                value.clear()
                value.update(entries)
            module.__dict__[name] = value


def take_place(new: nn.Module, old: nn.Module) -> None:
    """Give a new module the mode and the hooks of the one in whose place it comes."""
    kept = set(old.modules())
    for part in new.modules():
        if part not in kept:
            part.training = old.training
    if old in set(new.modules()):  # it goes on being called, with its hooks
        return
    for name in HOOKS:
        vars(new)[name] = vars(new)[name] or vars(old)[name]


def is_bcos(module: nn.Module) -> bool:
    return isinstance(module, BcosArguments)


def is_skipped(path: str, skip: tuple[str, ...]) -> bool:
    """Whether a module, or one that it is in, stays as it is."""
    parts = path.split(".") if path else []
    above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(fnmatchcase(each, pattern) for each in above for pattern in skip)
