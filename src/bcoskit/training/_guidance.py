"""Losses on explanations: where a network may find its reasons, and that a student has those of its teacher.

They take contributions that are differentiable, of `bcoskit.explain(model, x, target, create_graph=True)`.
"""

import torch
from torch import Tensor


def energy_loss(contributions: Tensor, masks: Tensor) -> Tensor:
    """One minus the share of the positive contributions inside: `mean (1 - Σ_inside c⁺ / Σ c⁺)`.

    Rao et al., "Studying How to Efficiently and Effectively Guide Models with Explanations", ICCV 2023, section 3.3.

    Args:
        contributions: (N, H, W), of at least one sample.
        masks: (N, H, W), 1 where the reasons are to be, 0 elsewhere, or between.

    Returns:
        A value in [0, 1]; 1 for samples without positive contributions, without a gradient.

    Raises:
        ValueError: If the shapes differ, there is no sample, or masks go beyond [0, 1].
    """
    masks = _masks(contributions, masks)
    positive = contributions.clamp_min(0)
    total = positive.flatten(1).sum(1)
    inside = (positive * masks).flatten(1).sum(1)
    return (1 - inside / total.clamp_min(torch.finfo(total.dtype).tiny)).mean()


def l1_loss(contributions: Tensor, masks: Tensor) -> Tensor:
    """`mean |c⁺ / max c⁺ - mask|`: positive contributions, the largest of each sample 1, are to be the mask itself.

    Rao et al., ICCV 2023, section 3.3. Arguments and errors are those of `energy_loss`.
    """
    masks = _masks(contributions, masks)
    positive = contributions.clamp_min(0)
    largest = positive.flatten(1).amax(1).clamp_min(torch.finfo(positive.dtype).tiny)
    return (positive / largest[:, None, None] - masks).abs().mean()


def right_reasons_loss(contributions: Tensor, masks: Tensor) -> Tensor:
    """`mean over samples of Σ_outside c²`: nothing outside may count, for or against (Ross et al., IJCAI 2017).

    Arguments and errors are those of `energy_loss`.
    """
    masks = _masks(contributions, masks)
    return (contributions * (1 - masks)).square().flatten(1).sum(1).mean()


def matching_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`mean (1 - cos(c_student, c_teacher))`: the student is to have its teacher's reasons.

    Parchami-Araghi et al., "Good Teachers Explain: Explanation-Enhanced Knowledge Distillation", ECCV 2024, eq. 2.

    Args:
        student: Contributions (N, H, W), differentiable.
        teacher: Those of the teacher, which get no gradient.

    Returns:
        A value in [0, 2], whatever the size of the contributions; 1 for samples without any, without a gradient.

    Raises:
        ValueError: If the shapes differ, or there is no sample.
    """
    _check(student, teacher)
    return (1 - torch.cosine_similarity(_rows(student), _rows(teacher.detach()), dim=1)).mean()


def _rows(maps: Tensor) -> Tensor:
    """A row for each sample, of which the largest value is 1: torch's cosine is not that of small ones."""
    rows = maps.flatten(1)
    largest = rows.detach().abs().amax(1, keepdim=True)
    return rows / torch.where(largest == 0, torch.inf, largest)


def _masks(contributions: Tensor, masks: Tensor) -> Tensor:
    """Masks of the type of the contributions that they go with."""
    _check(contributions, masks)
    masks = masks.to(contributions.dtype)
    low, high = (float(bound) for bound in masks.aminmax())
    if not (low >= 0 and high <= 1):  # so written, NaN fails as well
        raise ValueError(f"`masks` must have values from 0 to 1, got values from {low:g} to {high:g}")
    return masks


def _check(contributions: Tensor, others: Tensor) -> None:
    if contributions.ndim != 3 or contributions.shape != others.shape or not contributions.numel():
        raise ValueError(
            f"contributions of shape {tuple(contributions.shape)} and what they are compared with, of shape "
            f"{tuple(others.shape)}, must both be (N, H, W), of at least one sample"
        )
