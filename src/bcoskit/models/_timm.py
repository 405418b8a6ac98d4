"""Ordinary networks of timm under the names `timm/NAME`, as networks by name."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import timm
from torch import Tensor

from bcoskit.data import ImageTransform
from bcoskit.data._transforms import IMAGENET_MEAN, IMAGENET_STD
from bcoskit.models._network import Network, Rename
from bcoskit.models._row import TIMM, ModelRow, numbers


class TimmNetwork(Network):
    """A network of timm, or its conversion.

    Args:
        architecture: Its name in timm, with or without the tag of its weights.
        num_classes: Number of logits.
        in_channels: Channels of the image.
        pretrained: Whether it gets timm's weights for it.
        file: Where they are; by default timm downloads them.

    Attributes:
        model: The network itself.
    """

    converted_part = "model"

    def __init__(
        self,
        architecture: str,
        num_classes: int,
        in_channels: int = 3,
        *,
        pretrained: bool = False,
        file: str | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = timm.create_model(
            architecture,
            pretrained,
            pretrained_cfg_overlay=None if file is None else {"file": file},
            num_classes=num_classes,
            in_chans=in_channels,
        )
        self.num_classes, self.in_chans = num_classes, in_channels
        self.classifier_path = f"model.{_first(self.model.pretrained_cfg['classifier'])}"
        stages: Any = getattr(self.model, "feature_info", None) or ()
        paths = {path for path, _ in self.model.named_modules()}
        known = [stage for stage in stages if isinstance(stage, dict) and stage.get("module") in paths]
        self.feature_info = [{**stage, "module": f"model.{stage['module']}"} for stage in known]

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to logits (N, num_classes)."""
        return self.model(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to the last map or tokens, as timm has them."""
        return self.model.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gives to logits (N, num_classes), or with `pre_logits` to what is classified."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to timm's own."""
        return ((r"^model\.", ""),)


def _first(classifier: str | tuple[str, ...]) -> str:
    return classifier if isinstance(classifier, str) else classifier[0]


def timm_row(name: str) -> ModelRow:
    """The row of a network of timm, which is made from timm's registry.

    Args:
        name: `timm/NAME`.

    Raises:
        ValueError: If timm has no such network, or no weights of that tag.
    """
    architecture = name.removeprefix(TIMM)
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.3)
        hint = f"; near: {', '.join(TIMM + each for each in near)}" if near else ""
        raise ValueError(f"{name!r} is no network: timm has none of the name {architecture!r}{hint}")
    try:
        configuration: Any = timm.get_pretrained_cfg(architecture)
    except RuntimeError as error:
        base = architecture.partition(".")[0]
        tags = ", ".join(TIMM + each for each in timm.list_pretrained(f"{base}.*")[:8])
        raise ValueError(f"{name!r} is no network: timm has no such tag of {base!r}; there are: {tags}") from error
    channels, _, size = configuration.input_size
    usual = len(configuration.mean) == len(configuration.std) == channels and channels in (1, 3)
    cropped = math.floor(size / configuration.crop_pct)
    transform = ImageTransform(
        size,
        max(cropped, size),
        "bicubic" if configuration.interpolation == "bicubic" else "bilinear",
        encoding="normalized",
        mean=tuple(configuration.mean) if usual else IMAGENET_MEAN,
        std=tuple(configuration.std) if usual else IMAGENET_STD,
    )
    is_imagenet = configuration.num_classes == 1000
    return ModelRow(
        name,
        ("_timm", "TimmNetwork"),
        {"architecture": architecture},
        transform,
        "in1k" if is_imagenet else "embedding",
        "cross_entropy",
        own_classes=None if is_imagenet else numbers(configuration.num_classes or 1000),
    )
