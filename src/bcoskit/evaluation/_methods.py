"""Attribution methods by name: one callable type, `(model, x, target) -> contributions`."""

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcoskit._checks import check_inputs
from bcoskit._explain import explain
from bcoskit._layers import uncompiled
from bcoskit.evaluation._probabilities import check_classes, probabilities_of
from bcoskit.nn import ClassifierHead

Method: TypeAlias = Callable[..., Tensor]
"""From a network, inputs (N, C, H, W) and classes (N,) to contributions (N, H, W).

Those of `METHODS` also take several classes per sample, (N, K), to (N, K, H, W).
"""

_Parameters = ParamSpec("_Parameters")

SEED = 42  # of the masks of RISE, LIME and KernelSHAP


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
            or if a target is out of range.
        TypeError: If an argument is of another type.
        ImportError: If the method needs a package that is not installed.
    """
    classes = _checked(model, x, target)
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


def _checked(model: nn.Module, x: Tensor, target: Any) -> Tensor:
    """Classes of all samples, (N,) or (N, K)."""
    check_inputs(model, x)
    if x.ndim != 4:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, must be images (N, C, H, W)")
    classes = torch.as_tensor(target, device=x.device)
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool or classes.ndim > 2:
        raise TypeError(f"`target` (={target!r}) must be class indices, one or several per sample")
    if classes.numel() == 0 or (classes.ndim and len(classes) not in (1, len(x))):
        raise ValueError(f"`target` has {len(classes)} rows for {len(x)} samples")
    if int(classes.min()) < 0:
        raise ValueError(f"`target` (={int(classes.min())}) must not be negative")
    return classes.long().expand(len(x), *classes.shape[1:])


def _for_any_target(function: Callable[_Parameters, Tensor]) -> Callable[_Parameters, Tensor]:
    """A method for classes (N, K), for one class per sample as well."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Tensor:
        given: Any = args
        model, x, target = given
        classes = _checked(model, x, target)
        if classes.ndim == 2:
            return cast("Any", function)(model, x, classes, **kwargs)
        return cast("Any", function)(model, x, classes[:, None], **kwargs).squeeze(1)

    return call


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
        return partial(_each_target, partial(_of_captum, method))
    if not callable(method):
        raise TypeError(f"`method` (={method!r}) must be a name, a function or an attribution of captum")
    return partial(_each_target, method)


def name_of(method: Any) -> str:
    """What a method is called in results."""
    if isinstance(method, str):
        return method
    if isinstance(method, partial):
        inner = cast("Any", method.func)
        given = [str(value) for value in method.args] + [f"{key}={value}" for key, value in method.keywords.items()]
        return f"{name_of(inner)}({', '.join(given)})"
    return str(getattr(method, "__name__", type(method).__name__))


