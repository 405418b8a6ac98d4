"""Checks of explanations: random weights must change them, small changes of the image must not, sums must fit."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bcoskit._explain import explain
from bcoskit._probabilities import check_classes
from bcoskit._random import random_from
from bcoskit.evaluation._images import DrawnImages, Explained, image_rows, inputs_and_targets
from bcoskit.evaluation._loop import run_metric
from bcoskit.evaluation._method import calls_of
from bcoskit.evaluation._methods import METHODS, attribute, resolve
from bcoskit.evaluation._result import Result, Row

_Layer: TypeAlias = tuple[str, nn.Module, Callable[[], object]]  # its path, and what makes its weights random


@dataclass(frozen=True)
class Randomization(DrawnImages):
    """The sanity check by random weights: see `randomization`."""

    name = "randomization"

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[int], method: Any) -> list[list[Row]]:
        """The correlation of each image's explanations after each layer."""
        x, target = inputs_and_targets(model, dataset, units, self.explained)
        original = attribute(model, x, target, method)
        _check_not_empty(original, units)
        tables = [
            {"layer": [path] * len(x), "score": spearman(original, attribute(changed, x, target, method)).tolist()}
            for path, changed in randomized(model, self.seed, x=x[:1])
        ]
        return image_rows(units, target, *tables)


