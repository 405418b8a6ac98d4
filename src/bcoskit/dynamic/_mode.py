"""The one switch: a context in which every input-dependent factor is a constant for autograd."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Literal, TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.overrides import TorchFunctionMode

ProductPolicy: TypeAlias = Literal["split", "first", "error"]
"""What becomes of a product of two factors that both depend on the input (see `explanation_mode`)."""

PRODUCT_POLICIES: tuple[ProductPolicy, ...] = ("split", "first", "error")


class NotLinearError(RuntimeError):
    """The network is not dynamic linear: some operation has no exact linear summary."""


class _FreezeFunction(torch.autograd.Function):
    """Identity whose gradient is nothing while its mode is entered, and the identity afterwards."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mode: "ExplanationMode") -> Tensor:
        ctx.mode = mode
        # A copy: an alias would forbid writing to the original, an optimiser's step included.
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None if ctx.mode.entered else gradients[0], None


def is_freeze(node: Any) -> bool:
    """Whether a node of the graph is that of a factor frozen with `create_graph`."""
    return isinstance(node, getattr(_FreezeFunction, "_backward_cls"))  # noqa: B009 - torch does not declare it


# Notes in the metadata of graph nodes: that a write is ours, that a function of ours is piecewise linear, that the
# input begins there, and what depends on any input, and on the one that was marked.
WRITE = "bcoskit_write"
LINEAR = "bcoskit_linear"
START = "bcoskit_start"
_CHECKPOINTING = (
    "activation checkpointing runs layers again in the backward pass, where their factors are not frozen: switch it off"
)
_DEPENDS = {False: "bcoskit_depends", True: "bcoskit_depends_on_marked"}


