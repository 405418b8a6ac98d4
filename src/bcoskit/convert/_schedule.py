"""The exponent of a converted network, and the gradual conversion, in which it and the biases move while one trains."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bcoskit.convert._bcosify import bcosify
from bcoskit.convert._config import BcosConfig
from bcoskit.convert._rules import Rule
from bcoskit.nn._base import BcosArguments


def set_b(model: nn.Module, b: float) -> nn.Module:
    """Set the exponent of all B-cos layers of a network, for instance step by step while it is fine-tuned.

    Layers with a learnable exponent get the value; it goes on being trained.

    Args:
        model: The network; it is changed.
        b: Exponent of at least 1.

    Returns:
        The network.

    Raises:
        ValueError: If `b` is out of its range, or the network has no B-cos layer.
    """
    if type(b) not in (int, float) or not 1 <= b < float("inf"):
        raise ValueError(f"`b` (={b!r}) must be a finite exponent of at least 1")
    layers = _layers_of(model)
    if not layers:
        raise ValueError("`model` has no B-cos layer whose exponent could be set")
    for layer in layers:
        if isinstance(layer.b, Tensor):
            layer.b.data.fill_(b)
        else:
            layer.b = float(b)
    return model


class GradualConversion:
    """A conversion that begins where the ordinary network is, and moves to the B-cos network while one trains.

    At progress 0 all exponents are 1 and all biases are there, so that the logits are those of the ordinary network,
    but for what changes at once: max pools that become average pools, activations that are dropped, filters of unit
    norm, bias and temperature of the logits. At progress `p` in
    [0, 1] exponents are `1 + p · (b - 1)` and biases `1 - p` times their first values (options of the
    implementation of Arya et al., NeurIPS 2024, which moves the exponent alone).

        gradual = GradualConversion(model, BcosConfig(b=2.0))
        for step in range(steps):
            gradual.set(step / steps)
            ...  # a step of training of gradual.model
        network = gradual.finish()

    Args:
        model: The ordinary network; it is not changed.
        config: What it is to become.
        rules: As of `bcosify`.
        skip: As of `bcosify`; B-cos layers among these keep their exponents.
        example: As of `bcosify`.

    Attributes:
        model: The network that is trained. Biases that are to vanish and exponents do not require gradients.
        progress: Where it is.

    Raises:
        ValueError: As `bcosify`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: BcosConfig | None = None,
        *,
        rules: Sequence[Rule] = (),
        skip: Sequence[str] = (),
        example: Tensor | None = None,
    ) -> None:
        config = BcosConfig() if config is None else config
        rules, skip = tuple(rules), skip if isinstance(skip, str) else tuple(skip)
        self._target: Any = bcosify(model, config, rules=rules, skip=skip, example=example)
        start = replace(config, b=1.0, biases="keep", learnable_b=False)
        ordinary = copy.deepcopy(model)
        skipped = set(_layers_of(ordinary))
        self.model: Any = bcosify(ordinary, start, rules=rules, skip=skip, example=example, inplace=True)
        self._converted = [layer not in skipped for layer in _layers_of(self.model)]
        self.progress = 0.0
        self._b = config.b
        self._finished = False
        staying = {name for name, _ in self._target.named_parameters(remove_duplicate=False)}
        named = self.model.named_parameters(remove_duplicate=False)
        self._fading = [name for name, _ in named if name not in staying]
        for name in self._fading:
            self.model.get_parameter(name).requires_grad_(False)
        for layer in self._layers():  # as tensors, whose values may change in a compiled network
            layer.b = nn.Parameter(torch.ones_like(layer.weight[:1].flatten()[0]), requires_grad=False)

    def set(self, progress: float) -> None:
        """Move the network.

        Args:
            progress: From where it is to 1, the B-cos network.

        Raises:
            ValueError: If it is below that, above 1, or the conversion is finished.
        """
        known = isinstance(progress, (int, float))
        if self._finished or not known or not self.progress <= progress <= 1:
            end = "the conversion is finished" if self._finished else f"must be between {self.progress} and 1"
            raise ValueError(f"`progress` (={progress!r}): {end}")
        if progress == self.progress:
            return
        factor = (1 - progress) / (1 - self.progress)
        with torch.no_grad():
            for parameter in {self.model.get_parameter(name): None for name in self._fading}:  # some have two names
                parameter.mul_(factor)
            for layer in self._layers():
                layer.b.fill_(1 + progress * (self._b - 1))
        self.progress = progress

    def finish(self) -> Any:
        """Make the network what `bcosify` would have made of it, with the weights that it has by now.

        Returns:
            The network, `model` itself: biases are gone, exponents are numbers, or learnable.
        """
        if self._finished:
            return self.model
        self._finished, self.progress = True, 1.0
        for name in self._fading:
            path, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(path), attribute, None)
        for layer, wanted in zip(self._layers(), self._made_of(self._target), strict=True):
            del layer.b
            layer.b = copy.deepcopy(wanted.b)
        for part, wanted in zip(self.model.modules(), self._target.modules(), strict=True):
            for attribute in ("conversion", "rebuild"):
                if attribute in wanted.__dict__:
                    part.__dict__[attribute] = wanted.__dict__[attribute]
        return self.model

    def _layers(self) -> list[Any]:
        return self._made_of(self.model)

    def _made_of(self, network: nn.Module) -> list[Any]:
        """The B-cos layers that the conversion has made, and not those that it found."""
        return [layer for layer, made in zip(_layers_of(network), self._converted, strict=True) if made]


def _layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BcosArguments)]