def randomized(model: nn.Module, seed: int = 42, *, x: Tensor | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a network in which more and more layers, from the output to the input, have random weights.

    Every layer that has a `reset_parameters` and parameters of its own is filled by it; torch's attention likewise.
    Parameters outside of such layers, such as tables of positions, stay.

    Args:
        model: The network; it is not changed.
        seed: Of the weights.
        x: An input, by which the layers are brought into the order in which they run, those that do not run last;
            without one they are in the order in which the network registers them.

    Yields:
        The path of the layer that was filled last, and the copy, which the next step changes again.

    Raises:
        ValueError: If the network has no such layer.
    """
    changed = copy.deepcopy(model)
    layers = [
        (path, module, reset)
        for path, module in changed.named_modules()
        if (reset := _reset_of(module)) is not None and next(module.parameters(False), None) is not None
    ]
    if not layers:
        raise ValueError("`model` has no layer with `reset_parameters`: its weights cannot be randomised")
    if x is not None:
        layers = _as_they_run(changed, layers, x)
    for number, (path, layer, reset) in enumerate(reversed(layers)):
        device = next(layer.parameters()).device
        with random_from(seed + number, device):
            reset()
        yield path, changed


def _as_they_run(model: nn.Module, layers: Sequence[_Layer], x: Tensor) -> list[_Layer]:
    with torch.no_grad():
        calls, _ = calls_of(model, [module for _, module, _ in layers], x)
    order = {module: place for place, module in enumerate(dict.fromkeys(calls))}
    return sorted(layers, key=lambda layer: order.get(layer[1], -1))


def _reset_of(module: Any) -> Callable[[], object] | None:
    if isinstance(module, nn.MultiheadAttention):
        return module._reset_parameters
    reset = getattr(module, "reset_parameters", None)
    return reset if callable(reset) else None


def randomization(
    model: nn.Module,
    dataset: Any,
    method: Any = "bcos",
    *,
    count: int | None = None,
    explained: Explained = "predicted",
    seed: int = 42,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Result:
    """Rank correlation of explanations with those of the network whose layers are random, one after the other.

    Weights are randomised from the output to the input, each layer in addition to those before; an explanation that
    depends on what was learnt must change, so that the correlation (Spearman's) falls (Adebayo et al., NeurIPS 2018).

    Args:
        model: A network in evaluation mode; it is not changed.
        dataset: A sequence of (encoded image, label).
        method: Attribution method, see `attribute`.
        count: Number of images, drawn at random; None for all.
        explained: Which class of an image, as the network with its own weights sees it.
        seed: Of the draw and of the weights.
        batch_size: Images at once.
        progress: Called as `progress(done, total)`.

    Returns:
        A row for each image and layer.

    Raises:
        ValueError: If an argument is out of its range, or the method does not fit the network.
    """
    metric = Randomization(count=count, explained=explained, seed=seed)
    return run_metric(metric, model, dataset, method, batch_size=batch_size, progress=progress)


def spearman(first: Tensor, second: Tensor) -> Tensor:
    """Rank correlation of maps (N, ...), of equal values the mean rank; 0 where a map is constant: (N,)."""
    ranks = [_ranks(maps.flatten(1).double()) for maps in (first, second)]
    centred = [rank - rank.mean(1, keepdim=True) for rank in ranks]
    norms = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return torch.where(norms > 0, (centred[0] * centred[1]).sum(1) / norms.clamp_min(1e-300), 0.0)


def _ranks(values: Tensor) -> Tensor:
    ordered = values.sort(1).values.contiguous()
    below = torch.searchsorted(ordered, values.contiguous())
    through = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + through).double() / 2


def _check_not_empty(maps: Tensor, units: Sequence[int]) -> None:
    for unit, found in zip(units, (maps != 0).flatten(1).any(1).tolist(), strict=True):
        if not found:
            raise ValueError(f"image {unit}: its explanation is 0 everywhere, and has no measure")


@dataclass(frozen=True)
class Stability(DrawnImages):
    """The change of explanations under small changes of the image: see `stability`."""

    noise: float = 0.02
    draws: int = 10
    shift: int = 1
    name = "stability"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0 or self.draws < 1 or self.shift < 1:
            raise ValueError(
                f"`noise` (={self.noise}) must not be negative, `draws` (={self.draws}) and `shift` (={self.shift}) "
                "must be at least 1"
            )

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[int], method: Any) -> list[list[Row]]:
        """The largest change of each image's explanation, by noise and by shifts."""
        x, target = inputs_and_targets(model, dataset, units, self.explained)
        original = attribute(model, x, target, method)
        by_noise = [
            relative_change(original, attribute(model, noisy, target, method))
            for noisy in (_noisy(x, units, self.noise, (self.seed, draw)) for draw in range(self.draws))
        ]
        if 2 * self.shift >= min(x.shape[-2:]):
            raise ValueError(f"`shift` (={self.shift}) leaves nothing of {x.shape[-1]}x{x.shape[-2]} pixels to compare")
        _check_not_empty(original, units)
        inner = slice(self.shift, -self.shift)
        by_shift = [
            relative_change(
                torch.roll(original, offsets, (1, 2))[:, inner, inner],
                attribute(model, torch.roll(x, offsets, (2, 3)), target, method)[:, inner, inner],
            )
            for offsets in ((self.shift, 0), (-self.shift, 0), (0, self.shift), (0, -self.shift))
        ]
        tables = [
            {"kind": [kind] * len(x), "score": torch.stack(changes).amax(0).tolist()}
            for kind, changes in (("noise", by_noise), ("shift", by_shift))
        ]
        return image_rows(units, target, *tables)


def relative_change(original: Tensor, other: Tensor) -> Tensor:
    """`‖other - original‖₂ / ‖original‖₂` of maps (N, ...): (N,); infinite where only the original is 0."""
    first, second = original.double(), other.double()  # squares of small contributions vanish in single precision
    change = (second - first).flatten(1).norm(dim=1)
    return torch.where(change > 0, change / first.flatten(1).norm(dim=1), 0.0)


def _noisy(x: Tensor, units: Sequence[int], noise: float, seed: tuple[int, int]) -> Tensor:
    """Uniform noise on each pixel; where the second half of the channels is the complement, it stays that."""
    half = x.shape[1] // 2
    encoded = x.shape[1] % 2 == 0 and bool(torch.allclose(x[:, :half] + x[:, half:], torch.ones_like(x[:, :half])))
    shape = (half if encoded else x.shape[1], *x.shape[2:])
    changes: list[Tensor] = []
    for unit in units:  # each image by itself, so that it does not matter which are measured together
        generator = torch.Generator().manual_seed(random.Random(repr((*seed, int(unit)))).getrandbits(63))
        changes.append((torch.rand(shape, generator=generator) * 2 - 1) * noise)
    change = torch.stack(changes).to(x)
    if not encoded:
        return x + change
    pixels = (x[:, :half] + change).clamp(0, 1)
    return torch.cat([pixels, 1 - pixels], 1)


def stability(
    model: nn.Module,
    dataset: Any,
    method: Any = "bcos",
    *,
    noise: float = 0.02,
    draws: int = 10,
    shift: int = 1,
    count: int | None = None,
    explained: Explained = "predicted",
    seed: int = 42,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Result:
    """Largest relative change of an explanation when the image changes a little; low is good.

    `max ‖c(x') - c(x)‖₂ / ‖c(x)‖₂`, over draws of uniform noise (max-sensitivity, Yeh et al., NeurIPS 2019), and over
    shifts in the four directions, in which the explanation should be shifted likewise (the border is left out).

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, label).
        method: Attribution method, see `attribute`.
        noise: Largest change of a value.
        draws: Draws of noise.
        shift: Pixels by which the image is shifted, what leaves it coming in at the other side.
        count: Number of images, drawn at random; None for all.
        explained: Which class of an image.
        seed: Of the draws.
        batch_size: Images at once.
        progress: Called as `progress(done, total)`.

    Returns:
        Two rows for each image, their `kind` `"noise"` and `"shift"`.

    Raises:
        ValueError: If an argument is out of its range, or the method does not fit the network.
    """
    metric = Stability(noise, draws, shift, count=count, explained=explained, seed=seed)
    return run_metric(metric, model, dataset, method, batch_size=batch_size, progress=progress)


@dataclass(frozen=True)
class Completeness(DrawnImages):
    """Whether contributions add up to the logit: see `completeness`."""

    name = "completeness"

    def measure(self, model: nn.Module, dataset: Any, units: Sequence[int], method: Any) -> list[list[Row]]:
        """Logit, constant, sum and what is left of some images."""
        x, target = inputs_and_targets(model, dataset, units, self.explained)
        if resolve(method) is METHODS["bcos"]:
            found = explain(model, x, target, shares=True)
            assert found.shares is not None
            logit, total = found.value, found.value - found.bias
            constant = sum(found.shares.values(), torch.zeros_like(logit))
        else:
            total = attribute(model, x, target, method).flatten(1).sum(1)
            with torch.no_grad():
                logits, constants = model(x), model(torch.zeros_like(x))
            for each in (logits, constants):
                check_classes((), each)
            logit, constant = (each.gather(1, target[:, None]).squeeze(1) for each in (logits, constants))
        largest = torch.stack([logit, constant, total]).abs().amax(0)
        gap = (logit - constant - total).abs() / largest.clamp_min(torch.finfo(largest.dtype).tiny)
        columns = {"score": gap, "logit": logit, "constant": constant, "contributions": total}
        return image_rows(units, target, {name: values.tolist() for name, values in columns.items()})


def completeness(
    model: nn.Module,
    dataset: Any,
    method: Any = "bcos",
    *,
    count: int | None = None,
    explained: Explained = "predicted",
    seed: int = 42,
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
) -> Result:
    """What is left of a logit when contributions and constant are subtracted, relative to the largest of the three.

    The constant is what does not pass through the input: for `"bcos"` the sum of the shares of all constants of the
    network, each evaluated by itself; for other methods the logit of an input of zeros, their baseline.

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, label).
        method: Attribution method, see `attribute`.
        count: Number of images, drawn at random; None for all.
        explained: Which class of an image.
        seed: Of the draw.
        batch_size: Images at once.
        progress: Called as `progress(done, total)`.

    Returns:
        A row for each image: `score`, `logit`, `constant` and `contributions`.

    Raises:
        ValueError: If an argument is out of its range, or the method does not fit the network.
    """
    metric = Completeness(count=count, explained=explained, seed=seed)
    return run_metric(metric, model, dataset, method, batch_size=batch_size, progress=progress)
