"""Augmentation of batches of pixels that a seed determines."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from torch import Tensor
from torchvision.transforms import v2

from bcoskit._random import random_from
from bcoskit.data import random_crop_flip
from bcoskit.training._options import Augmentation

# Of the colours of ImageNet in [0, 1]: a column is an axis, and its deviation along it.
_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_DEVIATIONS = (0.2175, 0.0188, 0.0045)


def augment(
    images: Tensor, options: Augmentation, generator: torch.Generator, part: tuple[int, int] = (0, 1)
) -> Tensor:
    """New pixels (N, 3, H, W), each image by itself; of the same size, unless the options have another one.

    Args:
        images: uint8 (N, 3, H, W).
        options: What is done.
        generator: The source of all that is random.
        part: Index and number of parts: the batch is one of so many equal parts of a whole, and is changed as it would
            be within it.
    """
    if options.crop == "padded":
        images = random_crop_flip(images, max(images.shape[-1] // 8, 1), generator=generator, part=part)
    size = (images.shape[-2], images.shape[-1]) if options.size is None else (options.size, options.size)
    transform = _per_image(options, size)
    if transform is None:
        return images
    return one_by_one(images, transform, generator, part)


def one_by_one(
    images: Tensor, transform: Callable[[Tensor], Tensor], generator: torch.Generator, part: tuple[int, int] = (0, 1)
) -> Tensor:
    """Each image changed by itself, by a transform that draws from torch's source: see `augment`."""
    count = len(images)
    seeds = torch.randint(2**62, (count * part[1],), generator=generator)[count * part[0] :].tolist()
    changed: list[Tensor] = []
    for image, seed in zip(images, seeds, strict=False):
        with random_from(seed):
            changed.append(transform(image))
    return torch.stack(changed)


def after_cropping(options: Augmentation) -> Augmentation:
    """What is left for a batch of images that are random crops already."""
    if options.crop != "resized":
        return options
    return replace(options, crop="none", size=None, smallest=Augmentation.smallest)


def _per_image(options: Augmentation, size: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
    bilinear = v2.InterpolationMode.BILINEAR
    steps: list[Any] = []
    if options.crop == "resized":
        steps.append(v2.RandomResizedCrop(size, scale=(options.smallest, 1.0), antialias=True))
    if options.flip and options.crop != "padded":
        steps.append(v2.RandomHorizontalFlip())
    if options.policy == "randaugment":
        steps.append(v2.RandAugment(magnitude=options.magnitude, interpolation=bilinear))
    elif options.policy == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(interpolation=bilinear))
    if options.jitter:
        steps.append(v2.ColorJitter(options.jitter, options.jitter, options.jitter))
    if options.lighting:
        steps.append(_Lighting(options.lighting))
    if options.erasing:
        steps.append(v2.RandomErasing(options.erasing))
    return v2.Compose(steps) if steps else None


class _Lighting:
    """One shift of all colours, along the principal axes of ImageNet's."""

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation

    def __call__(self, image: Tensor) -> Tensor:
        """A uint8 image (3, H, W), and the same shifted."""
        shift = torch.tensor(_AXES) @ (self.deviation * torch.randn(3) * torch.tensor(_DEVIATIONS))
        return (image + 255 * shift[:, None, None]).round().clamp(0, 255).to(torch.uint8)


def mixed(x: Tensor, labels: Tensor, num_classes: int, options: Augmentation, seed: int) -> tuple[Tensor, Tensor]:
    """Mixup and cutmix of encoded images by timm: images, and labels or targets (N, num_classes).

    A mixture of encoded images is the encoding of the mixture: the complement stays the complement. Labels are class
    indices (N,), or zeros and ones (N, num_classes).
    """
    if not (options.mixup or options.cutmix):
        return x, labels
    if len(x) % 2:
        raise ValueError(f"mixup and cutmix need an even number of images in a batch, not {len(x)}")
    import numpy as np

    state = np.random.get_state()
    try:
        np.random.seed(seed % 2**32)  # timm draws from numpy's global source
        # Each image is a class of its own: what comes out are its shares in the mixtures.
        mixup = Mixup(options.mixup, options.cutmix, label_smoothing=0.0, num_classes=len(x))
        mixed_x, shares = mixup(x.clone(), torch.arange(len(x), device=x.device))
    finally:
        np.random.set_state(state)
    own = labels if labels.ndim == 2 else F.one_hot(labels.long(), num_classes)
    with torch.autocast(x.device.type, enabled=False):  # targets in half precision are too coarse
        return mixed_x, shares @ own.to(shares.dtype)
