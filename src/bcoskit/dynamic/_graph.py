"""The graph audit: which operations behind an output are not linear in the input, and where they are called."""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit.dynamic._mode import (
    LINEAR,
    START,
    WRITE,
    ExplanationMode,
    NotLinearError,
    ProductPolicy,
    is_freeze,
    name_of,
    node_depends_on_input,
    tensors_in,
)
from bcoskit.dynamic._places import Places

_LOCATION = "bcoskit_location"
_CONSTANT = "is a constant of the explanation: nothing behind it depends on the input"
HIDDEN = "computes what the graph does not show"
_IN_HALF_PRECISION = "computes in half precision, in which W(x) is not exact"


_REGISTER = "replace it, or register what is to be frozen in it with `bcoskit.rule`"
_SUGGESTIONS = {
    "does not show": "write to no `.data` of what depends on the input, and call layers outside of `torch.vmap`",
    "nothing behind it": "explain what stands before it (`to_layer`), or take a gate, which is 0 at 0, in its place",
    "half precision": "let the network run in float32",
    "own backward": "write it with torch's operations, or register a rule for the function that calls it",
    "read by Python": "compute with tensors (`torch.where`, a product) instead of deciding by a value",
    "samples of the batch": "call `model.eval()`, and keep running statistics; let no statistic run over the batch",
    "draws random": "call `model.eval()`; let a call draw no random numbers, and leave nothing for the next one",
    "statistics of the batch": "call `model.eval()`, and keep running statistics",
    "factors that depend": "freeze one factor by `bcoskit.freeze`",
}


@dataclass(frozen=True)
class Violation:
    """An operation that is not linear in the input.

    Attributes:
        node: The autograd node, without its number.
        operation: The operation as it was called, as `torch.erfinv`.
        location: File and line of the call in the network's code.
        module: Path of the module in which it was called.
        reason: What is wrong with it.
    """

    node: str
    operation: str = "?"
    location: str = "?"
    module: str = "?"
    reason: str = "is not linear in the input"

    @property
    def place(self) -> tuple[str, str, str]:
        """What was called, and where."""
        return self.operation, self.location, self.module

    @property
    def suggestion(self) -> str:
        """What to do about it."""
        return next((text for words, text in _SUGGESTIONS.items() if words in self.reason), _REGISTER)

    def __str__(self) -> str:
        return f"{self.operation} ({self.node}) {self.reason}, in module {self.module!r} at {self.location}"


# Nodes that are linear or piecewise linear in all their inputs.
_LINEAR = frozenset(
    """
    Abs Add AccumulateGrad AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D
    AffineGridGenerator Alias Amax Amin Aminmax AsStrided AvgPool2D AvgPool3D BlockDiag Cat ChannelShuffle Clamp
    ClampMax ClampMin Clone NativeChannelShuffle
    Col2Im Complex Conj ConjPhysical ConstantPadNd Copy CopyBackwards CopySlices Cummax Cummin Cumsum Diag
    DiagEmbed Diagonal Expand FftC2C FftC2R FftR2C Flip Fmax Fmin FractionalMaxPool2D FractionalMaxPool3D Gather
    Hardshrink Hardtanh Im2Col Imag Index IndexAdd IndexCopy IndexFill IndexPut IndexPutImpl IndexReduce
    IndexSelect Kthvalue LeakyRelu Lift LiftFresh LogicalNot MaskedFill MaskedScatter MaskedSelect Max
    MaxPool2DWithIndices MaxPool3DWithIndices MaxUnpool2D MaxUnpool3D Maximum Mean Median Min Minimum
    MkldnnAdaptiveAvgPool2D MkldnnMaxPool2D Mode NanToNum Nanmean Nanmedian Nansum NativeDropout Neg Permute
    PixelShuffle PixelUnshuffle Put ScatterReduce Real ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat
    RepeatInterleave ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias ReshapeCopy Roll Rot90
    RreluWithNoise Rsub Scatter ScatterAdd Select SelectScatter Slice SliceScatter Sort Split SplitWithSizes
    Squeeze Stack Sub Sum T Take Threshold ToCopy Topk Trace Transpose Tril Triu Unbind Unfold UnsafeSplit
    UnsafeSplitWithSizes UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBicubic2DAa UpsampleBilinear2D
    UpsampleBilinear2DAa UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
    UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D View ViewAsComplex
    ViewAsReal Where
    """.split()
)

