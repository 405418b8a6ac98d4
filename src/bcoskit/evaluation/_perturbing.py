"""Attribution by what happens when parts of an image are hidden; each sample is computed once for all targets."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcoskit._probabilities import check_classes, probabilities_of
from bcoskit._random import random_from
from bcoskit.evaluation._method import Chosen, captum_attr, for_any_target
from bcoskit.viz._pictures import photograph

SEED = 42  # of the masks of RISE, LIME and KernelSHAP
_FEWEST_SEGMENTS = 8


@for_any_target
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
            engine = captum_attr().Occlusion(Chosen(model, classes[None]))
            found = engine.attribute(sample[None], shapes, strides, perturbations_per_eval=batch_size)
            maps.append(found.sum(1).to(x.dtype))
    return torch.stack(maps)


@for_any_target
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


@for_any_target
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
        kernel_size: Of quickshift; halved, down to 1, as long as there are fewer than 8 segments.
        features: Number of segments that are shown.
        batch_size: Samples that are computed at once.
        seed: Of the samples.
    """
    from captum._utils.models.linear_model import SkLearnRidge

    def similarity(_original: Any, _perturbed: Any, visible: Tensor, **_: Any) -> Tensor:
        distance = 1 - visible.float().mean().sqrt()  # the cosine to a vector of ones
        return torch.exp(-(distance**2) / (2 * 0.25**2))

    def engine(forward: Any) -> Any:
        return captum_attr().Lime(forward, interpretable_model=SkLearnRidge(alpha=1.0), similarity_func=similarity)

    def shown(weights: Tensor) -> Tensor:
        best = weights.topk(min(features, len(weights))).indices
        mask = torch.zeros_like(weights)
        mask[best] = (weights[best] > 0).to(weights.dtype)
        return mask

    return _by_segments(engine, shown, model, x, target, count, kernel_size, batch_size, seed)


@for_any_target
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
        kernel_size: Of quickshift; halved, down to 1, as long as there are fewer than 8 segments.
        batch_size: Samples that are computed at once.
        seed: Of the samples.
    """

    def per_pixel(weights: Tensor) -> Tensor:
        return weights

    return _by_segments(captum_attr().KernelShap, per_pixel, model, x, target, count, kernel_size, batch_size, seed)


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
    with torch.no_grad():
        for sample, classes in zip(x, target, strict=True):
            segments = _segments(sample, kernel_size)
            number = int(segments.max()) + 1
            hidden = _means(sample, segments, number)[None]
            outputs = _Outputs(model, classes)
            if number == 1:  # there is nothing to compare: all that is hidden counts
                outputs(sample[None])
                outputs(hidden)
                visible, not_visible = outputs.all()
                weights = (visible - not_visible)[:, None]
            else:
                explainer = engine(outputs)
                explainer.interpretable_model = _Regressions(explainer.interpretable_model, outputs)
                with random_from(seed, x.device):
                    weights = explainer.attribute(
                        sample[None],
                        baselines=hidden,
                        feature_mask=segments[None, None],
                        n_samples=count,
                        perturbations_per_eval=batch_size,
                        return_input_shape=False,
                    )
            maps += [shown(each)[segments] for each in weights.to(x)]
    return torch.stack(maps).unflatten(0, tuple(target.shape))


def _segments(sample: Tensor, kernel_size: int) -> Tensor:
    from skimage.segmentation import quickshift

    rgb = photograph(sample).astype(float)
    # Of small images the papers' kernel makes one segment, which says nothing: a narrower one finds parts.
    width = kernel_size
    found = quickshift(rgb, kernel_size=width, max_dist=200, ratio=0.2, rng=SEED)
    while int(found.max()) + 1 < _FEWEST_SEGMENTS and width > 1:
        width //= 2
        found = quickshift(rgb, kernel_size=width, max_dist=200, ratio=0.2, rng=SEED)
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


class _Outputs:
    """The probabilities of the first target, as captum wants them, which keeps those of all targets."""

    def __init__(self, model: nn.Module, classes: Tensor) -> None:
        self._model, self._classes = model, classes
        self._seen: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        self._seen.append(_probabilities(self._model, x, self._classes))
        return self._seen[-1][:, 0]

    def all(self) -> Tensor:
        """Of all samples so far and all targets, (M, K)."""
        return torch.cat(self._seen)


class _Regressions:
    """In the place of captum's regression one of each target, on the same samples."""

    def __init__(self, regression: Any, outputs: _Outputs) -> None:
        self._regression, self._outputs = regression, outputs
        self._weights: list[Tensor] = []

    def fit(self, train_data: Any) -> None:
        samples, _, weights = train_data.dataset.tensors
        for column in self._outputs.all().float().unbind(1):
            self._regression.fit([(samples, column, weights)])
            self._weights.append(self._regression.representation().detach().flatten())

    def representation(self) -> Tensor:
        """Of all targets, (K, segments)."""
        return torch.stack(self._weights)
