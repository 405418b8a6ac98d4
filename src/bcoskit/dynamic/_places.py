"""Where in a network an operation is called: file, line, and the path of the module."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)


class Places:
    """Finds the caller of an operation among the modules of one network.

    Args:
        model: The network; any other callable has no module paths.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        modules = model.named_modules() if isinstance(model, nn.Module) else ()
        self._paths = {id(module): name for name, module in modules}

    def here(self) -> tuple[str, str]:
        """`file.py:line` of the nearest caller outside torch and this package, and the nearest module's path."""
        location, module = "", None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and (not location or module is None):
            file = frame.f_code.co_filename
            if not location and not file.startswith((_TORCH, _OURS)):
                location = f"{Path(file).name}:{frame.f_lineno}"
            if module is None:
                module = self._paths.get(id(frame.f_locals.get("self")))
            frame = frame.f_back
        return location or "?", module or ""