# Bilinear nodes: which of their inputs are factors, of which one at most may depend on the input …
_FACTORS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Mul", "Mm", "Bmm", "Mv", "Dot", "Vdot", "LinalgCross", "LinalgVecdot", "Linear"), (0, 1)),
    **dict.fromkeys(("Convolution", "MkldnnConvolution", "ConvolutionOverrideable", "SlowConvTranspose2D"), (0, 1)),
    **dict.fromkeys(("ConvDepthwise2D", "SlowConvDilated2D", "ThnnConv2D", "ConvTbc", "MkldnnLinear"), (0, 1)),
    **dict.fromkeys(("Addmm", "Baddbmm", "Addmv", "Addr", "Addbmm", "Addcmul"), (1, 2)),
    "Trilinear": (0, 1, 2),
    "PreluKernel": (0, 1),
}
# … and inputs in which a node is not linear at all.
_FIXED: dict[str, tuple[int, ...]] = {
    "Div": (1,),
    "Addcdiv": (2,),
    "Ldexp": (1,),
    "Lerp": (2,),
    "GridSampler2D": (1,),
    "GridSampler3D": (1,),
}


def violations(output: Tensor, mode: ExplanationMode) -> Iterator[Violation]:
    """The graph audit: every operation behind an output that is not linear in the input.

    The output must come from inside `explanation_mode`, where parameters are constants.

    Args:
        output: Any tensor with a graph.
        mode: The mode in which it was computed.

    Yields:
        The violations, from the output towards the input.
    """
    stack: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen or is_freeze(node) or START in node.metadata:
            continue
        seen.add(node)
        reason = _fault(node, mode.marked)
        if reason is not None:
            yield _violation(node, reason)
        stack.extend(parent for parent, _ in node.next_functions)


def _kind(node: Any) -> str:
    """`MulBackward0` and `torch::autograd::AccumulateGrad` as `Mul` and `AccumulateGrad`."""
    return _kind_of(node.name())


@lru_cache(maxsize=1024)
def _kind_of(name: str) -> str:
    name = name.rsplit("::", 1)[-1]
    return re.sub(r"Backward(\d*)$", "", name) if not name.startswith("CopyBackwards") else name


def _fault(node: Any, marked: bool) -> str | None:
    if LINEAR in node.metadata:
        return None
    kind = _kind(node)
    # A custom function may have the name of a node that is known.
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return "has its own backward" if node_depends_on_input(node, marked) else None
    if kind == "CopySlices" and WRITE not in node.metadata:
        return "writes to a view by an operation that is not known to be linear"
    if kind in ("IndexReduce", "ScatterReduce") and node._saved_reduce == "prod":
        return "multiplies entries that depend on the input"
    if kind == "ToCopy" and node._input_metadata[0].dtype in (torch.float16, torch.bfloat16):
        return _IN_HALF_PRECISION if node_depends_on_input(node, marked) else None
    if kind == "Abs" and node._saved_self.is_complex():
        return "is not known to be linear in the input" if node_depends_on_input(node, marked) else None
    if kind in _LINEAR:
        return None
    parents = [parent for parent, _ in node.next_functions]
    if kind in _FACTORS:
        live = sum(_depends(parents[slot], marked) for slot in _FACTORS[kind] if slot < len(parents))
        return None if live < 2 else f"multiplies {live} factors that depend on the input"
    if kind in _FIXED:
        live = any(_depends(parents[slot], marked) for slot in _FIXED[kind] if slot < len(parents))
        return "has a divisor, weight or grid that depends on the input" if live else None
    # With `create_graph` constants have a graph too; what does not lead to the input is one.
    return "is not known to be linear in the input" if node_depends_on_input(node, marked) else None


