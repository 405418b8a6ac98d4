"""The one way into the table of rules, and what rules share."""

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit.dynamic._mode import OPERATIONS, RULES, ExplanationMode, Handler, freeze, rule_key

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NAMESPACES = (torch, torch.Tensor, F, vars(torch._C)["_nn"], torch.special, torch.linalg)


def rule(*operations: str | Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Register what operations become inside `explanation_mode`: the extension point for new operations.

    The decorated function takes the operation's arguments and is called in its place when one of them depends
    on the input. It computes the same values by operations that are linear in the input, with its factors
    wrapped in `freeze`; it runs inside the mode, where an operation on frozen arguments stays as it is::

        @bcoskit.rule("cosine_similarity")
        def cosine_similarity(x, y, dim=1, eps=1e-8):
            unit = torch.nn.functional.normalize(freeze(y), dim=dim, eps=eps)
            return (torch.nn.functional.normalize(x, dim=dim, eps=eps) * unit).sum(dim)

    In-place variants (`name_`, and `inplace=True`) of named operations are derived from it.

    Args:
        operations: Names, looked up in `torch`, `torch.Tensor`, `torch.nn.functional`, `torch.special` and
            `torch.linalg`, or the torch functions themselves.

    Returns:
        The decorator, which returns its function unchanged.

    Raises:
        ValueError: If torch has no operation of a name.
    """
    unknown = [name for name in operations if isinstance(name, str) and not functions(name)]
    if unknown:
        raise ValueError(f"`operations` names {unknown[0]!r}, which is no function of torch")

    def register(function: _Function) -> _Function:
        for operation in operations:
            if isinstance(operation, str):
                for known in functions(operation):
                    enter([known], rewrite(_with_inplace_flag(function, known)))
                enter(functions(f"{operation}_"), rewrite(in_place(function)))
            else:
                enter([operation], rewrite(function))
        return function

    return register


def functions(name: str) -> list[Callable[..., Any]]:
    """The torch functions of a name: one operation has several, which all arrive as themselves."""
    found = [getattr(namespace, name, None) for namespace in _NAMESPACES]
    return [function for function in found if callable(function)]


def enter(functions: Iterable[Callable[..., Any]], handler: Handler) -> None:
    for function in functions:
        RULES[rule_key(function)] = handler
        OPERATIONS.add(function)


def rewrite(function: Callable[..., Any]) -> Handler:
    """Call the function in the operation's place, inside the mode, so that its own operations follow the rules."""

    def handle(mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {name: value for name, value in kwargs.items() if name != "input"}
        out = kwargs.get("out")
        with mode:
            if isinstance(out, Tensor):  # torch allows it where nothing is derived
                return out.copy_(function(*args, **{name: value for name, value in kwargs.items() if name != "out"}))
            return function(*args, **kwargs)

    return handle


def in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def write(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.copy_(function(tensor.clone(), *args, **kwargs))

    return write


def _with_inplace_flag(function: Callable[..., Any], operation: Callable[..., Any]) -> Callable[..., Any]:
    # Torch passes the flag by name, a compiler as it was given.
    names = operation.__code__.co_varnames if isinstance(operation, FunctionType) else ()
    position = names.index("inplace") if "inplace" in names else None

    def call(*args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        if position is not None and len(args) > position:
            args, inplace = args[:position], args[position]
        return in_place(function)(*args, **kwargs) if inplace else function(*args, **kwargs)

    return call


def frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return freeze(value)
    if type(value) in (list, tuple):
        return type(value)([frozen(item) for item in value])
    return value
