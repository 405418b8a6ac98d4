"""Networks in double precision, in which code casts to single precision, or makes tensors of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bcoskit.dynamic._mode import writes

_REINTERPRETING = (Tensor.view,)


class DoublePrecision(TorchFunctionMode):
    """Single precision becomes double: casts, as some norms have, and what code makes or keeps for itself."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        keeps = writes(func, keywords) or getattr(func, "__name__", "") in ("__get__", "__set__")
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        if func not in _REINTERPRETING:
            # What is written to must stay the tensor that the caller has.
            target, args = (args[:1], args[1:]) if keeps else ((), args)
            args = (*target, *map(_doubled, args))
            keywords = {name: value if name == "out" else _doubled(value) for name, value in keywords.items()}
        output = func(*args, **keywords)
        return output if keeps or keywords.get("out") is not None else _doubled(output)


def _doubled(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, str) and value == "torch.FloatTensor":
        return "torch.DoubleTensor"
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, (list, tuple)):
        doubled = [_doubled(each) for each in value]
        if all(new is old for new, old in zip(doubled, value, strict=True)):
            return value
        return getattr(type(value), "_make", type(value))(doubled)  # named tuples take their fields one by one
    return value
