"""Where in a network an operation is called: file, line, and the path of the module."""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent) + os.sep
_TORCH_LAYERS = str(Path(nn.__file__).parent / "modules") + os.sep
_OURS = str(Path(__file__).parent) + os.sep
# What calls the network, or stands around it.
_RUNNERS = tuple(
    str(Path(__file__).parents[1].joinpath(*parts)) for parts in (["_layers.py"], ["convert", "_input.py"])
)
_NO_LAYERS = ("module.py", "container.py")


class Places:
    """Finds the caller of an operation among the modules of one network.

    Args:
        model: The network; any other callable has no module paths.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        self._paths = {id(module): name for name, module in modules}

    def here(self, called: nn.Module | None = None) -> tuple[str, str]:
        """`file.py:line` of the nearest caller in the network's code, or in a layer of torch, and the module's path.

        Args:
            called: A module that has not begun to run yet, whose caller is looked for.
        """
        location, path, _ = self._nearest(called)
        return location, path

    def of(self, module: nn.Module) -> tuple[str, str] | None:
        """Where the forward pass of a module is written, and its path; None if it is none of the network's."""
        path = self._paths.get(id(module))
        if path is None:
            return None
        code = getattr(type(module).forward, "__code__", None)
        return ("?" if code is None else f"{Path(code.co_filename).name}:{code.co_firstlineno}"), path

    def applied(self) -> dict[str, tuple[str, str]]:
        """Where the custom function of autograd was called that runs now, by its name; empty if none is seen to."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            first = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
            if isinstance(first, torch.autograd.function.BackwardCFunction) and frame.f_back is not None:
                return {type(first).__name__.removesuffix("Backward"): self._nearest(begin=frame.f_back)[:2]}
            frame = frame.f_back
        return {}

    def name_of_number(self, values: Iterable[Any]) -> str:
        """The path of the nearest module, with the attribute in which it keeps one of the values, if there is one."""
        _, path, module = self._nearest()
        attributes = vars(module) if module is not None else {}
        kept = [name for name, value in attributes.items() if any(value is number for number in values)]
        return f"{path}.{kept[0]}" if kept else ""

    def _nearest(self, called: nn.Module | None = None, begin: FrameType | None = None) -> tuple[str, str, Any]:
        location, in_torch, path, module = "", "", None, None
        frame: FrameType | None = begin or sys._getframe(2)
        while frame is not None and (not location or path is None):
            file = frame.f_code.co_filename
            here = f"{Path(file).name}:{frame.f_lineno}"
            if file.startswith(_TORCH_LAYERS) and not file.endswith(_NO_LAYERS):
                in_torch = in_torch or here
            elif file in _RUNNERS and in_torch:  # torch's layers and containers are all that there is
                location = location or in_torch
            elif not location and not file.startswith((_TORCH, _OURS, *_RUNNERS)):
                location = here
            if path is None:
                module = frame.f_locals.get("self")
                path = None if module is called else self._paths.get(id(module))
            frame = frame.f_back
        return location or "?", path or "", module if path is not None else None
