"""`W(x)·x` for code that is written for captum."""

from typing import Any

from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from bcoskit._explain import explain


class BcosAttribution(Attribution):
    """`W(x)·x` as an attribution of captum: entry by entry, in the shape of the input.

        BcosAttribution(model).attribute(x, target=3)

    Args:
        forward_func: A network in evaluation mode.
    """

    def __init__(self, forward_func: nn.Module) -> None:
        super().__init__(forward_func)

    @log_usage()  # captum's own attributions that wrap others ask for what it adds
    def attribute(self, inputs: Tensor, target: Any = None) -> Tensor:  # type: ignore[override]
        """The contributions of all entries.

        Args:
            inputs: Inputs (N, *shape).
            target: One class for all samples, or one per sample; None for each sample's largest logit.

        Returns:
            (N, *shape). They add up to the logit, but for the share of constants.

        Raises:
            ValueError: As `bcoskit.explain`.
        """
        found = explain(self.forward_func, inputs.detach(), target)
        return found.weights * found.x

    def has_convergence_delta(self) -> bool:
        """False: what is left of the logit is not an error but the share of the constants (`explain(shares=True)`)."""
        return False