def _depends(node: Any, marked: bool) -> bool:
    return node is not None and node_depends_on_input(node, marked)


def _violation(node: Any, reason: str) -> Violation:
    located: Violation | None = node.metadata.get(_LOCATION)
    if located is None:
        return Violation(_kind(node), reason=reason)
    return replace(located, node=_kind(node), reason=reason)


def _of_no_function(node: Any, before: str) -> str:
    """What is said of an operation that was no call of a torch function."""
    kind = _kind(node)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return f"{kind}.apply"
    return f"{kind}, which is called as no torch function, before {before}"


class LocatingMode(ExplanationMode):
    """An `explanation_mode` that notes at every node of the graph where in the network it was made.

    What no node shows is collected: values of the input that Python reads, and operations that a rule refuses, which
    are run as they are.

    Args:
        model: The network, for the paths of its modules.
        products: As of `explanation_mode`.

    Attributes:
        unseen: What was collected.
        ending: The last operation that made a constant of what depends on the input. It is to blame where an output
            has no gradient path.
    """

    def __init__(self, model: Callable[..., Any], products: ProductPolicy = "split") -> None:
        super().__init__(products=products)
        self._places = Places(model)
        self.unseen: list[Violation] = []
        self.ending: Violation | None = None
        # What was computed from the input without a gradient path: kept, so that no other tensor takes its address.
        self._derived: dict[int, Tensor] = {}
        # What has a size by values of the input, such as the positions of what is positive.
        self._chosen: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._has_autocast = False
        self._applied: dict[str, tuple[str, str]] = {}  # where custom functions of autograd were called, by name

    def __enter__(self) -> "LocatingMode":
        super().__enter__()
        thread = threading.get_ident()

        def note(module: nn.Module, _inputs: Any, output: Any) -> None:
            place = self._places.of(module) if threading.get_ident() == thread else None
            if place is not None:  # operations that are no torch functions are noticed here at the latest
                self._mark(tensors_in(output), lambda _node: Violation("", f"{type(module).__name__}.forward", *place))

        def arrive(module: nn.Module, inputs: Any) -> None:
            if threading.get_ident() == thread:  # what is no torch function was called before, outside of this module
                self._mark_before(inputs, f"{type(module).__name__}.forward", lambda: self._places.here(module))

        modules = torch.nn.modules.module
        # One pair for each time that the mode is entered, which it may be inside of itself.
        self._hooks.append(
            (modules.register_module_forward_pre_hook(arrive), modules.register_module_forward_hook(note))
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks.pop():
            hook.remove()
        self._derived.clear()
        self._chosen.clear()
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if args and id(args[0]) in self._chosen and _reads_size(func):
            self._note_read(func)
        return super().__torch_function__(func, types, args, kwargs)

    def _note_read(self, func: Callable[..., Any]) -> None:
        name = "Tensor.shape" if getattr(func, "__self__", None) is _SHAPE else name_of(func)
        reason = "is read by Python, which decides by a value of the input: the decision is no part of the map"
        self.unseen.append(Violation("read", name, *self._places.here(), reason))

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        read = [args[1:], kwargs] if name in _OF_SHAPE else args[:1] if name in _OF_FIRST else [args, kwargs]
        given = list(tensors_in(read))
        from_input = any(map(self._is_from_input, given))
        chosen = [tensor for tensor in given if id(tensor) in self._chosen]
        if not torch.is_grad_enabled():
            self._applied |= self._places.applied()
        if name in _READS and from_input:
            self._note_read(func)
        self._note_autocast(given if from_input else [])
        try:
            output = super()._apply(func, args, kwargs)
        except NotLinearError as error:
            refused = Violation("refused", name_of(func), *self._places.here(), f"is refused: {error}")
            self.unseen.append(refused)
            output = func(*args, **kwargs)
            self._mark(tensors_in(output), lambda _node: refused)
        if from_input:
            changed = list(tensors_in(args[0] if output is None else output))  # an assignment returns nothing
            changed += [tensor._base for tensor in changed if tensor._base is not None]
            self._derived |= {id(tensor): tensor for tensor in changed if not tensor.requires_grad}
            # What is computed with what was chosen has its size, and layers read that of numbers to arrange them.
            chooses = any(map(self._is_from_input, _choosers(name, args, kwargs)))
            if chooses or (chosen and not any(map(torch.is_floating_point, changed))):
                self._chosen |= {id(tensor): tensor for tensor in changed}
            ends = not any(tensor.requires_grad for tensor in changed) and any(map(torch.is_floating_point, changed))
            if ends and any(tensor.requires_grad for tensor in given):
                self.ending = Violation("constant", name_of(func), *self._places.here(), _CONSTANT)
        return output

    def _is_from_input(self, tensor: Tensor) -> bool:
        return tensor.requires_grad or id(tensor) in self._derived

    def _note_autocast(self, given: Sequence[Tensor]) -> None:
        """Note the first operation that the network has computed in half precision, where double precision is not."""
        if any(torch.is_autocast_enabled(tensor.device.type) for tensor in given) and not self._has_autocast:
            self._has_autocast = True
            self.unseen.append(Violation("autocast", "torch.autocast", *self._places.here(), _IN_HALF_PRECISION))

    def natural(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the operation, and mark the nodes that it has added to the graph."""
        place: tuple[str, str] | None = None

        def here() -> tuple[str, str]:
            nonlocal place
            place = place or self._places.here()
            return place

        self._mark_before([args, kwargs], name_of(func), here)
        output = super().natural(func, args, kwargs)
        self._mark(tensors_in(output), lambda _node: Violation("", name_of(func), *here()))
        return output

    def _mark_before(self, given: Any, operation: str, here: Callable[[], tuple[str, str]]) -> None:
        """Mark what no torch function has made since the last one, or what its inside has told of."""

        def mark(node: Any) -> Violation:
            return Violation("", _of_no_function(node, operation), *(self._applied.get(_kind(node)) or here()))

        self._mark(tensors_in(given), mark)

    @staticmethod
    def _mark(tensors: Iterator[Tensor], mark: Callable[[Any], Violation]) -> None:
        """Mark the nodes behind tensors that have no mark yet."""
        stack: list[Any] = [tensor.grad_fn for tensor in tensors]
        while stack:
            node = stack.pop()
            if node is not None and _LOCATION not in node.metadata:
                node.metadata[_LOCATION] = mark(node)
                stack.extend(parent for parent, _ in node.next_functions)


_READS = frozenset(
    """
    __bool__ __int__ __float__ __index__ __contains__ __array__ __dlpack__ item tolist numpy is_nonzero equal allclose
    storage untyped_storage
    """.split()
)
# What gives as many values as fulfil a condition …
_CHOOSING = frozenset("nonzero argwhere unique unique_consecutive".split())
# … and what tells how many.
_SIZES = frozenset("__len__ size numel nelement unbind".split())
_SHAPE: Any = Tensor.shape


def _choosers(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors whose values decide how many values an operation gives."""
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else args[1:]
        return [each for each in index if isinstance(each, Tensor) and each.dtype == torch.bool]
    if name == "masked_select":
        return [each for each in (*args[1:], *kwargs.values()) if isinstance(each, Tensor) and each.dtype == torch.bool]
    if name in _CHOOSING or (name == "where" and len(args) == 1):
        return list(tensors_in([args, kwargs]))
    return []


def _reads_size(func: Callable[..., Any]) -> bool:
    return getattr(func, "__name__", "") in _SIZES or getattr(func, "__self__", None) is _SHAPE


# Of their first argument they take shape, dtype and device alone, …
_OF_SHAPE = frozenset(
    """
    new_ones new_zeros new_empty new_full new_tensor zeros_like ones_like empty_like full_like rand_like randn_like
    randint_like size dim numel stride
    """.split()
)
# … and these of any but the first.
_OF_FIRST = frozenset("to type_as expand_as view_as reshape_as".split())
