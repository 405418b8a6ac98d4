"""`compile_explain`: explanations as one compiled program."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bcoskit._checks import check_inputs, untouched
from bcoskit._explain import Explanation, explain
from bcoskit._layers import uncompiled
from bcoskit._targets import Target, picked, select
from bcoskit.dynamic import ProductPolicy, explanation_mode

_TOLERANCE = 1e-2  # a ReLU near 0 may open in one and stay closed in the other


class CompiledExplain(Protocol):
    """What `compile_explain` returns."""

    def __call__(self, x: Tensor, target: Target = None) -> Explanation:
        """Explain a batch; arguments and result as of `explain`."""
        ...


def compile_explain(
    model: nn.Module, *, products: ProductPolicy = "split", backend: str = "inductor"
) -> CompiledExplain:
    """Compile a network's explanation, forward and backward pass together: for many batches of one shape.

    The first batch of each shape is compiled, which takes a while, and its first sample is explained by `explain` as
    well, whose audit is the proof that the network is dynamic linear. The program has one backward pass per target.
    A target that is a function becomes part of the program.

    Args:
        model: A network in evaluation mode with logits (N, K). Its parameters are read at each call.
        products: As of `explain`.
        backend: As of `torch.compile`.

    Returns:
        A function of `x` and `target`, which returns what `explain` does. It raises as `explain`, and `ValueError` if
        W(x) of the first sample is not that of `explain`, which no compiler should do.
    """
    network = uncompiled(model)

    def on_copy(x: Tensor) -> Any:
        return network(x.clone())  # to which the network may write

    explained = explanation_program(on_copy, products)

    def run(x: Tensor, target: Tensor | Callable[[Tensor], Any]) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(target, Tensor):
            return explained(x, target)
        return explained(x, lambda logits: _of_each(target(logits.clone()), logits))  # to which it may write

    program = torch.compile(run, backend=backend, dynamic=False)
    classes_of: dict[tuple[Any, ...], int] = {}

    def compiled(x: Tensor, target: Target = None) -> Explanation:
        check_inputs(network, x)
        key = (*x.shape, x.dtype, x.device)
        classes = classes_of.get(key)
        is_new = classes is None
        if classes is None:
            # Before anything is traced: what raises within that, compilers tell less clearly.
            classes = _checked(network, x, target, products)
        chosen = _largest if target is None else target
        if not callable(chosen):
            chosen = _classes(x.new_zeros(len(x), classes), target)
        start = x.detach().clone()
        try:
            with untouched(x.device), torch.no_grad():
                logits, found, weights = program(start, chosen)
                values = picked(logits, found)
        except Exception:
            if callable(target):  # may give classes that there are not, of which a compiler says something else
                _checked(network, x, target, products)
            raise
        several = found.ndim == 2
        if not bool(logits.isfinite().all() & weights.isfinite().all()):
            raise ValueError("logits or W(x) hold values that are not finite")
        if is_new:
            first = found[:1, 0] if several else found[:1]
            _compare(explain(network, x[:1], first, products=products), weights[:1, 0] if several else weights[:1])
            classes_of[key] = classes
        return Explanation(start, logits, values, found, None, weights, products=products)

    return compiled


def explanation_program(
    network: Callable[..., Any], products: ProductPolicy
) -> Callable[[Tensor, Tensor | Callable[[Tensor], Tensor]], tuple[Tensor, Tensor, Tensor]]:
    """An explanation as a function that can be traced: nothing in it looks at a value.

    Args:
        network: Gives logits (N, K).
        products: As of `explain`.

    Returns:
        A function of the input and of classes (N,) or (N, targets), or of what makes them of the logits, which returns
        logits, classes and W(x).
    """

    def run(x: Tensor, target: Tensor | Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        with explanation_mode(products=products):
            outputs: Any = torch.func.vjp(network, x)
            logits, pull = outputs
            chosen = target if isinstance(target, Tensor) else target(logits)
            columns = chosen.unsqueeze(1) if chosen.ndim == 1 else chosen
            masks = [torch.zeros_like(logits).scatter(1, column.unsqueeze(1), 1.0) for column in columns.unbind(1)]
            rows = [pull(mask)[0] for mask in masks]
        return logits, chosen, rows[0] if chosen.ndim == 1 else torch.stack(rows, 1)

    return run


def _of_each(classes: Any, logits: Tensor) -> Tensor:
    """The classes of each sample, of which there may be one row for all of them."""
    chosen = torch.as_tensor(classes, device=logits.device)
    return chosen.expand(len(logits), *chosen.shape[1:])


def _checked(network: Callable[..., Any], x: Tensor, target: Target, products: ProductPolicy) -> int:
    """How many classes the network has; raises what `explain` raises of the first sample."""
    with untouched(x.device), torch.no_grad():
        output = network(x.clone())
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"`model` has outputs of shape {found}, must have logits (N, K)")
    first = _classes(output, target).flatten()[0]
    explain(network, x[:1], first, products=products)
    return output.shape[1]


def _classes(logits: Tensor, target: Target) -> Tensor:
    _, classes, _ = select(logits, target, None)
    if classes is None:
        raise ValueError(f"`target` (={target!r}) must be a class, or classes, of a compiled explanation")
    return classes


def _largest(logits: Tensor) -> Tensor:
    return logits.argmax(1)


def _compare(expected: Explanation, weights: Tensor) -> None:
    off = float((weights - expected.weights).abs().max() / expected.weights.abs().max())
    if not off < _TOLERANCE:
        raise ValueError(f"the compiled W(x) is not that of `explain`: off by {off:.0e} of its largest entry")