def _each_target(function: Any, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    columns: list[Tensor] = []
    for classes in target.unbind(1):
        found = function(model, x.detach().clone().requires_grad_(), classes)
        if not isinstance(found, Tensor):
            raise TypeError(f"`method` must return a tensor, not {type(found).__name__}")
        found = found.detach()
        columns.append(found.sum(1) if found.ndim == 4 else found)
    return torch.stack(columns, 1)


def _of_captum(method: Any, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    if isinstance(method, type):
        method = cast("Any", method)(_copy(model))
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


@_for_any_target
def bcos(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """`W(x)·x` summed over the channels: `bcoskit.explain`, one forward pass for all targets."""
    return explain(model, x, target).contributions


@_for_any_target
def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The gradient, signed, summed over the channels (captum's `Saliency` with `abs=False`)."""
    return _gradients(model, x, target).sum(2)


@_for_any_target
def input_x_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Input times gradient, summed over the channels (captum's `InputXGradient`)."""
    return (_gradients(model, x, target) * x.unsqueeze(1)).sum(2)


def _gradients(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with torch.enable_grad():
        start = x.detach().clone().requires_grad_()
        return _all_targets(_Chosen(model, target), (start,))[0].movedim(0, 1)


@_for_any_target
def integrated_gradients(
    model: nn.Module, x: Tensor, target: Tensor, *, steps: int = 50, batch_size: int = 8
) -> Tensor:
    """Integrated Gradients from zeros (Sundararajan et al., ICML 2017) by captum, one forward pass for all targets.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        steps: Points of the Gauss-Legendre quadrature.
        batch_size: Points that are computed at once, times N.
    """
    attr = _captum()
    engine = attr.IntegratedGradients(_Chosen(model, target), multiply_by_inputs=False)

    def gradients(forward_fn: Any, inputs: Any, **_: Any) -> tuple[Tensor, ...]:
        return tuple(found.movedim(0, 1) for found in _all_targets(forward_fn, inputs))

    engine.gradient_func = gradients
    start = x.detach().clone().requires_grad_()
    found = engine.attribute(start, n_steps=steps, internal_batch_size=batch_size * len(x))
    return (found * x.unsqueeze(1)).sum(2)


@_for_any_target
def deep_lift(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """DeepLIFT from zeros (Shrikumar et al., ICML 2017) by captum: differences pass activations by the rescale rule."""
    return _hooked(_captum().DeepLift, model, x, target)


@_for_any_target
def guided_backprop(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Guided Backpropagation (Springenberg et al., 2015) by captum: gradients pass a ReLU if they are positive."""
    return _hooked(_captum().GuidedBackprop, model, x, target)


def _hooked(engine: Callable[[nn.Module], Any], model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    def one(copied: nn.Module, start: Tensor, classes: Tensor) -> Tensor:
        return engine(_Chosen(copied, classes[:, None])).attribute(start, target=0)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"captum\.")  # that it sets hooks, which it does on our copy
        return _each_target(one, _copy(model), x, target)


@_for_any_target
def grad_cam(model: nn.Module, x: Tensor, target: Tensor, *, layer: str | None = None) -> Tensor:
    """Grad-CAM (Selvaraju et al., ICCV 2017) by captum, brought to the size of the input by nearest neighbours.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        layer: Path of the layer whose maps are weighted; by default the last one that has maps.

    Raises:
        ValueError: If the network has no such layer.
    """
    attr = _captum()
    whole = _copy(model)
    path = last_map(whole, x[:1]) if layer is None else layer
    try:
        chosen = whole.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"`layer` (={path!r}) is no layer of the network") from error
    start = x.detach().clone().requires_grad_()
    maps = [
        attr.LayerGradCam(_Chosen(whole, column), chosen).attribute(start, target=0, relu_attributions=True)
        for column in target.split(1, 1)
    ]
    if maps[0].ndim != 4:
        raise ValueError(f"`layer` (={path!r}) has no maps, but {tuple(maps[0].shape)}: Grad-CAM needs (N, C, H, W)")
    return F.interpolate(torch.cat(maps, 1).detach(), x.shape[-2:], mode="nearest")


def last_map(model: nn.Module, x: Tensor) -> str:
    """Path of the last layer whose output is maps: of a network by name its last stage.

    Raises:
        ValueError: If what comes before the classifier is no map (N, C, H, W), as in transformers.
    """
    found: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def note(path: str, module: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3 and math.prod(output.shape[2:]) > 1:
            found.append((path, module, tuple(output.shape)))

    handles = [
        module.register_forward_hook(lambda module, _inputs, output, path=path: note(path, module, output))
        for path, module in model.named_modules()
        if path
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    stages = getattr(model, "stage_names", ())
    heads = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, ClassifierHead))
    named = [each for each in found if each[0] in stages[-1:]]
    before = [each for each in found if not f"{each[0]}.".startswith(heads)] if heads else found
    if not named and not before:
        raise ValueError("`method` (='grad_cam') needs a layer with maps (N, C, H, W): no layer returns maps")
    path, module, shape = (named or before)[-1]
    # Layers that work on the last axis have the channels there.
    channels_last = isinstance(module, (nn.Linear, nn.LayerNorm)) and "2d" not in type(module).__name__
    if len(shape) != 4 or channels_last:
        raise ValueError(
            "`method` (='grad_cam') needs a layer with maps (N, C, H, W) before the classifier, but "
            f"{path!r} returns {shape}"
        )
    return path


@_for_any_target
def occlusion(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 32,
) -> Tensor:
    """How much the logit falls when a window is set to 0 (Zeiler and Fergus, ECCV 2014), by captum, for all targets.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        window: Side of the window; by default 32 for inputs of at least 224 pixels, 9 of at least 64, else 5. (The
            authors' windows have a pixel less where the side is odd.)
        stride: Step of the window; by default 32, 4 and 2.
        batch_size: Windows that are computed at once.
    """
    side = min(x.shape[-2:])
    size, step = (32, 32) if side >= 224 else (9, 4) if side >= 64 else (5, 2)
    size, step = (size if window is None else window), (step if stride is None else stride)
    if not 1 <= size <= side:
        raise ValueError(f"`window` (={size}) must be between 1 and {side}, the side of the images")
    if not 1 <= step <= size:
        raise ValueError(f"`stride` (={step}) must be between 1 and the side of the window, {size}")
    shapes, strides = (x.shape[1], size, size), (x.shape[1], step, step)
    maps: list[Tensor] = []
    with torch.no_grad():
        for sample, classes in zip(x, target, strict=True):
            engine = _captum().Occlusion(_Chosen(model, classes[None]))
            found = engine.attribute(sample[None], shapes, strides, perturbations_per_eval=batch_size)
            maps.append(found.sum(1).to(x.dtype))
    return torch.stack(maps)


@_for_any_target
def rise(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    count: int = 500,
    cells: int = 8,
    probability: float = 0.1,
    batch_size: int = 32,
    seed: int = SEED,
) -> Tensor:
    """RISE (Petsiuk et al., BMVC 2018): the mean of random masks, weighted by the class's probability behind them.

    `Σ_i p(mask_i · x) · mask_i / (count · probability)`; a mask is a grid of `cells` × `cells` zeros and ones,
    enlarged bilinearly and shifted at random.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        count: Number of masks, the same for all samples.
        cells: Cells of a mask along each side.
        probability: Of a cell to be visible.
        batch_size: Masks that are computed at once.
        seed: Of the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    height, width = x.shape[-2:]
    cell = [math.ceil(size / cells) for size in (height, width)]
    grids = (torch.rand(count, 1, cells, cells, generator=generator) < probability).float()
    shifts = torch.stack([torch.randint(each, (count,), generator=generator) for each in cell], 1)
    saliency = x.new_zeros(*target.shape, height, width)
    with torch.no_grad():
        for few, places in zip(grids.split(batch_size), shifts.split(batch_size), strict=True):
            large = F.interpolate(few, [(cells + 1) * each for each in cell], mode="bilinear")[:, 0]
            parts = [
                mask[top : top + height, left : left + width]
                for mask, (top, left) in zip(large, places.tolist(), strict=True)
            ]
            masks = torch.stack(parts).to(x)
            for index, sample in enumerate(x):
                chosen = _probabilities(model, sample * masks[:, None], target[index])
                saliency[index] += torch.einsum("mk,mhw->khw", chosen, masks)
    return saliency / (count * probability)


@_for_any_target
def lime(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    count: int = 500,
    kernel_size: int = 4,
    features: int = 5,
    batch_size: int = 32,
    seed: int = SEED,
) -> Tensor:
    """LIME (Ribeiro et al., KDD 2016) by captum: 1 on the segments with the largest positive weights, 0 elsewhere.

    Segments are those of quickshift; hidden ones get their mean colour; a ridge regression of the probabilities,
    samples weighted by an exponential kernel (width 0.25) of the cosine distance.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        count: Number of samples, the same for all targets of an image.
        kernel_size: Of quickshift.
        features: Number of segments that are shown.
        batch_size: Samples that are computed at once.
        seed: Of the samples.
    """
    from captum._utils.models.linear_model import SkLearnRidge

    def similarity(_original: Any, _perturbed: Any, visible: Tensor, **_: Any) -> Tensor:
        distance = 1 - visible.float().mean().sqrt()  # the cosine to a vector of ones
        return torch.exp(-(distance**2) / (2 * 0.25**2))

    def engine(forward: Any) -> Any:
        return _captum().Lime(forward, interpretable_model=SkLearnRidge(alpha=1.0), similarity_func=similarity)

    def shown(weights: Tensor) -> Tensor:
        best = weights.topk(min(features, len(weights))).indices
        mask = torch.zeros_like(weights)
        mask[best] = (weights[best] > 0).to(weights.dtype)
        return mask

    return _by_segments(engine, shown, model, x, target, count, kernel_size, batch_size, seed)


@_for_any_target
def kernel_shap(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    count: int = 500,
    kernel_size: int = 4,
    batch_size: int = 32,
    seed: int = SEED,
) -> Tensor:
    """KernelSHAP (Lundberg and Lee, NeurIPS 2017) by captum: Shapley values of the segments of quickshift.

    Args:
        model: The network.
        x: Inputs (N, C, H, W).
        target: Classes (N, K).
        count: Number of samples, the same for all targets of an image.
        kernel_size: Of quickshift.
        batch_size: Samples that are computed at once.
        seed: Of the samples.
    """

    def per_pixel(weights: Tensor) -> Tensor:
        return weights

    return _by_segments(_captum().KernelShap, per_pixel, model, x, target, count, kernel_size, batch_size, seed)


def _by_segments(
    engine: Callable[[Any], Any],
    shown: Callable[[Tensor], Tensor],
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    count: int,
    kernel_size: int,
    batch_size: int,
    seed: int,
) -> Tensor:
    maps: list[Tensor] = []
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), torch.no_grad():
        for sample, classes in zip(x, target, strict=True):
            segments = _segments(sample, kernel_size)
            number = int(segments.max()) + 1
            hidden = _means(sample, segments, number)[None]
            forward = _Replayed(model, classes)
            for _ in classes:
                if number == 1:  # there is nothing to compare: all that is hidden counts
                    weights = forward(sample[None]) - forward(hidden)
                else:
                    torch.manual_seed(seed)
                    weights = engine(forward).attribute(
                        sample[None],
                        baselines=hidden,
                        feature_mask=segments[None, None],
                        n_samples=count,
                        perturbations_per_eval=batch_size,
                        return_input_shape=False,
                    )
                maps.append(shown(weights.flatten().to(x))[segments])
                forward.next_target()
    return torch.stack(maps).unflatten(0, tuple(target.shape))


def _segments(sample: Tensor, kernel_size: int) -> Tensor:
    from skimage.segmentation import quickshift

    rgb = sample[:3].movedim(0, -1).double()
    if rgb.shape[-1] != 3:
        rgb = rgb[..., :1].expand(*rgb.shape[:-1], 3)
    low, high = rgb.aminmax()
    if low < 0 or high > 1:  # of normalised channels
        rgb = (rgb - low) / (high - low)
    found = quickshift(rgb.cpu().numpy(), kernel_size=kernel_size, max_dist=200, ratio=0.2, rng=SEED)
    return torch.from_numpy(found).long().to(sample.device)


def _means(sample: Tensor, segments: Tensor, number: int) -> Tensor:
    """Every pixel in the mean colour of its segment."""
    flat = segments.flatten()
    sums = sample.new_zeros(len(sample), number).index_add_(1, flat, sample.flatten(1))
    return (sums / flat.bincount(minlength=number))[:, flat].view_as(sample)


def _probabilities(model: nn.Module, x: Tensor, classes: Tensor) -> Tensor:
    """Of classes (K,), for all samples: (N, K)."""
    logits = model(x)
    check_classes(classes.tolist(), logits)
    return probabilities_of(model, logits)[:, classes]


class _Replayed:
    """The probabilities of one target of an image, and then of the next, on the same sequence of samples.

    Each sample is computed once: its methods ask for the same ones again for each target, since they are seeded.
    """

    def __init__(self, model: nn.Module, classes: Tensor) -> None:
        self._model, self._classes = model, classes
        self._index = 0
        self._position = itertools.count()
        self._seen: list[tuple[Tensor, Tensor]] = []

    def next_target(self) -> None:
        self._index += 1
        self._position = itertools.count()

    def __call__(self, x: Tensor) -> Tensor:
        position = next(self._position)
        if position == len(self._seen):
            found = _probabilities(self._model, x, self._classes)
            self._seen.append((x.sum((1, 2, 3)), found))
        check, found = self._seen[position]
        assert torch.equal(check, x.sum((1, 2, 3))), "samples of another target differ"
        return found[:, self._index]


class _Chosen(nn.Module):
    """A network whose outputs are the logits of some targets: (M, C, H, W) to (M, K), M a multiple of N."""

    def __init__(self, model: Callable[..., Any], target: Tensor) -> None:
        super().__init__()
        self.model = model
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        check_classes(self.target.flatten().tolist(), logits)
        return logits.gather(1, self.target.repeat(len(logits) // len(self.target), 1))


def _all_targets(forward: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of all targets by one forward pass, (K, N, C, H, W)."""
    with torch.enable_grad():
        outputs = forward() if not isinstance(forward, nn.Module) else forward(*inputs)
        columns = outputs.sum(0)
        rows = [
            torch.autograd.grad(column, inputs, retain_graph=index + 1 < len(columns))
            for index, column in enumerate(columns)
        ]
    return tuple(torch.stack(found) for found in zip(*rows, strict=True))


def _copy(model: nn.Module) -> nn.Module:
    """A network that shares all tensors, for hooks; its activations write to no input, which hooks forbid."""
    original: Any = uncompiled(model)
    tensors = itertools.chain(original.parameters(), original.buffers())
    copied = copy.deepcopy(original, {id(tensor): tensor for tensor in tensors})
    for module in copied.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return copied


def _captum() -> Any:
    try:
        import captum.attr
    except ModuleNotFoundError as error:
        raise ImportError(f"this method needs {error.name}: pip install 'bcoskit[eval]'") from error
    return captum.attr


METHODS: dict[str, Method] = {
    "bcos": bcos,
    "gradient": gradient,
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "deep_lift": deep_lift,
    "guided_backprop": guided_backprop,
    "grad_cam": grad_cam,
    "occlusion": occlusion,
    "lime": lime,
    "kernel_shap": kernel_shap,
    "rise": rise,
}
