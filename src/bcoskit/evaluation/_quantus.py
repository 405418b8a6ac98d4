"""`W(x)·x` for metrics of Quantus."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bcoskit._devices import device_of
from bcoskit._explain import explain


def quantus_explain(
    model: nn.Module, inputs: npt.ArrayLike, targets: npt.ArrayLike, **_: Any
) -> npt.NDArray[np.floating[Any]]:
    """The contributions of all entries, as a function that metrics of Quantus take for `explain_func`.

    Args:
        model: A network in evaluation mode.
        inputs: Inputs (N, *shape).
        targets: Classes (N,).

    Returns:
        Contributions (N, *shape). They add up to the logit, but for the share of constants.

    Raises:
        ValueError: As `bcoskit.explain`.
    """
    device = device_of(model)
    dtype = next(model.parameters(), torch.empty(0)).dtype
    x = torch.as_tensor(np.asarray(inputs)).to(device, dtype)
    classes = torch.as_tensor(np.asarray(targets)).to(device, torch.int64)
    found = explain(model, x, classes)
    return (found.weights * found.x).cpu().numpy()
