"""From a trace to an ONNX graph of any batch size."""

import warnings
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import fx

Integers: TypeAlias = npt.NDArray[np.integer[Any]]

_SHAPES = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0}
"""Which input of an operation is a shape."""


def onnx_model(trace: fx.GraphModule, shape: tuple[int, int, int], batch: int, outputs: list[str]) -> ir.Model:
    """The ONNX graph of a trace of `batch` samples, as one of any number of samples.

    Args:
        trace: What `trace_explanation` returns.
        shape: Of one image.
        batch: Number of samples of the trace: a number of which no other size in it is a multiple.
        outputs: Names of the outputs.
    """
    # Torch wants values; pages of memory that nobody writes to cost nothing.
    arguments = torch.empty(batch, *shape), torch.zeros(batch, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, on itself
        program = torch.export.export(trace, arguments)
        exported: Any = torch.onnx.export(
            program, dynamo=True, input_names=["image", "target"], output_names=outputs, optimize=False, verbose=False
        )
    model: ir.Model = exported.model
    _free_batch(model, batch)
    optimizer.optimize(model)
    return model


def _free_batch(model: ir.Model, batch: int) -> None:
    """Make every size that is a multiple of `batch` that multiple of the number of samples."""
    graph = model.graph
    first = ir.node("Shape", [graph.inputs[0]], {"start": 0, "end": 1})
    graph.insert_before(graph[0], first)
    samples = first.outputs[0]
    for node in list(graph):
        place = _SHAPES.get(node.op_type)
        sizes = None if place is None else _integers(node.inputs[place])
        if place is not None and sizes is not None and _multiples(sizes, batch).any():
            node.replace_input_with(place, _free_sizes(node, samples, sizes, batch))
    RemoveUnusedNodesPass()(model)  # with them the constants that those shapes consisted of
    for node in list(graph):
        values = _integers(node.outputs[0]) if node.op_type == "Constant" else None
        if values is not None and _multiples(values, batch).any():
            free = _product(node, samples, values, batch)
            if values.ndim == 0:
                free = _added(node, "Squeeze", free)
            node.outputs[0].replace_all_uses_with(free)
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape(["batch", *list(value.shape)[1:]])
    for node in graph:
        for value in node.outputs:
            value.shape = value.shape if value.is_graph_output() else None


def _free_sizes(node: ir.Node, samples: ir.Value, sizes: Integers, batch: int) -> ir.Value:
    free = _multiples(sizes, batch)
    if node.op_type == "Reshape" and free.sum() == 1 and -1 not in sizes:
        return _constant(node, np.where(free, -1, sizes))
    return _product(node, samples, sizes, batch)


def _product(node: ir.Node, samples: ir.Value, values: Integers, batch: int) -> ir.Value:
    """The values (size,), in which `batch` is replaced by the number of samples."""
    free = _multiples(values, batch).reshape(-1)
    values = values.reshape(-1)
    scaled = _added(node, "Mul", samples, _constant(node, np.where(free, values // batch, 0)))
    return _added(node, "Add", scaled, _constant(node, np.where(free, 0, values)))


def _constant(before: ir.Node, values: Integers) -> ir.Value:
    return _added(before, "Constant", value=ir.tensor(values.astype(np.int64)))


def _added(before: ir.Node, operation: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    """The output of a new node before another one."""
    node = ir.node(operation, inputs, attributes)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs[0]


def _integers(value: ir.Value | None) -> Integers | None:
    """The integers that a value is known to hold, None if it is no constant, or of another type."""
    if value is None:
        return None
    constant = ir.convenience.get_const_tensor(value)
    if constant is not None:
        return constant.numpy() if constant.dtype.is_integer() else None
    node = value.producer()
    if node is None or node.op_type not in ("Cast", "Concat", "Identity", "Reshape", "Unsqueeze"):
        return None
    parts = [_integers(part) for part in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    known = [np.atleast_1d(part) for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None


def _multiples(values: Integers, batch: int) -> npt.NDArray[np.bool_]:
    return (values > 0) & (values % batch == 0)
