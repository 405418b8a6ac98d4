"""The table of rules: what the operations of networks that are not ours become inside `explanation_mode`.

Five kinds cover them. *Natural* operations are linear or piecewise linear and need no entry. A *gate* has
`f(0) = 0` and is written `x · g(x)` with `g(x) = f(x)/x` frozen. A *constant* (softmax, sigmoid, exp …) is
frozen altogether. A *normaliser* keeps its centring linear and freezes its statistic. A *product* of two
input-dependent tensors follows the mode's policy.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bcoskit.dynamic._formulas import GATES, gate, normalize, quotient
from bcoskit.dynamic._mode import (
    RULES,
    ExplanationMode,
    Handler,
    NotLinearError,
    depends_on_input,
    freeze,
    name_of,
    requires_gradient,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_NAMESPACES = (torch, torch.Tensor, F, torch._C._nn, torch.special, torch.linalg)


def rule(*operations: str | Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Register what operations become inside `explanation_mode`: the extension point for new operations.

    The decorated function takes the operation's arguments and is called in its place when one of them depends
    on the input. It computes the same values by operations that are linear in the input, with its factors
    wrapped in `freeze`; it runs inside the mode, where an operation on frozen arguments stays as it is::

        @bcoskit.rule("cosine_similarity")
        def cosine_similarity(x, y, dim=1, eps=1e-8):
            unit = torch.nn.functional.normalize(freeze(y), dim=dim, eps=eps)
            return (torch.nn.functional.normalize(x, dim=dim, eps=eps) * unit).sum(dim)

    In-place variants (`name_`, and `inplace=True`) of named operations are derived from it.

    Args:
        operations: Names, looked up in `torch`, `torch.Tensor`, `torch.nn.functional`, `torch.special` and
            `torch.linalg`, or the torch functions themselves.

    Returns:
        The decorator, which returns its function unchanged.

    Raises:
        ValueError: If torch has no operation of a name.
    """
    unknown = [name for name in operations if isinstance(name, str) and not _functions(name)]
    if unknown:
        raise ValueError(f"`operations` names {unknown[0]!r}, which is no function of torch")

    def register(function: _Function) -> _Function:
        for operation in operations:
            if isinstance(operation, str):
                _enter(_functions(operation), _rewrite(_with_inplace_flag(function)))
                _enter(_functions(f"{operation}_"), _rewrite(_in_place(function)))
            else:
                RULES[operation] = _rewrite(function)
        return function

    return register


def _functions(name: str) -> list[Callable[..., Any]]:
    """The torch functions of a name: one operation has several, which all arrive as themselves."""
    found = [getattr(namespace, name, None) for namespace in _NAMESPACES]
    return [function for function in found if callable(function)]


def _enter(functions: Iterable[Callable[..., Any]], handler: Handler) -> None:
    for function in functions:
        RULES[function] = handler


