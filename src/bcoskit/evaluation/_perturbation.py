"""Curves of perturbation: what becomes of a class when pixels vanish or appear in the order of their contributions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from bcoskit._checks import check_evaluation_mode
from bcoskit._probabilities import check_classes, probabilities_of
from bcoskit.evaluation._images import DrawnImages, Explained, image_rows, inputs_and_targets
from bcoskit.evaluation._loop import run_metric
from bcoskit.evaluation._methods import attribute
from bcoskit.evaluation._result import Result, Row

Baseline: TypeAlias = Literal["zero", "mean", "blur"]
"""What stands in the place of a pixel: 0 in all channels, the mean of the image, or the blurred image."""
Kind: TypeAlias = Literal["deletion", "insertion", "perturbation"]
"""Which way pixels go, and in which order."""


def perturbation_curve(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    contributions: Tensor,
    *,
    least_first: bool = False,
    insert: bool = False,
    baseline: Baseline = "zero",
    steps: int = 32,
    patch: int = 1,
    batch_size: int = 64,
) -> Tensor:
    """Probability of the target while pixels are replaced, or put back, in the order of their contributions.

    At step `s` of `steps` the first `round(s / steps · patches)` patches are replaced by the baseline; with `insert`
    all others are. Ties are broken by the place, from the top left.

    Args:
        model: A network in evaluation mode.
        x: Inputs (N, C, H, W).
        target: Classes (N,).
        contributions: (N, H, W); of a patch they are added.
        least_first: Whether the smallest contributions, the most negative, come first.
        insert: Whether the curve begins with the baseline everywhere, and pixels of the image appear.
        baseline: What stands in the place of a pixel.
        steps: Number of steps.
        patch: Side of the patches that are replaced as a whole.
        batch_size: Inputs that are computed at once.

    Returns:
        Probabilities (N, steps + 1).

    Raises:
        ValueError: If an argument is out of its range or does not fit, the network is in training mode, or its logits
            are not finite.
    """
    check_evaluation_mode(model)
    if target.shape != (len(x),):
        raise ValueError(f"`target` has shape {tuple(target.shape)}, must be one class per sample, ({len(x)},)")
    if contributions.shape != (len(x), *x.shape[-2:]):
        raise ValueError(f"`contributions` have shape {tuple(contributions.shape)}, must be one per pixel of `x`")
    if not bool(contributions.isfinite().all()):
        raise ValueError("`contributions` hold values that are not finite, which have no order")
    if patch < 1 or x.shape[-1] % patch or x.shape[-2] % patch:
        raise ValueError(f"`patch` (={patch}) must divide the sides of `x`, {tuple(x.shape[-2:])}")
    if steps < 1:
        raise ValueError(f"`steps` (={steps}) must be at least 1")
    order = (
        F.avg_pool2d(contributions[:, None], patch).flatten(1).argsort(dim=1, descending=not least_first, stable=True)
    )
    count = order.shape[1]
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=x.device).expand_as(order))
    rank = rank.view(len(x), 1, x.shape[-2] // patch, x.shape[-1] // patch)
    rank = rank.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    instead = _baseline(x, baseline)
    curves: list[Tensor] = []
    with torch.no_grad():
        for index in range(len(x)):
            reached = torch.tensor([round(step / steps * count) for step in range(steps + 1)], device=x.device)
            changed = rank[index] < reached.view(-1, 1, 1, 1)
            first, second = (x[index], instead[index]) if insert else (instead[index], x[index])
            inputs = torch.where(changed, first, second)
            logits = torch.cat([model(part) for part in inputs.split(batch_size)])
            check_classes([int(target[index])], logits)
            curves.append(probabilities_of(model, logits)[:, target[index]])
    return torch.stack(curves)


def _baseline(x: Tensor, baseline: Baseline) -> Tensor:
    if baseline == "zero":
        return torch.zeros_like(x)
    if baseline == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    if baseline == "blur":
        side = min(x.shape[-2:])
        sigma = max(side * 5 / 224, 0.5)  # RISE blurs photographs of 224 pixels by 5 pixels, cut off at 11
        width = min(max(2 * round(side * 5 / 224) + 1, 3), side - 1 + side % 2)
        return gaussian_blur(x, [width, width], [sigma, sigma])
    raise ValueError(f"`baseline` (={baseline!r}) must be 'zero', 'mean' or 'blur'")


def area_under(curves: Tensor) -> Tensor:
    """Mean height of curves (..., steps + 1), by trapezoids: (...,)."""
    return torch.trapezoid(curves, dim=-1) / (curves.shape[-1] - 1)


@dataclass(frozen=True)
class Perturbation(DrawnImages):
    """Areas under the curves of perturbation: see `deletion`, `insertion` and `perturbation`.

    Attributes:
        kind: "deletion" (pixels vanish, the most important first), "insertion" (they appear), or "perturbation" (they
            vanish, the least important first).
        baseline: As of `perturbation_curve`; by default "blur" for insertion, else "zero".
        steps: As of `perturbation_curve`.
        patch: As of `perturbation_curve`.
    """

    kind: Kind
    baseline: Baseline | None = None
    steps: int = 32
    patch: int = 1

    @property
    def name(self) -> str:
        """The kind."""
        return self.kind

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("deletion", "insertion", "perturbation"):
            raise ValueError(f"`kind` (={self.kind!r}) must be 'deletion', 'insertion' or 'perturbation'")
        if self.baseline not in (None, "zero", "mean", "blur"):
            raise ValueError(f"`baseline` (={self.baseline!r}) must be 'zero', 'mean' or 'blur'")
        for name in ("steps", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be at least 1")

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[int], method: Any) -> list[list[Row]]:
        """Curve and area of some images."""
        x, target = inputs_and_targets(model, dataset, units, self.explained)
        curves = perturbation_curve(
            model,
            x,
            target,
            attribute(model, x, target, method),
            least_first=self.kind == "perturbation",
            insert=self.kind == "insertion",
            baseline=self.baseline or ("blur" if self.kind == "insertion" else "zero"),
            steps=self.steps,
            patch=self.patch,
        )
        return image_rows(units, target, {"score": area_under(curves).tolist(), "curve": curves.tolist()})


def deletion(
    model: nn.Module,
    dataset: Any,
    method: Any = "bcos",
    *,
    count: int | None = None,
    baseline: Baseline = "zero",
    steps: int = 32,
    patch: int = 1,
    explained: Explained = "predicted",
    seed: int = 42,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Result:
    """Area under the probability while pixels vanish, the largest contributions first; low is good.

    Petsiuk et al., RISE, BMVC 2018; Samek et al., 2017, for patches. The probability is a softmax where the network
    has `loss = "cross_entropy"`, else a sigmoid.

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, label).
        method: Attribution method, see `attribute`.
        count: Number of images, drawn at random; None for all.
        baseline: What stands in the place of a pixel.
        steps: Number of steps.
        patch: Side of the patches that vanish as a whole.
        explained: Which class of an image.
        seed: Of the draw.
        batch_size: Images at once.
        progress: Called as `progress(done, total)`.

    Returns:
        A row for each image, with its area as `score` and its `curve`.

    Raises:
        ValueError: If an argument is out of its range, or the method does not fit the network.
    """
    metric = Perturbation("deletion", baseline, steps, patch, count=count, explained=explained, seed=seed)
    return run_metric(metric, model, dataset, method, batch_size=batch_size, progress=progress)


def insertion(
    model: nn.Module,
    dataset: Any,
    method: Any = "bcos",
    *,
    count: int | None = None,
    baseline: Baseline = "blur",
    steps: int = 32,
    patch: int = 1,
    explained: Explained = "predicted",
    seed: int = 42,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Result:
    """Area under the probability while pixels appear, the largest contributions first; high is good.

    Petsiuk et al., RISE, BMVC 2018. Arguments, result and errors are those of `deletion`.
    """
    metric = Perturbation("insertion", baseline, steps, patch, count=count, explained=explained, seed=seed)
    return run_metric(metric, model, dataset, method, batch_size=batch_size, progress=progress)


def perturbation(
    model: nn.Module,
    dataset: Any,
    method: Any = "bcos",
    *,
    count: int | None = None,
    baseline: Baseline = "zero",
    steps: int = 32,
    patch: int = 1,
    explained: Explained = "predicted",
    seed: int = 42,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Result:
    """Area under the probability while pixels vanish, the least important first; high is good.

    Srinivas and Fleuret, NeurIPS 2019. Arguments, result and errors are those of `deletion`.
    """
    metric = Perturbation("perturbation", baseline, steps, patch, count=count, explained=explained, seed=seed)
    return run_metric(metric, model, dataset, method, batch_size=batch_size, progress=progress)
