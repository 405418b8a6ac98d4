"""`W(x)·x` for metrics of Quantus."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bcoskit.evaluation._methods import attribute


def quantus_explain(
    model: nn.Module, inputs: npt.ArrayLike, targets: npt.ArrayLike, *, method: Any = "bcos", **_: Any
) -> npt.NDArray[Any]:
    """Contributions as a function that metrics of Quantus take for `explain_func`.

    Args:
        model: A network in evaluation mode.
        inputs: Inputs (N, C, H, W).
        targets: Classes (N,).
        method: Attribution method, see `attribute`.

    Returns:
        Contributions (N, 1, H, W).

    Raises:
        ValueError: As `attribute`.
    """
    parameter = next(model.parameters())
    x = torch.as_tensor(np.asarray(inputs)).to(parameter.device, parameter.dtype)
    classes = torch.as_tensor(np.asarray(targets)).to(parameter.device, torch.int64)
    return attribute(model, x, classes, method)[:, None].cpu().numpy()