def _rewrite(function: Callable[..., Any]) -> Handler:
    """Call the function in the operation's place, inside the mode, so that its own operations follow the rules."""

    def handle(
        mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with mode:
            return function(*args, **kwargs)

    return handle


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def write(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor.copy_(function(tensor, *args, **kwargs))

    return write


def _with_inplace_flag(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        return _in_place(function)(*args, **kwargs) if inplace else function(*args, **kwargs)

    return call


# Gates: f(x) = x · g(x).


def _register_gates() -> None:
    def gated(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: gate(x, name)

    # ReLU is natural, and the two forms of GELU are one operation.
    for name in GATES.keys() - {"relu", "gelu", "gelu_tanh"}:
        rule(name)(gated(name))

    def parametric(function: Callable[..., Tensor], slope: float) -> Callable[..., Tensor]:
        return lambda x, *args, **kwargs: (
            x * quotient(lambda value: function(value, *args, **kwargs), freeze(x), slope)
        )

    for name, slope in {"elu": 1.0, "celu": 1.0, "selu": 1.0507009873554805, "softshrink": 0.0}.items():
        rule(name)(parametric(getattr(F, name), slope))


_register_gates()


@rule("gelu")
def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return gate(x, "gelu_tanh" if approximate == "tanh" else "gelu")


@rule("glu")
def _glu(x: Tensor, dim: int = -1) -> Tensor:
    values, gates = x.chunk(2, dim)
    return values * torch.sigmoid(freeze(gates))


@rule("pow", "__pow__", "float_power")
def _pow(x: Any, exponent: Any) -> Tensor:
    """A power of at least 1 is a gate; roots and inverse powers belong to statistics and are constants."""
    if not isinstance(x, Tensor) or (isinstance(exponent, Tensor) and exponent.numel() > 1):
        return torch.pow(_frozen(x), _frozen(exponent))
    exponent = float(exponent)
    if exponent == 1:
        return x * 1
    if exponent < 1:
        return torch.pow(freeze(x), exponent)
    return x * torch.pow(freeze(x), exponent - 1)


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return freeze(value)
    if type(value) in (list, tuple):
        return type(value)([_frozen(item) for item in value])
    return value


# Constants, and operations of which some arguments are constants.


def _register_constants() -> None:
    def all_frozen(
        mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with mode:
            args, kwargs = _frozen(args), {name: _frozen(value) for name, value in kwargs.items()}
        return mode.natural(func, args, kwargs)

    names = (
        *(
            "softmax",
            "log_softmax",
            "softmin",
            "gumbel_softmax",
            "sigmoid",
            "expit",
            "hardsigmoid",
            "logsigmoid",
        ),
        *(
            "log_sigmoid",
            "softplus",
            "exp",
            "exp2",
            "log",
            "log2",
            "log10",
            "logit",
            "cos",
            "cosh",
            "acos",
            "asin",
        ),
        *(
            "atanh",
            "acosh",
            "tan",
            "erfc",
            "erfinv",
            "sqrt",
            "rsqrt",
            "reciprocal",
            "sign",
            "sgn",
            "round",
            "floor",
        ),
        *("ceil", "trunc", "fix", "frac", "floor_divide", "remainder", "fmod", "norm", "vector_norm"),
        *(
            "matrix_norm",
            "var",
            "std",
            "var_mean",
            "std_mean",
            "logsumexp",
            "logcumsumexp",
            "prod",
            "cumprod",
        ),
        *(
            "cdist",
            "pairwise_distance",
            "cosine_similarity",
            "atan2",
            "arctan2",
            "hypot",
            "logaddexp",
            "heaviside",
        ),
        *("softmax_", "bucketize", "__rtruediv__", "__rdiv__", "__rpow__", "__floordiv__", "__rfloordiv__"),
        *(
            "__mod__",
            "__rmod__",
            "matrix_exp",
            "det",
            "inverse",
            "inv",
            "pinv",
            "fake_quantize_per_tensor_affine",
        ),
    )
    for name in names:
        _enter(_functions(name), all_frozen)
        inplace = _functions(f"{name}_")
        _enter(inplace, _rewrite(_in_place(_functions(name)[-1])) if inplace else all_frozen)


_register_constants()


def _register_partly_constant() -> None:
    def freezing(position: int, keyword: str) -> Handler:
        def handle(
            mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            values = list(args)
            if len(values) > position:
                values[position] = freeze_in(mode, values[position])
            named = {
                name: freeze_in(mode, value) if name == keyword else value for name, value in kwargs.items()
            }
            if kwargs.get("rounding_mode") is not None:
                values[0] = freeze_in(mode, values[0])
            return mode.natural(func, tuple(values), named)

        return handle

    divisions = ("div", "divide", "true_divide", "__truediv__", "__div__", "__itruediv__", "__idiv__")
    for name in divisions:
        _enter(_functions(name) + _functions(f"{name}_"), freezing(1, "other"))
    _enter(_functions("lerp") + _functions("lerp_"), freezing(2, "weight"))
    _enter(_functions("grid_sample") + _functions("grid_sampler"), freezing(1, "grid"))


def freeze_in(mode: ExplanationMode, value: Any) -> Any:
    return mode.freeze(value) if isinstance(value, Tensor) else value


_register_partly_constant()


# Products. With one live factor they are natural; with several the mode's policy decides.


def _register_products() -> None:
    def multiplying(first: int) -> Handler:
        def handle(
            mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            # Keyword arguments follow the positional ones in the order of the signature; a bias is no factor.
            named = [name for name in kwargs if name not in ("bias", "input")] if first else list(kwargs)
            factors = [*range(first, min(first + 2, len(args))), *(name for name in named if name != "bias")]
            return _product(mode, func, factors, args, kwargs)

        return handle

    elementwise = ("mul", "multiply", "__mul__", "__rmul__")
    matrices = (
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "mv",
        "dot",
        "vdot",
        "vecdot",
        "inner",
        "outer",
    )
    others = ("ger", "kron", "cross", "linalg_cross", "tensordot", "linear", "bilinear")
    convolutions = tuple(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
    for name in (*elementwise, *matrices, *others, *convolutions):
        _enter(_functions(name), multiplying(0))
    for name in ("addmm", "addmv", "addr", "baddbmm", "addbmm", "addcmul"):
        _enter(_functions(name), multiplying(1))
        _enter(_functions(f"{name}_"), _rewrite(_in_place(getattr(torch, name))))
    for name in ("mul_", "multiply_", "__imul__"):
        _enter(_functions(name), _rewrite(_in_place(torch.mul)))
    _enter([torch.einsum], _einsum)


def _product(
    mode: ExplanationMode,
    func: Callable[..., Any],
    factors: Sequence[int | str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """A multilinear operation: with several live factors, the mean of its versions with one live factor each."""
    values: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    live = [slot for slot in factors if requires_gradient(values[slot])]
    if len(live) > 1:
        live = [slot for slot in live if depends_on_input(values[slot])]
    if len(live) < 2:
        return mode.natural(func, args, kwargs)
    if mode.products == "error":
        raise NotLinearError(
            f"`{name_of(func)}` multiplies two tensors that depend on the input; choose how to explain it by "
            '`products="split"` (each factor has half of the contribution) or "first" (the first has it all)'
        )
    kept_slots = live if mode.products == "split" else live[:1]
    terms: list[Tensor] = []
    for kept in kept_slots:
        chosen = {
            slot: freeze_in(mode, value) if slot in live and slot != kept else value
            for slot, value in values.items()
        }
        arguments = tuple(chosen[index] for index in range(len(args)))
        terms.append(mode.natural(func, arguments, {name: chosen[name] for name in kwargs}))
    return terms[0] if len(terms) == 1 else torch.stack(terms).mean(0)


def _einsum(
    mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    operands = args[1] if len(args) == 2 and type(args[1]) in (list, tuple) else args[1:]
    factors = [index for index, value in enumerate(operands, 1) if isinstance(value, Tensor)]
    return _product(mode, func, factors, (args[0], *operands), kwargs)


_register_products()


# Normalisers: the statistic is frozen, the centring stays linear.


@rule(F.layer_norm, torch.layer_norm)
def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return normalize(x, range(-len(normalized_shape), 0), center=True, weight=weight, bias=bias, eps=eps)


@rule("rms_norm")
def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    epsilon = torch.finfo(x.dtype).eps if eps is None else eps
    y = x * torch.rsqrt(freeze(x).square().mean(dims, keepdim=True) + epsilon)
    return y if weight is None else y * weight


@rule(F.group_norm, torch.group_norm)
def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = x.unflatten(1, (num_groups, -1))
    y = normalize(grouped, range(2, grouped.ndim), center=True, eps=eps).reshape(x.shape)
    return _affine(y, weight, bias)


@rule(F.instance_norm)
def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, eps=eps)
    return _affine(normalize(x, range(2, x.ndim), center=True, eps=eps), weight, bias)


@rule(F.batch_norm)
def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # The explicit form: the gradient of torch's CPU kernel is wrong at batch size 1 for some memory layouts.
    if training or running_mean is None or running_var is None:
        raise NotLinearError(
            "batch norm with the statistics of the batch makes each output depend on all images; "
            "call `model.eval()` first (and keep running statistics)"
        )
    mean, var = _per_channel(running_mean, x), _per_channel(running_var, x)
    return _affine(normalize(x, (), center=True, mean=mean, var=var, eps=eps), weight, bias)


@rule(torch.batch_norm)
def _native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


@rule(torch.instance_norm)
def _native_instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x if weight is None else x * _per_channel(weight, x)
    return y if bias is None else y + _per_channel(bias, x)


@rule("normalize")
def _unit_norm(
    x: Tensor, p: float = 2.0, dim: int | Sequence[int] = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    return x / torch.linalg.vector_norm(freeze(x), p, dim, keepdim=True).clamp_min(eps)


@rule("local_response_norm")
def _local_response_norm(
    x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    squares = freeze(x).square().movedim(1, -1)
    windows = F.pad(squares, (size // 2, (size - 1) // 2)).unfold(-1, size, 1).sum(-1) / size
    return x / (k + alpha * windows.movedim(-1, 1)) ** beta


# Attention: the attention matrix is frozen, the values stay linear.


@rule("scaled_dot_product_attention")
def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # Explicit, since the fused kernels have no second derivative.
    if dropout_p > 0:
        raise NotLinearError(
            f"attention dropout (`dropout_p`={dropout_p}) is random; call `model.eval()` first"
        )
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scores = freeze(query) @ freeze(key).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
    elif attn_mask is not None:
        scores = scores + freeze(attn_mask)
    # As in the fused kernels, a query that may attend to nothing has the output 0.
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(nothing, 0.0) @ value


@rule("multi_head_attention_forward")
def _multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if training and dropout_p > 0:
        raise NotLinearError(
            f"attention dropout (`dropout_p`={dropout_p}) is random; call `model.eval()` first"
        )
    # Torch itself computes the attention matrix, with all its masks and extra keys, from frozen arguments.
    frozen = [_frozen(item) for item in (query, key, value)]
    _, weights = F.multi_head_attention_forward(
        *frozen, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, 0.0,
        out_proj_weight, out_proj_bias, False, key_padding_mask, True, attn_mask, use_separate_proj_weight,
        q_proj_weight, k_proj_weight, v_proj_weight, _frozen(static_k), _frozen(static_v), False, is_causal,
    )  # fmt: skip
    if in_proj_weight is not None and not use_separate_proj_weight:
        v_proj_weight = in_proj_weight.chunk(3)[2]
    assert v_proj_weight is not None and weights is not None
    batched = query.ndim == 3
    values = value if batched else value.unsqueeze(1)
    values = F.linear(values, v_proj_weight, None if in_proj_bias is None else in_proj_bias.chunk(3)[2])
    if bias_v is not None:
        values = torch.cat([values, bias_v.expand(1, values.shape[1], -1)])
    heads = (
        values.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        if static_v is None
        else static_v.unflatten(0, (-1, num_heads))
    )
    if add_zero_attn:
        heads = F.pad(heads, (0, 0, 0, 1))
    matrix = weights if batched else weights.unsqueeze(0)
    mixed = (matrix @ heads).permute(2, 0, 1, 3).flatten(2)
    output = F.linear(mixed, out_proj_weight, out_proj_bias)
    averaged = weights.mean(-3) if average_attn_weights else weights
    return output if batched else output.squeeze(1), averaged if need_weights else None
