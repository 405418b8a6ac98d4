"""Networks in double precision, in which code casts to single precision."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DoublePrecision(TorchFunctionMode):
    """Casts to single precision, as some norms have, leave double precision as it is."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if func in (Tensor.float, Tensor.to, Tensor.type) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(map(_not_single, args))
            keywords = {name: _not_single(value) for name, value in keywords.items()}
        return func(*args, **keywords)


def _not_single(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
