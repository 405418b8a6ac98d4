"""Constants, and operations of which some arguments are constants."""

from collections.abc import Callable
from typing import Any

import torch

from bcoskit.dynamic._mode import ExplanationMode, Handler, NotLinearError, name_of, writes
from bcoskit.dynamic.rules._table import enter, functions, in_place, rewrite

_CONSTANTS = """
    softmax log_softmax softmin gumbel_softmax sigmoid expit hardsigmoid logsigmoid log_sigmoid softplus exp
    exp2 log log2 log10 logit cos cosh acos asin atanh acosh tan erfc erfinv sqrt rsqrt reciprocal sign sgn
    round floor ceil trunc fix frac heaviside floor_divide remainder fmod norm vector_norm matrix_norm var std
    var_mean std_mean logsumexp logcumsumexp logaddexp prod cumprod cdist pairwise_distance cosine_similarity
    atan2 arctan2 hypot matrix_exp det inverse inv pinv __rtruediv__ __rdiv__ __rpow__ __floordiv__
    __rfloordiv__ __mod__ __rmod__
""".split()


def _all_frozen(mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = {name: _freeze(mode, value) for name, value in kwargs.items()}
    inplace = named.pop("inplace", False)
    output = mode.natural(func, tuple(_freeze(mode, value) for value in args), named)
    if not inplace:
        return output
    with mode:
        return args[0].copy_(output)


def _freezing(position: int, keyword: str) -> Handler:
    """Freeze one argument: a divisor, a weight, a grid."""

    def handle(mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("rounding_mode") is not None:
            if writes(func, kwargs):
                return rewrite(in_place(torch.div))(mode, func, args, kwargs)
            return _all_frozen(mode, func, args, kwargs)
        values = tuple(_freeze(mode, value) if index == position else value for index, value in enumerate(args))
        named = {name: _freeze(mode, value) if name == keyword else value for name, value in kwargs.items()}
        return mode.natural(func, values, named)

    return handle


def _freeze(mode: ExplanationMode, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return mode.freeze(value)
    if type(value) in (list, tuple):
        return type(value)([_freeze(mode, item) for item in value])
    return value


def _refuse_hook(mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise NotLinearError("a hook on a tensor may change its gradient, and W(x) with it: remove the hook to explain")


def _dropout(mode: ExplanationMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    if named.get("training", named.get("train", True)) and named.get("p", 0.5) > 0:
        raise NotLinearError(
            f"`{name_of(func)}` is random, so that no output has one explanation: give it `training=self.training`"
        )
    return mode.natural(func, args, kwargs)


def _register() -> None:
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
        enter(functions(name) + functions(f"{name}_"), _dropout)
    enter(functions("register_hook"), _refuse_hook)
    for name in _CONSTANTS:
        enter(functions(name), _all_frozen)
        for write in functions(f"{name}_"):
            enter([write], rewrite(in_place(functions(name)[-1])))
    for name in ("div", "divide", "true_divide", "__truediv__", "__div__", "__itruediv__", "__idiv__"):
        enter(functions(name) + functions(f"{name}_"), _freezing(1, "other"))
    enter(functions("lerp") + functions("lerp_"), _freezing(2, "weight"))
    enter(functions("grid_sample") + functions("grid_sampler"), _freezing(1, "grid"))


_register()
