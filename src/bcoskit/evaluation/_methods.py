"""Attribution methods by name: one callable type, `(model, x, target) -> contributions`."""

from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from bcoskit.evaluation._gradients import (
    bcos,
    deep_lift,
    grad_cam,
    gradient,
    guided_backprop,
    guided_grad_cam,
    input_x_gradient,
    integrated_gradients,
)
from bcoskit.evaluation._method import Method, checked, copied, each_target
from bcoskit.evaluation._perturbing import kernel_shap, lime, occlusion, rise


def attribute(model: nn.Module, x: Tensor, target: Any, method: Any = "bcos") -> Tensor:
    """How much each pixel speaks for each target, by one method.

    The network, which may be any, is not changed: hooks are set on a copy that shares its weights.

    Args:
        model: A network in evaluation mode.
        x: Inputs (N, C, H, W).
        target: One class for all samples, one per sample (N,), or several per sample (N, K).
        method: A name of `METHODS`; a function `(model, x, target) -> contributions`, which is called once per
            target with classes (N,), and may return (N, H, W), (N, 1, H, W), or the shape of `x`, which is summed
            over the channels; or an attribution of captum, a class or one made with this network.

    Returns:
        Contributions (N, H, W), or (N, K, H, W) for several targets per sample, without a graph.

    Raises:
        ValueError: If the method is unknown, does not fit the network, or returns what are no finite contributions;
            or if a target is out of range, of methods by name.
        TypeError: If an argument is of another type.
        ImportError: If the method needs a package that is not installed.
    """
    classes = checked(model, x, target)
    several = classes.ndim == 2
    classes = classes if several else classes[:, None]
    function = resolve(method)
    found = function(model, x, classes).detach()
    wanted = (len(x), classes.shape[1], *x.shape[-2:])
    if found.shape != wanted or not found.is_floating_point():
        raise ValueError(f"`method` (={name_of(method)!r}) returned {found.dtype} of shape {tuple(found.shape)}")
    if not bool(found.isfinite().all()):
        raise ValueError(f"`method` (={name_of(method)!r}) returned values that are not finite")
    return found if several else found.squeeze(1)


def resolve(method: Any) -> Method:
    """A function from classes (N, K) to contributions (N, K, H, W)."""
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"`method` (={method!r}) is unknown; there are: {', '.join(METHODS)}")
        return METHODS[method]
    inner = method
    while isinstance(inner, partial):
        inner = cast("Any", inner.func)
    if inner in METHODS.values():
        return method
    if hasattr(method, "attribute"):
        return partial(each_target, partial(_of_captum, method))
    if not callable(method):
        raise TypeError(f"`method` (={method!r}) must be a name, a function or an attribution of captum")
    return partial(each_target, method)


def name_of(method: Any) -> str:
    """What a method is called in results."""
    if isinstance(method, str):
        return method
    if isinstance(method, partial):
        inner = cast("Any", method.func)
        given = [str(value) for value in method.args] + [f"{key}={value}" for key, value in method.keywords.items()]
        return f"{name_of(inner)}({', '.join(given)})"
    return str(getattr(method, "__name__", type(method).__name__))


def _of_captum(method: Any, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    if isinstance(method, type):
        method = cast("Any", method)(copied(model))
    elif method.forward_func is not model:
        raise ValueError(
            f"`method` (={name_of(method)!r}) was made with another network than the one that is explained: "
            "give its class, or a function"
        )
    try:
        return method.attribute(x, target=target)
    except TypeError as error:
        raise ValueError(
            f"`method` (={name_of(method)!r}) needs arguments: give a function (model, x, target) ({error})"
        ) from error


METHODS: dict[str, Method] = {
    "bcos": bcos,
    "gradient": gradient,
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "deep_lift": deep_lift,
    "guided_backprop": guided_backprop,
    "grad_cam": grad_cam,
    "guided_grad_cam": guided_grad_cam,
    "occlusion": occlusion,
    "lime": lime,
    "kernel_shap": kernel_shap,
    "rise": rise,
}
