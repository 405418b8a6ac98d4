"""Attribution methods by name: one callable type, `(model, x, target) -> contributions`."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcoskit._checks import check_inputs
from bcoskit._explain import explain
from bcoskit._layers import uncompiled
from bcoskit.evaluation._probabilities import probabilities_of

Method: TypeAlias = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a network, inputs (N, C, H, W) and classes (N,) to contributions (N, H, W)."""

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
    check_inputs(model, x)
    if x.ndim != 4:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, must be images (N, C, H, W)")
    classes = torch.as_tensor(target, device=x.device)
    if classes.dtype not in (torch.int64, torch.int32) or classes.ndim > 2:
        raise TypeError(f"`target` (={target!r}) must be class indices, one or several per sample")
    several = classes.ndim == 2
    classes = classes.long().reshape(len(classes), -1) if classes.ndim else classes.long().reshape(1, 1)
    if len(classes) not in (1, len(x)):
        raise ValueError(f"`target` has {len(classes)} rows for {len(x)} samples")
    if int(classes.min()) < 0:
        raise ValueError(f"`target` (={int(classes.min())}) must not be negative")
    function = resolve(method)
    found = function(model, x, classes.expand(len(x), -1)).detach()
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
    if isinstance(method, type) or hasattr(method, "attribute"):
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
    attribution = method(_copy(model)) if isinstance(method, type) else method
    return attribution.attribute(x, target=target)


def bcos(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """`W(x)·x` summed over the channels: `bcoskit.explain`, one forward pass for all targets."""
    return explain(model, x, target).contributions


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The gradient, signed, summed over the channels (captum's `Saliency` with `abs=False`)."""
    return _gradients(model, x, target).sum(2)


def input_x_gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Input times gradient, summed over the channels (captum's `InputXGradient`)."""
    return (_gradients(model, x, target) * x.unsqueeze(1)).sum(2)


def _gradients(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    with torch.enable_grad():
        start = x.detach().clone().requires_grad_()
        return _all_targets(_Chosen(model, target), (start,))[0].movedim(0, 1)


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


def deep_lift(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """DeepLIFT from zeros (Shrikumar et al., ICML 2017) by captum: differences pass activations by the rescale rule."""
    return _hooked(_captum().DeepLift, model, x, target)


def guided_backprop(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Guided Backpropagation (Springenberg et al., 2015) by captum: gradients pass a ReLU if they are positive."""
    return _hooked(_captum().GuidedBackprop, model, x, target)


def _hooked(engine: Callable[[nn.Module], Any], model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    def one(copied: nn.Module, start: Tensor, classes: Tensor) -> Tensor:
        return engine(_Chosen(copied, classes[:, None])).attribute(start, target=0)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"captum\.")  # that it sets hooks, which it does on our copy
        return _each_target(one, _copy(model), x, target)


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
    found: list[tuple[str, tuple[int, ...]]] = []
    handles = [
        module.register_forward_hook(
            lambda _module, _inputs, output, path=path: (
                found.append((path, tuple(output.shape))) if isinstance(output, Tensor) else None
            )
        )
        for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    stages = getattr(model, "stage_names", ())
    named = {path: shape for path, shape in found if path in stages[-1:]}
    inside = [
        (path, shape)
        for path, shape in found
        if path and len(shape) >= 3 and math.prod(shape[2:]) > 1 and shape[1] != logits.shape[-1]
    ]
    path, shape = next(iter(named.items()), None) or (inside[-1] if inside else ("", ()))
    if len(shape) != 4 or (shape[1] == shape[2] != shape[3]):
        end = f"{path!r} returns {shape}" if path else "no layer returns maps"
        raise ValueError(f"`method` (='grad_cam') needs a layer with maps (N, C, H, W) before the classifier: {end}")
    return path


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
        window: Side of the window; by default 32 for inputs of at least 224 pixels, 9 of at least 64, else 5.
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
            maps.append(found.sum(1))
    return torch.stack(maps)


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
    saliency = x.new_zeros(*target.shape, height, width)
    with torch.no_grad():
        for begin in range(0, count, batch_size):
            size = min(batch_size, count - begin)
            grids = (torch.rand(size, 1, cells, cells, generator=generator) < probability).float()
            large = F.interpolate(grids, [(cells + 1) * each for each in cell], mode="bilinear")
            shifts = [torch.randint(each, (size,), generator=generator).tolist() for each in cell]
            masks = torch.stack(
                [
                    mask[0, top : top + height, left : left + width]
                    for mask, top, left in zip(large, *shifts, strict=True)
                ]
            ).to(x)
            for index, sample in enumerate(x):
                chosen = probabilities_of(model, model(sample * masks[:, None]))[:, target[index]]
                saliency[index] += torch.einsum("mk,mhw->khw", chosen, masks)
    return saliency / (count * probability)


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
            found = probabilities_of(self._model, self._model(x))[:, self._classes]
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
        if logits.ndim != 2 or int(self.target.max()) >= logits.shape[1]:
            raise ValueError(
                f"`target` (={int(self.target.max())}) is out of range for an output of shape {tuple(logits.shape)}"
            )
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
