"""The linear map behind an explanation: a pass with frozen factors, its rows W(x), and the shares of its constants."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bcoskit._checks import check_channel_dim, check_output, untouched
from bcoskit._layers import run_between
from bcoskit._targets import Target, Versus, select
from bcoskit.dynamic import ExplanationMode, NotLinearError, ProductPolicy
from bcoskit.dynamic._constants import ConstantsMode
from bcoskit.dynamic._graph import LocatingMode, Violation, violations

Layers = tuple[str | None, str | None]


@dataclass(frozen=True)
class Task:
    """What is to be explained."""

    model: Callable[..., Any]
    x: Tensor
    layers: Layers
    target: Target
    versus: Versus
    channel_dim: int | None
    create_graph: bool
    weighted: bool


@dataclass(frozen=True)
class Found:
    """A pass through the network: where W(x) begins and ends, what is explained, and W(x), if it is linear."""

    start: Tensor
    output: Tensor
    value: Tensor
    classes: Tensor | None
    others: Tensor | None
    faults: tuple[Violation, ...]
    weights: Tensor | None


@dataclass(frozen=True)
class Shares:
    """Shares of constants, and what they complete, all of the same passes.

    In another pass rounding may flip a ReLU, and in a network that makes small differences large all is a little
    different: shares, W(x) and value complete each other only if no rounding lies between them.
    """

    table: dict[str, Tensor]
    start: Tensor
    output: Tensor
    value: Tensor
    weights: Tensor


def run_frozen(task: Task, mode: ExplanationMode, context: AbstractContextManager[object]) -> Found:
    """Run the network in a context that freezes its factors, and read W(x)."""
    with untouched(task.x.device), context:
        start, output = run_between(task.model, task.x, entry(mode), *task.layers)
        check_channel_dim(task.channel_dim, start)
        check_output(output, len(task.x))
        value, classes, others = select(output, task.target, task.versus)
        faults = tuple(violations(value, mode))
        weights = _weights(value, start, task.create_graph) if task.weighted and not faults else None
    return Found(start, output, value, classes, others, faults, weights)


def entry(mode: ExplanationMode) -> Callable[[Tensor], Tensor]:
    """What makes the start of an explanation out of an input: a copy, which the network may write to."""

    def enter(value: Tensor) -> Tensor:
        if not mode.create_graph or not value.requires_grad:
            value = value.detach().requires_grad_()
        return mode.start_at(value.clone())

    return enter


def not_linear(
    model: Callable[..., Any], x: Tensor, layers: Layers, products: ProductPolicy, faults: tuple[Violation, ...]
) -> NotLinearError:
    """The error that names what the graph audit found, with the places that one more pass notes."""
    mode = LocatingMode(model, products)
    with untouched(x.device), mode:
        _, output = run_between(model, x.detach(), entry(mode), *layers)
        located = tuple(violations(output, mode)) or faults
    listed = "; ".join(str(violation) for violation in located[:3])
    more = f"; and {len(located) - 3} more" if len(located) > 3 else ""
    return NotLinearError(
        f"the network is not dynamic linear: {listed}{more}. Replace the operation, or register what is to be frozen "
        "in it with `bcoskit.rule`"
    )


def check_independence(task: Task, together: Tensor, alone: Tensor) -> None:
    """Refuse outputs of a batch that are not those of its samples: far more than rounding makes of them.

    What rounding makes of them is seen in one more pass of the sample that is most suspicious: some networks make
    small differences large.

    Args:
        task: What is explained.
        together: The outputs of the batch.
        alone: Those of its samples, each in a pass of its own.

    Raises:
        ValueError: If they are not.
    """
    together, alone = together.detach(), alone.detach()
    difference = (together - alone).abs().reshape(len(alone), -1).amax(1)
    worst = int(difference.argmax())
    bound = float(100 * torch.finfo(together.dtype).eps ** 0.5 * alone.abs().max())
    if len(alone) == 1 or not float(difference[worst]) > bound:
        return
    with untouched(task.x.device), torch.no_grad():
        _, again = run_between(task.model, task.x[worst : worst + 1], Tensor.clone, *task.layers)
    rounding = float((again[0] - alone[worst]).abs().max())
    if float((again[0] - together[worst]).abs().max()) > max(bound, 10 * rounding):
        raise ValueError(
            f"the output of sample {worst} is another one in the batch than alone, so that it has no W(x) of its own: "
            "the samples interact, or the network draws random numbers; `bcoskit.audit` names where"
        )


def _weights(value: Tensor, start: Tensor, create_graph: bool) -> Tensor:
    """One backward pass per target: the samples do not interact, so that a sum over them keeps them apart."""
    columns = value.unbind(1) if value.ndim == 2 else (value,)
    last = len(columns) - 1
    rows = [_row(column, start, create_graph or index < last, create_graph) for index, column in enumerate(columns)]
    return torch.stack(rows, 1) if value.ndim == 2 else rows[0]


def _row(column: Tensor, start: Tensor, keep: bool, create_graph: bool = False) -> Tensor:
    gradients: Any = torch.autograd.grad(
        column.sum(), start, retain_graph=keep, create_graph=create_graph, allow_unused=True
    )
    row: Tensor | None = gradients[0]
    if row is None:
        raise ValueError("the target does not depend on the input of the explanation: check the layers and the target")
    if not bool(torch.isfinite(row).all()):
        raise ValueError("W(x) holds values that are not finite: some operation has no finite gradient at this input")
    return row


def shares_of(
    model: Callable[..., Any],
    x: Tensor,
    target: Target,
    versus: Tensor | None,
    layers: Layers,
    products: ProductPolicy,
) -> Shares:
    """Every constant's share, each like the value that is explained, and what these belong to.

    One sample at a time: inside a network an axis need not belong to samples, so that only a pass of its own tells
    which of a constant's shares are a sample's.
    """
    samples: list[list[dict[str, Tensor]]] = []
    starts: list[Tensor] = []
    outputs: list[Tensor] = []
    values: list[Tensor] = []
    weights: list[Tensor] = []
    several = False
    for index in range(len(x)):
        mode = ConstantsMode(model, products)
        sample = x[index : index + 1].detach()
        with untouched(x.device):
            with mode:
                start, output = run_between(model, sample, entry(mode), *layers)
            check_output(output, 1)
            chosen = target[index : index + 1] if isinstance(target, Tensor) else target
            value, _, _ = select(output, chosen, None if versus is None else versus[index : index + 1])
            several = value.ndim == 2
            collected: list[dict[str, Tensor]] = []
            rows: list[Tensor] = []
            for column in value.unbind(1) if several else (value,):
                mode.shares = {}
                rows.append(_row(column, start, keep=True))
                collected.append(mode.shares)
        samples.append(collected)
        starts.append(start)
        outputs.append(output)
        values.append(value)
        weights.append(torch.stack(rows, 1) if several else rows[0])
    names = sorted({name for sample in samples for column in sample for name in column})
    zero = weights[0].new_zeros(())
    table = {name: [[column.get(name, zero) for column in sample] for sample in samples] for name in names}
    stacked = {name: torch.stack([torch.stack(row) for row in rows]) for name, rows in table.items()}
    shares = stacked if several else {name: share.squeeze(1) for name, share in stacked.items()}
    return Shares(shares, *map(torch.cat, (starts, outputs, values, weights)))
