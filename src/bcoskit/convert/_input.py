"""The input of a converted network: pairs `[x, 1 - x]` in the place of images."""

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit.convert._config import BcosConfig
from bcoskit.convert._layers import StandardizedConv2d
from bcoskit.nn import Normalize


def normalization(config: BcosConfig, channels: int, dimensions: int) -> Normalize:
    """The step that makes `(z, -z)` of `[x, 1 - x]`, with the normalised image `z = (x - mean) / std`.

    Raises:
        ValueError: If the configuration's constants are for another number of channels.
    """
    mean, std = config.mean, config.std
    assert mean is not None and std is not None
    if len(mean) != channels:
        raise ValueError(f"`mean` (={mean}) must have one value for each of the network's {channels} input channels")
    return Normalize((*mean, *(1 - value for value in mean)), (*std, *std), dimensions)


def with_constants(config: BcosConfig, model: nn.Module, channels: int) -> BcosConfig:
    """The configuration with mean and standard deviation: its own, those that the network says it needs, or none."""
    if config.mean is not None or not config.encode:
        return config
    mean, std = _constants_of(model)
    if not len(mean) == len(std) == channels:
        mean, std = (0.0,) * channels, (1.0,) * channels
    return replace(config, mean=mean, std=std)


def _constants_of(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a network by name, or one of timm, says it needs."""
    transform: Any = getattr(model, "transform", None)
    if getattr(transform, "encoding", None) == "normalized":
        return transform.mean, transform.std
    configuration: Any = getattr(model, "pretrained_cfg", None)
    if configuration:
        return tuple(configuration.get("mean") or ()), tuple(configuration.get("std") or ())
    return (), ()


def widen(model: nn.Module, readers: Sequence[str], normalize: Normalize) -> None:
    """Let the layers that read the image read pairs: filters `(w, -w) / 2` give what `w` gave.

    A module that cuts the image up itself tells by a method `read_pairs(normalize)` how its weights become such pairs.
    """
    for path in readers:
        layer: Any = model.get_submodule(path)
        if hasattr(layer, "read_pairs"):
            layer.read_pairs(normalize)
            continue
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or layer.groups != 1:
            raise ValueError(f"{path!r} reads the image and is no convolution of all channels")
        with torch.no_grad():
            weight = layer.weight
            if isinstance(layer, StandardizedConv2d) and layer.standardize:
                weight = layer._filters()
                layer.standardize, layer.gain = False, None
            pair = torch.cat([weight, -weight], 1) / 2
        layer.weight = nn.Parameter(pair, layer.weight.requires_grad)
        layer.in_channels *= 2
        copy = Normalize(normalize.mean, normalize.std, normalize.dimensions).train(layer.training)
        stem = nn.Sequential(OrderedDict(normalize=copy, layer=layer)).train(layer.training)
        model.set_submodule(path, stem)


class PairedInput(nn.Module):
    """A network behind a step that makes the normalised image `z` of pairs `[x, 1 - x]`.

    For networks whose first layer cannot be widened. `z` is half the difference of `(z, -z)`, to which both halves of
    the pair contribute.

    Args:
        model: The network, which takes `z`.
        normalize: What makes `(z, -z)` of the pair.
    """

    def __init__(self, model: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """Pairs (N, 2C, *spatial) to the output of the network.

        Args:
            *arguments: As of the network, with pairs for the images that come first.
            **keywords: As of the network; the pairs may have the name that it gives to its first argument, or `x`.

        Raises:
            TypeError: If there are no pairs.
        """
        if arguments:
            return self.model(self._image(arguments[0]), *arguments[1:], **keywords)
        first = next(iter(inspect.signature(self.model.forward).parameters), "x")
        name = next((name for name in (first, "x") if name in keywords), None)
        if name is None:
            raise TypeError(f"`{first}` is missing: pairs [x, 1 - x] of shape (N, 2C, *spatial)")
        image = self._image(keywords.pop(name))
        return self.model(image, **keywords)

    def _image(self, x: Tensor) -> Tensor:
        image, complement = self.normalize(x).chunk(2, -1 - self.normalize.dimensions)
        return (image - complement) / 2