class ExplanationMode(TorchFunctionMode):
    """The mode behind `explanation_mode`, which documents it.

    Torch's own thread-local stack of function modes is the only state: nothing is stored on modules, and
    leaving the context, also by an exception, ends it.
    """

    def __init__(self, *, products: ProductPolicy = "split", create_graph: bool = False) -> None:
        if products not in PRODUCT_POLICIES:
            raise ValueError(f"`products` (={products!r}) must be one of {', '.join(PRODUCT_POLICIES)}")
        super().__init__()
        self.products: ProductPolicy = products
        self.create_graph = create_graph
        self.marked = False
        self._depth = 0
        self._inner_graphs = 0  # modes inside of this one whose frozen factors have a graph
        self._no_checkpoints: list[Any] = []
        self._frozen_parameters: dict[int, Tensor] = {}

    @property
    def entered(self) -> bool:
        """Whether the context is open: frozen factors pass no gradient."""
        return self._depth > 0

    def __enter__(self) -> "ExplanationMode":
        if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
            import bcoskit.dynamic._compiler  # noqa: F401 # pyright: ignore[reportUnusedImport] - its effect
        if not torch.compiler.is_compiling():
            no_checkpoints = torch.autograd.graph.disable_saved_tensors_hooks(_CHECKPOINTING)
            no_checkpoints.__enter__()
            self._no_checkpoints.append(no_checkpoints)
        self._count_in_outer_modes(1)
        super().__enter__()
        self._depth += 1
        return self

    def __exit__(self, *exception: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._frozen_parameters.clear()
        super().__exit__(*exception)
        self._count_in_outer_modes(-1)
        if not torch.compiler.is_compiling():
            self._no_checkpoints.pop().__exit__(*exception)

    def _count_in_outer_modes(self, change: int) -> None:
        if not self.create_graph:
            return
        for index in range(torch._C._len_torch_function_stack()):
            mode = torch._C._get_function_stack_at(index)
            if isinstance(mode, ExplanationMode):
                mode._inner_graphs += change

    @property
    def has_constant_factors(self) -> bool:
        """Whether nobody asks for derivatives, or for single operations, of what is frozen."""
        return not self.create_graph and type(self) is ExplanationMode

    def freeze(self, tensor: Tensor) -> Tensor:
        """The tensor as a constant of the linear map (with `create_graph`: until the context is left)."""
        if self.create_graph:
            return _FreezeFunction.apply(tensor, self) if tensor.requires_grad else tensor
        return tensor.detach()

    def start_at(self, tensor: Tensor) -> Tensor:
        """Say that the input is this tensor, which has a graph of its own, and no other leaf."""
        node: Any = tensor.grad_fn
        node.metadata[_DEPENDS[True]] = node.metadata[START] = True
        self.marked = True
        return tensor

    def depends_on_input(self, value: Any) -> bool:
        """Whether a gradient path leads from the value to the input, past no frozen factor.

        Unless `start_at` has said what the input is, it is every leaf that is not a parameter.
        """
        if not requires_gradient(value):
            return False
        if _has_tangent(value):
            return True
        if torch.compiler.is_compiling():
            return not isinstance(value, torch.nn.Parameter)
        if value.grad_fn is None:
            return not self.marked and not isinstance(value, torch.nn.Parameter)
        return node_depends_on_input(value.grad_fn, self.marked)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # What is read of a parameter, or assigned to one, is the parameter's own.
        compiling = torch.compiler.is_compiling()
        if not compiling and (func in _PROPERTIES or _is_of_parameter(func, args)):
            return func(*args, **(kwargs or {}))
        arguments, keywords = self._without_parameters(args, kwargs or {})
        return self._apply(func, arguments, keywords)

    def _apply(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handler = RULES.get(rule_key(func))
        if handler is None or not self._any_live(args, kwargs):
            return self.natural(func, args, kwargs)
        return handler(self, func, args, kwargs)

    def _any_live(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        # With `create_graph` frozen factors require gradients too, so that only their graph tells them apart.
        test = self.depends_on_input if self.create_graph or self._inner_graphs else requires_gradient
        return _any_tensor(args, test) or _any_tensor(kwargs.values(), test)

    def natural(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operation as it is: what reaches this point is (piecewise) linear in its live arguments."""
        target = args[0] if args else None
        # A compiler traces no names of functions, and its graph is not audited.
        if torch.compiler.is_compiling() or not isinstance(target, Tensor) or not writes(func, kwargs):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _METADATA_WRITES:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled() and self.depends_on_input(target):
            raise NotLinearError(
                f"`{name}` writes to a tensor that depends on the input under `torch.no_grad()`, where its gradient "
                "is not changed with it: write to a copy"
            )
        if not target._is_view() and name != "__setitem__":
            return func(*args, **kwargs)
        # The graph shows a write to a view as a copy of slices, and not what was computed: the computation is done
        # beside it, where the audit sees it, and the copy is marked as ours.
        if name in _LINEAR_WRITES or "inplace" in kwargs:
            output = func(*args, **kwargs)
        else:
            twin = getattr(Tensor, f"__{name[3:]}" if name in _OPERATORS else name[:-1], None)
            if twin is None:
                return func(*args, **kwargs)
            output = target.copy_(twin(target.clone(), *args[1:], **kwargs))
        node: Any = (target._base if target._is_view() else target).grad_fn  # pyright: ignore[reportOptionalMemberAccess]
        if node is not None:
            node.metadata[WRITE] = True
        return output

    def _without_parameters(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Freeze every `nn.Parameter`, so that `requires_grad` means "depends on the input"."""
        return (
            tuple([self._without_parameter(value) for value in args]),
            {name: self._without_parameter(value) for name, value in kwargs.items()} if kwargs else kwargs,
        )

    def _without_parameter(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Parameter):
            if not self.create_graph or not torch.is_grad_enabled():  # where a copy would never have a graph
                return value.detach()
            # One node per parameter, however often a forward pass uses it.
            if id(value) not in self._frozen_parameters:
                self._frozen_parameters[id(value)] = self.freeze(value)
            return self._frozen_parameters[id(value)]
        if type(value) in (list, tuple):
            return type(value)([self._without_parameter(item) for item in value])
        return value


_OPERATORS = frozenset(
    """
    __iadd__ __isub__ __imul__ __itruediv__ __idiv__ __ipow__ __ifloordiv__ __imod__ __iand__ __ior__ __ixor__
    __ilshift__ __irshift__ __imatmul__
    """.split()
)
_METADATA_WRITES = frozenset(
    """
    t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ as_strided_ requires_grad_ detach_ rename_ share_memory_
    """.split()
)
_LINEAR_WRITES = frozenset(
    """
    copy_ zero_ fill_ add_ sub_ mul_ div_ neg_ negative_ masked_fill_ masked_scatter_ index_fill_ index_add_ index_copy_
    index_put_ scatter_add_ clamp_ clamp_min_ clamp_max_ clip_ relu_ leaky_relu_ hardtanh_ threshold_ abs_ tril_ triu_
    __setitem__ __iadd__ __isub__ __imul__ __itruediv__ __idiv__
    """.split()
)


def writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation writes to its first argument."""
    name = getattr(func, "__name__", "")
    return (
        kwargs.get("inplace") is True
        or name == "__setitem__"
        or name in _OPERATORS
        or (name.endswith("_") and not name.endswith("__"))
    )


Handler: TypeAlias = Callable[[ExplanationMode, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What is called, with the mode off, in the place of an operation with live arguments."""

_PROPERTIES = frozenset(
    vars(torch._C.TensorBase)[name].__get__
    for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_leaf", "grad", "grad_fn")
)
_OWN = frozenset("requires_grad_ retain_grad register_hook register_post_accumulate_grad_hook".split())


def _is_of_parameter(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__set__" or (name in _OWN and isinstance(args[0], torch.nn.Parameter))


RULES: dict[Any, Handler] = {}
"""The one table of rules, by `rule_key`; `bcoskit.dynamic.rules` fills it."""
OPERATIONS: set[Callable[..., Any]] = set()
"""The functions that have a rule."""


def rule_key(func: Callable[..., Any]) -> Any:
    """What stands for an operation in the table: itself, or the address of a function written in Python.

    A compiler that traces the table takes some of torch's own Python functions for others than themselves.
    """
    return (func.__module__, func.__name__) if isinstance(func, FunctionType) else func


def explanation_mode(*, products: ProductPolicy = "split", create_graph: bool = False) -> ExplanationMode:
    """A context in which a network is the linear map `W(x)` that summarises it at its input.

    Inside, every factor that a layer computes from its input (the `|cos|` of a B-cos layer, an attention
    matrix, the statistic of a norm, the gate of a GELU …) is a constant for autograd. Forward values do not
    change; the gradient of an output with respect to the input `x` is exactly its row of `W(x)`, with
    `output = W(x)·x + constants` (Böhle et al., CVPR 2022, section 3.2.3; TPAMI 2024, section 3).

    The context is thread-local, can be nested, and ends with the `with` block, also when an exception passes.
    Nothing is stored on modules. It may be entered inside a function under `torch.compile(fullgraph=True)` and
    `torch.func`, and a compiled model may be called in it. Every `nn.Parameter` is a constant in it too; any
    other tensor that requires a gradient counts as input.

    Args:
        products: What becomes of a product `u·v` of two factors that both depend on the input, for which no
            layer or rule says which one is the factor to freeze: `"split"` gives each half of the contribution,
            `"first"` gives the first factor all of it, `"error"` raises `NotLinearError`.
        create_graph: Keep the frozen factors differentiable for *after* the context: what was computed inside,
            `W(x)` included, then has its complete derivative with respect to parameters and input.

    Returns:
        The context manager.

    Raises:
        ValueError: If `products` is not one of the three policies.
    """
    return ExplanationMode(products=products, create_graph=create_graph)


def current_mode() -> ExplanationMode | None:
    """The innermost open `explanation_mode` of this thread, or None."""
    for index in reversed(range(torch._C._len_torch_function_stack())):
        mode = torch._C._get_function_stack_at(index)
        if isinstance(mode, ExplanationMode):
            return mode
    return None


class _Frozen(threading.local):
    """How often this thread has entered `frozen`."""

    depth = 0


_frozen = _Frozen()


@contextmanager
def frozen() -> Iterator[None]:
    """`freeze` makes constants inside, and nothing else happens: no rule is applied, no operation is looked at.

    What comes out is W(x) only if the graph audit finds nothing.
    """
    _frozen.depth += 1
    try:
        yield
    finally:
        _frozen.depth -= 1


def is_frozen() -> bool:
    """Whether `freeze` makes constants here, in this thread."""
    return _frozen.depth > 0 or current_mode() is not None


def freeze(tensor: Tensor) -> Tensor:
    """Mark a factor as input-dependent: the identity, and inside `explanation_mode` a constant.

    A layer `y = factor(x)·z(x)` with `z` linear in `x` becomes explainable by writing `factor(freeze(x))`.

    Args:
        tensor: Any tensor.

    Returns:
        The tensor itself; inside `explanation_mode` the same values without a gradient path.
    """
    mode = current_mode()
    if mode is not None:
        return mode.freeze(tensor)
    return tensor.detach() if _frozen.depth else tensor


def node_depends_on_input(root: Any, marked: bool) -> bool:
    """As `ExplanationMode.depends_on_input`, for a node of the graph; remembered in the nodes' metadata."""
    key = _DEPENDS[marked]
    stack = [root]
    while stack:
        node = stack[-1]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        pending = [parent for parent in parents if key not in parent.metadata]
        if key in node.metadata:
            stack.pop()
        elif is_freeze(node):
            node.metadata[key] = False
        elif hasattr(node, "variable"):
            node.metadata[key] = not marked and not isinstance(node.variable, torch.nn.Parameter)
        elif pending:
            stack.extend(pending)
        else:
            # A node without parents is opaque (a functorch wrapper's): it requires a gradient, so it depends.
            node.metadata[key] = not parents or any(parent.metadata[key] for parent in parents)
    return bool(root.metadata[key])


def name_of(func: Callable[..., Any]) -> str:
    """A readable name of a torch function, as `Tensor.mul` or `softmax`."""
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", repr(func))
    return name.replace("TensorBase.", "Tensor.").replace("_VariableFunctionsClass.", "torch.")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in arguments or outputs, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _any_tensor(values: Iterable[Any], test: Callable[[Tensor], bool]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if test(value):
                return True
        elif type(value) in (list, tuple) and _any_tensor(value, test):
            return True
    return False


def requires_gradient(value: Any) -> bool:
    """Whether the value is a tensor with a gradient path or a tangent, wherever they come from."""
    if not isinstance(value, Tensor):
        return False
    # A compiler knows of the input of `torch.func.grad` what it was before, and of a view of it what it is.
    seen = value.view_as(value) if torch.compiler.is_compiling() else value
    return seen.requires_grad or _has_tangent(value)


def _has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor is dual: in forward mode it is the tangent that tells what depends on the input."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
