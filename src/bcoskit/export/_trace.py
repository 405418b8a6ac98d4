"""An explanation as a graph of plain operations, in which no automatic differentiation is left."""

from collections.abc import Callable, Collection
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bcoskit._compile_explain import explanation_program
from bcoskit.dynamic import ProductPolicy
from bcoskit.export._decompositions import decompositions

_SAMPLES = 1000
"""The least number of samples of a trace, which exist as shapes only."""

_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_SAME = {*_VIEWS, _aten.alias.default, _aten.detach.default, _aten.expand.default}
_IN_PLACE = {_aten.add_.Tensor: _aten.add.Tensor, _aten.mul_.Tensor: _aten.mul.Tensor}


class SizesSeen(TorchDispatchMode):
    """While it is on, collects every size and every whole number that operations have to do with.

    Attributes:
        found: Those numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.found.update(leaf.shape)
                if leaf.ndim == 0 and not leaf.is_floating_point() and not leaf.is_complex():
                    self.found.add(int(leaf))
            elif isinstance(leaf, int):
                self.found.add(leaf)
        return result


def batch_size(numbers: Collection[int]) -> int:
    """How many samples to trace: a prime, so that no product of numbers is a multiple of it unless one of them is.

    Args:
        numbers: What `SizesSeen` has found with a single sample, of which none is a multiple of the result but 0.
    """
    return next(
        size
        for size in count(_SAMPLES)
        if all(size % factor for factor in range(2, int(size**0.5) + 1))
        and all(number == 0 or number % size for number in numbers)
    )


def trace_explanation(
    model: Callable[[Tensor], Tensor],
    enter: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    batch: int,
    products: ProductPolicy,
    with_weights: bool,
) -> fx.GraphModule:
    """Write down what an explanation computes.

    Args:
        model: A network in evaluation mode with logits (N, K).
        enter: Makes the network's input of images.
        shape: Of one image.
        batch: Number of samples, as of `batch_size`.
        products: As of `explain`.
        with_weights: Whether W(x) is returned too.

    Returns:
        A graph of images (N, *shape) and class indices (N,), -1 for the prediction, which returns logits (N, K),
        contributions (N, H, W), and perhaps W(x). N is `batch`.
    """

    def contiguous(x: Tensor) -> Tensor:
        with _ContiguousPools():
            return model(x)

    program = explanation_program(contiguous, products)

    def run(image: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        def chosen(logits: Tensor) -> Tensor:
            # What is out of range must not be taken for an index from the end: it becomes one that no runtime accepts.
            named = torch.where(target < -1, logits.shape[1], target)
            return torch.where(target == -1, logits.argmax(1), named)

        x = enter(image)
        logits, _, rows = program(x, chosen)
        contributions = (rows * x).sum(1)
        return (logits, contributions, rows) if with_weights else (logits, contributions)

    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = torch.empty(batch, *shape), torch.empty(batch, dtype=torch.int64)
    tracer: Any = make_fx(run, decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True)
    return _simplified(tracer(*arguments)).eval()


class _ContiguousPools(TorchFunctionMode):
    """Pools see contiguous maps: where channels lie last in memory torch writes strides, which no runtime has."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.adaptive_avg_pool2d:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def _simplified(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Without steps that do nothing."""
    graph = graph_module.graph
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target in _IN_PLACE and _is_unshared(node.args[0]):
            node.target = _IN_PLACE[node.target]
    # What is written to must stay the view that it is.
    functional = not any(_writes(node) for node in graph.nodes)
    for node in list(graph.nodes) if functional else ():
        if node.target in _VIEWS and node.args[0].target in _VIEWS:
            node.update_arg(0, node.args[0].args[0])
        if node.target in _SAME and _shape(node) == _shape(node.args[0]):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_unshared(node: Any) -> bool:
    """Whether a value is a result of its own, which nothing but one operation reads."""
    if not isinstance(node, fx.Node) or len(node.users) != 1 or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not any(result.alias_info for result in node.target._schema.returns)
