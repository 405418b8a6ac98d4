"""Networks without values: their structure alone, before weights are made or loaded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAKERS = frozenset({torch.arange, torch.empty, torch.full, torch.ones, torch.rand, torch.tensor, torch.zeros})
_FILLS = frozenset(getattr(Tensor, name) for name in "add_ clamp_ erfinv_ fill_ mul_ normal_ uniform_ zero_".split())


class WithoutValues(TorchFunctionMode):
    """What is built in this context has shapes and no values, takes no memory, and is not initialised.

    As `torch.device("meta")`, but for the initialisation, which takes most of the time there.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Make tensors without values, and leave those as they are."""
        kwargs = kwargs or {}
        if func in _MAKERS:
            if kwargs.get("device") is None:
                kwargs["device"] = "meta"
        elif func in _FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)
