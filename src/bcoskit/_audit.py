"""Is a network dynamic linear at an input, and if not, where? Three audits, none of which trusts another.

The *graph audit* walks the autograd graph behind an output: only linear operations may be there, and bilinear ones
with one factor that depends on the input. The *numeric audit* differentiates `W(x)`: what is frozen has a gradient
of exactly 0. *Completeness* compares the output, in float64, with `W(x)·x` plus the constants of every operation.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit._checks import check_initialized, check_inputs, untouched
from bcoskit._double import DoublePrecision
from bcoskit._explain import explain
from bcoskit._layers import in_double_precision, run_between, uncompiled
from bcoskit._linear_map import Layers, entry
from bcoskit._targets import Target
from bcoskit.dynamic import NotLinearError, ProductPolicy, explanation_mode
from bcoskit.dynamic._graph import HIDDEN, LocatingMode, Violation, violations
from bcoskit.dynamic._interactions import interaction
from bcoskit.dynamic._places import Places

__all__ = ["AuditReport", "Violation", "audit", "weights_gradient"]

RESIDUAL_BOUND = 1e-10


@dataclass(frozen=True)
class AuditReport:
    """What the three audits found.

    Attributes:
        offenders: The operations that are not linear in the input, or make samples depend on each other, or draw random
            numbers, or decide by values of the input in Python, or leave nothing to explain; empty if the graph audit
            passed.
        forward: Largest difference between the outputs inside and outside `explanation_mode`, relative to the largest
            output.
        numeric: Largest absolute derivative of `W(x)` with respect to `x` with its factors frozen: exactly 0 if the
            numeric audit passed, NaN if an operation has no second derivative.
        residual: Largest relative residual of `value = Σ W(x)·x + Σ shares` in float64; NaN if the graph audit
            failed, since there is no `W(x)` then.
        shares: The constants' shares of the values by parameter or operation, summed over the samples.
        products: The policy for products of two input-dependent factors.
    """

    offenders: tuple[Violation, ...]
    forward: float
    numeric: float
    residual: float
    shares: Mapping[str, float]
    products: ProductPolicy

    @property
    def passed(self) -> bool:
        """Whether all audits passed."""
        return (
            not self.offenders
            and self.numeric == 0
            and self.forward <= RESIDUAL_BOUND
            and self.residual <= RESIDUAL_BOUND
        )


def audit(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    *,
    from_layer: str | None = None,
    to_layer: str | None = None,
    products: ProductPolicy = "split",
) -> AuditReport:
    """Prove that a network is dynamic linear at inputs, or name the operations that are not.

    The work is done by a copy of the network in float64, whose casts to float32 are left out.

    Args:
        model: A network in evaluation mode.
        x: Inputs (N, *shape).
        target: As of `bcoskit.explain`.
        from_layer: As of `bcoskit.explain`.
        to_layer: As of `bcoskit.explain`.
        products: As of `bcoskit.explanation_mode`.

    Returns:
        The report.

    Raises:
        TypeError: As `bcoskit.explain`.
        ValueError: As `bcoskit.explain`; also if `W(x)` is 0 altogether, where every audit would pass in vain.
    """
    check_inputs(model, x, indices=from_layer is not None)
    original = uncompiled(model)
    if not isinstance(original, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}: a function cannot be copied")
    if any(isinstance(module, torch.jit.ScriptModule) for module in original.modules()):
        raise ValueError("`model` has a compiled script, whose operations nobody sees: audit what it was made from")
    for path, module in original.named_modules():
        check_initialized(path, module)
    layers = (from_layer, to_layer)
    network, inputs = in_double_precision(original), x.double() if x.is_floating_point() else x
    with DoublePrecision():
        return _audited(network, inputs, target, layers, products)


def _audited(
    network: nn.Module, inputs: Tensor, target: Target, layers: Layers, products: ProductPolicy
) -> AuditReport:
    mode = LocatingMode(network, products)
    with untouched(inputs.device), mode:
        _, output = run_between(network, inputs, entry(mode), *layers)
        refused = {offender.place for offender in mode.unseen if offender.node == "refused"}
        of_graph = (offender for offender in violations(output, mode) if offender.place not in refused)
        offenders = tuple(dict.fromkeys((*of_graph, *mode.unseen)))
    if not output.requires_grad and mode.ending is not None:
        offenders += (mode.ending,)
    with untouched(inputs.device):
        dependent = interaction(network, inputs, lambda x: run_between(network, x, Tensor.clone, None, layers[1])[1])
    offenders += () if dependent is None else (dependent,)
    forward = _difference(output.detach(), network, inputs, layers)
    numeric = weights_gradient(network, inputs, layers, products=products)
    if offenders:
        return AuditReport(offenders, forward, numeric, float("nan"), {}, products)
    from_layer, to_layer = layers
    explanation = explain(
        network, inputs, target, from_layer=from_layer, to_layer=to_layer, products=products, shares=True
    )
    if not bool(explanation.weights.any()):
        raise ValueError("W(x) is 0 for every input: the signal has died, and no audit of it means anything")
    assert explanation.residual is not None
    shares = {name: float(share.sum()) for name, share in (explanation.shares or {}).items()}
    report = AuditReport((), forward, numeric, float(explanation.residual.abs().max()), shares, products)
    return report if report.passed else replace(report, offenders=(_hidden(network, report),))


def _hidden(network: nn.Module, report: AuditReport) -> Violation:
    """What is told where an audit failed, and no operation was seen to be wrong."""
    if report.numeric != 0:
        what = "W(x) changes with x where its factors are frozen"
    elif not report.forward <= RESIDUAL_BOUND:
        what = "outputs are others inside of the explanation"
    else:
        what = "contributions and constants do not add up to the output"
    return Violation("hidden", "?", *(Places(network).of(network) or ("?", "")), reason=f"{HIDDEN}: {what}")


def _difference(output: Tensor, network: nn.Module, x: Tensor, layers: Layers) -> float:
    with untouched(x.device), torch.no_grad():
        _, plain = run_between(network, x, Tensor.clone, *layers)
    return float((output - plain).abs().max() / plain.abs().max().clamp_min(torch.finfo(plain.dtype).tiny))


def weights_gradient(
    model: Callable[..., Any], x: Tensor, layers: Layers = (None, None), *, products: ProductPolicy = "split"
) -> float:
    """The numeric audit: the largest absolute entry of `∂⟨W(x), v⟩/∂x` for a fixed random `v`.

    With every factor frozen, `W(x)` has no gradient path to `x`, and the result is exactly 0, not merely small.

    Args:
        model: The network, in evaluation mode.
        x: Inputs (N, *shape).
        layers: Where `W(x)` starts and ends, None for the input and the output.
        products: As of `bcoskit.explanation_mode`.

    Returns:
        The largest entry; NaN if an operation that is not frozen has no second derivative.
    """
    with untouched(x.device), explanation_mode(products=products) as mode:
        generator = torch.Generator().manual_seed(0)
        try:
            start, output = run_between(model, x, entry(mode), *layers)
            (weights,) = torch.autograd.grad(output.sum(), start, create_graph=True)
            if not weights.requires_grad:
                return 0.0
            direction = torch.randn(weights.shape, generator=generator, dtype=weights.dtype).to(weights.device)
            gradients: Any = torch.autograd.grad((weights * direction).sum(), start, allow_unused=True)
        except (RuntimeError, NotLinearError):
            return float("nan")
    gradient: Tensor | None = gradients[0]
    return 0.0 if gradient is None else float(gradient.abs().max())
