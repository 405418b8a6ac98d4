"""`W(x)·x` for code that is written for captum."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from captum.attr import Attribution
from torch import nn

from bcoskit._explain import explain

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")


def _unwrappable(function: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """The function, with a `__wrapped__`, which captum's attributions that wrap others call."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Returned:
        return function(*args, **kwargs)

    return call


class BcosAttribution(Attribution):
    """`W(x)·x` as an attribution of captum: entry by entry, in the shape of the input.

        BcosAttribution(model).attribute(x, target=3)

    Args:
        forward_func: A network in evaluation mode.
    """

    def __init__(self, forward_func: nn.Module) -> None:
        super().__init__(forward_func)

    @_unwrappable
    def attribute(self, inputs: Any, target: Any = None) -> Any:
        """The contributions of all entries.

        Args:
            inputs: Inputs (N, *shape), or a tuple of one such tensor, as captum allows.
            target: One class for all samples, or one per sample; None for each sample's largest logit.

        Returns:
            (N, *shape), in a tuple if the inputs are. They add up to the logit, but for the share of constants.

        Raises:
            ValueError: As `bcoskit.explain`.
        """
        if isinstance(inputs, tuple):
            if len(inputs) != 1:
                raise ValueError(f"`inputs` holds {len(inputs)} tensors, an explanation is of one")
            return (self.attribute(inputs[0], target),)
        found = explain(self.forward_func, inputs.detach(), target)
        return found.weights * found.x

    def has_convergence_delta(self) -> bool:
        """False: what is left of the logit is not an error but the share of the constants (`explain(shares=True)`)."""
        return False
