"""`explain`: the linear map that a network is at an input, read by automatic differentiation."""

import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bcoskit._checks import check_channel_dim, check_inputs
from bcoskit._layers import uncompiled
from bcoskit._linear_map import Task, check_independence, not_linear, run_frozen, shares_of
from bcoskit._targets import Target, Versus, picked, select
from bcoskit._trust import is_known
from bcoskit.dynamic import ProductPolicy, explanation_mode, frozen

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Explanation:
    """The linear map of a network at a batch of inputs: `value = Σ W(x)·x + bias`, sample by sample.

    N samples, and with several targets K of them per sample; `*shape` is that of one input.

    Attributes:
        x: The input (N, *shape), or what stands in its place with `from_layer`.
        logits: The whole output of the network, or of `to_layer`.
        value: What is explained, logit or difference of logits, (N,) or (N, K).
        target: Index of the class explained, (N,) or (N, K); None where the target is a position in a map.
        versus: Index of the class it is compared with, like `target`, or None.
        weights: `W(x)`, the rows for the targets, (N, *shape) or (N, K, *shape).
        products: The policy for products of two input-dependent factors.
        shares: The constants' shares of the value by parameter or operation, each like `value`; only with
            `shares=True`.
        channel_dim: The axis of one batch of inputs over which contributions are summed, or None.
    """

    x: Tensor
    logits: Tensor
    value: Tensor
    target: Tensor | None
    versus: Tensor | None
    weights: Tensor
    products: ProductPolicy
    shares: Mapping[str, Tensor] | None = None
    channel_dim: int | None = 1

    @cached_property
    def contributions(self) -> Tensor:
        """`W(x)·x` summed over the channels: (N, H, W) or (N, K, H, W) for images."""
        several = self.value.ndim - 1
        products = self.weights * (self.x.unsqueeze(1) if several else self.x)
        if self.channel_dim is None or self.x.ndim < 3:
            return products
        return products.sum(self.channel_dim + several if self.channel_dim >= 0 else self.channel_dim)

    @cached_property
    def bias(self) -> Tensor:
        """The share of the value that does not pass through the input, `value - Σ W(x)·x`, like `value`."""
        products = self.contributions
        single = products.ndim == self.value.ndim  # of an input with one number per sample
        return self.value - (products if single else products.flatten(self.value.ndim).sum(-1))

    @cached_property
    def residual(self) -> Tensor | None:
        """What remains after contributions and `shares`, like `value`; None without `shares`.

        Relative to the largest of the logits explained, `|Σ W(x)·x|` and `|Σ shares|`, so that a value near 0, left
        over by large terms that cancel, is not divided by.
        """
        if self.shares is None:
            return None
        constants = sum(self.shares.values(), torch.zeros_like(self.value))
        terms = [self.value, self.value - self.bias, constants]
        terms += [picked(self.logits, classes) for classes in (self.target, self.versus) if classes is not None]
        largest = torch.stack(terms).abs().amax(0)
        return (self.bias - constants) / largest.clamp_min(torch.finfo(largest.dtype).tiny)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int | slice) -> "Explanation":
        """The explanation of one sample (as a batch of one) or of several.

        Raises:
            IndexError: If there is no such sample.
            TypeError: If the index is neither an integer nor a slice.
        """
        if not isinstance(index, slice):
            index = operator.index(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"`index` (={index}) is out of range for {len(self)} samples")
            index = slice(index, index + 1 if index != -1 else None)
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "Explanation":
        """The explanation on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Explanation":
        return replace(
            self,
            x=change(self.x),
            logits=change(self.logits),
            value=change(self.value),
            target=None if self.target is None else change(self.target),
            versus=None if self.versus is None else change(self.versus),
            weights=change(self.weights),
            shares=None if self.shares is None else {name: change(share) for name, share in self.shares.items()},
        )

    def to_image(self, index: int = 0, *, target: int = 0, smooth: int = 15, percentile: float = 99.5) -> "Image.Image":
        """The colour picture of one explanation: see `bcoskit.viz.color_picture`.

        Args:
            index: The sample.
            target: Which of its K targets.
            smooth: Side of the mean filter of the opacity, in pixels; odd, or 0 for none.
            percentile: Of the strengths of the image, above which opacity is full.

        Returns:
            An RGBA image.

        Raises:
            IndexError: If there is no such sample or target.
            ValueError: As `bcoskit.viz.color_picture`.
        """
        from bcoskit import viz

        several = self.value.ndim > 1
        if not several and target not in (0, -1):
            raise IndexError(f"`target` (={target}) is out of range, each sample has one target")
        weights = self.weights[index, target] if several else self.weights[index]
        contributions = self.contributions[index, target] if several else self.contributions[index]
        return viz.to_pil(viz.color_picture(weights, contributions, smooth=smooth, percentile=percentile))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tensors and metadata to a `.safetensors` or `.npz` file, which appears complete or not at all.

        Args:
            path: The file; its suffix chooses the format.

        Raises:
            ValueError: If the suffix is another one.
        """
        from bcoskit._files import write_tensors

        names = ("x", "logits", "value", "weights", "target", "versus")
        tensors = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        shares = list(self.shares or ())
        tensors |= {f"shares.{index}": (self.shares or {})[name] for index, name in enumerate(shares)}
        metadata = {
            "format": _FORMAT,
            "products": self.products,
            "channel_dim": self.channel_dim,
            "shares": shares if self.shares is not None else None,
        }
        write_tensors(Path(path), tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Explanation":
        """Read what `save` has written.

        Args:
            path: The file.

        Returns:
            The explanation, on the CPU.

        Raises:
            ValueError: If the file is missing, corrupt, or holds no explanation, or its tensors do not belong together.
        """
        from bcoskit._files import read_tensors

        tensors, metadata = read_tensors(Path(path))
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{path}: holds no explanation of the format {_FORMAT!r}")
        try:
            shares = metadata["shares"]
            explanation = cls(
                x=tensors["x"],
                logits=tensors["logits"],
                value=tensors["value"],
                target=tensors.get("target"),
                versus=tensors.get("versus"),
                weights=tensors["weights"],
                products=metadata["products"],
                channel_dim=metadata["channel_dim"],
                shares=None
                if shares is None
                else {name: tensors[f"shares.{index}"] for index, name in enumerate(shares)},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: is an incomplete explanation ({error!r})") from error
        try:
            _check(explanation)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: holds no explanation: {error}") from error
        return explanation


_FORMAT = "bcoskit-explanation-1"


def _check(read: Explanation) -> None:
    """Refuse what was read from a file if it is nothing that `explain` returns; raises ValueError or TypeError."""
    samples, several = len(read.x), read.value.shape[1:]
    if read.x.ndim < 1 or len(several) > 1:
        shapes = f"`x` has shape {tuple(read.x.shape)} and `value` {tuple(read.value.shape)}"
        raise ValueError(f"{shapes}, must be (N, *shape) and (N,) or (N, K)")
    expected = {
        "value": (read.value, (samples, *several)),
        "logits": (read.logits, (samples, *read.logits.shape[1:])),
        "weights": (read.weights, (samples, *several, *read.x.shape[1:])),
    }
    expected |= {name: (share, (samples, *several)) for name, share in (read.shares or {}).items()}
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"`{name}` has dtype {tensor.dtype} and shape {tuple(tensor.shape)}, must be {shape}")
    for name, classes in (("target", read.target), ("versus", read.versus)):
        if classes is None:
            continue
        if classes.shape != read.value.shape:
            raise ValueError(f"`{name}` has shape {tuple(classes.shape)}, must be {tuple(read.value.shape)}")
        if samples:
            select(read.logits, classes, None)
    check_channel_dim(read.channel_dim, read.x)
    explanation_mode(products=read.products)


def explain(
    model: Callable[..., Any],
    x: Tensor,
    target: Target = None,
    *,
    versus: Versus = None,
    from_layer: str | None = None,
    to_layer: str | None = None,
    products: ProductPolicy = "split",
    shares: bool = False,
    create_graph: bool = False,
    channel_dim: int | None = 1,
) -> Explanation:
    """Explain outputs of a network by the linear map `W(x)` that it is at each input.

    `value = Σ W(x)·x + bias`: an exact summary of the computation, not an approximation (Böhle et al., CVPR 2022,
    section 3.2.3). One forward pass, and one backward pass per target. Every call checks the graph behind the
    output: an operation that is not linear once its factors are frozen raises, with its place in the network.

    Nothing is changed by the call: the network, gradients, the caller's tensors, random state. It may be called in
    several threads at once. Autocast is switched off inside, and a compiled network runs uncompiled.

    Args:
        model: A network in evaluation mode, or any function of a batch.
        x: Inputs (N, *shape), floating point, at least single precision; samples must not interact. Of what a network
            returns as an object with `logits`, as those of Hugging Face do, these are explained.
        target: What of an output (N, C) is explained: None for each sample's largest logit, one class for all
            samples, a list or tensor of one class per sample (N,), or of several per sample (N, K), which share the
            forward pass. For an output with more axes, such as a map, a position `(channel, row, column)` after the
            batch axis, with slices to sum over (`(3, slice(None), slice(None))`), or a list of K positions. A function
            of the output may give any of these: `lambda logits: logits.topk(3).indices`. An output (N,) has no target.
        versus: A class, or classes like `target`, whose logit is subtracted: why this one and not that one.
        from_layer: Name of a layer whose output takes the place of the input. With the layer that embeds tokens, `x`
            holds their numbers, and contributions are summed over `channel_dim=-1`, the features of a token.
        to_layer: Name of a layer whose output is explained in the place of the network's.
        products: What becomes of products of two input-dependent factors: see `explanation_mode`.
        shares: Also evaluate every constant of the network by itself: `shares`, and the `residual` that checks them.
            Costs about two more passes, one sample at a time.
        create_graph: Keep the result differentiable with respect to parameters, and to `x` if it requires a gradient,
            so that it can be part of a loss.
        channel_dim: The axis over which contributions are summed, None for no sum; inputs (N, features) are not
            summed.

    Returns:
        The explanation of the batch.

    Raises:
        TypeError: If `x` or an output is not a tensor of a suitable type.
        ValueError: If the network is in training mode, `x` is not finite, a target is out of range or does not fit
            the output, the target does not depend on the input, or `products` is no policy; with `shares`, if the
            output of a sample is another one in the batch than alone.
        RuntimeError: If it is called in inference mode, or `x` was made in it.
        NotLinearError: If the network is not dynamic linear.
    """
    model = uncompiled(model)
    check_inputs(model, x, indices=from_layer is not None)
    layers = (from_layer, to_layer)
    task = Task(model, x, layers, target, versus, channel_dim, create_graph, weighted=not shares or create_graph)
    # Of a network whose code is known the graph tells all; of others each operation is looked at.
    known = not create_graph and is_known(model)
    found = run_frozen(task, explanation_mode(products=products), frozen()) if known else None
    if found is None or found.faults:
        mode = explanation_mode(products=products, create_graph=create_graph)
        found = run_frozen(task, mode, mode)
    if found.faults:
        raise not_linear(model, x, layers, products, found.faults)
    constants, whole, weights = None, found, found.weights
    if shares:
        chosen = found.classes
        if chosen is None:  # positions; a function is asked for those of the whole batch, and not of each sample
            chosen = target(found.output.detach().clone()) if callable(target) else target
        completed = shares_of(model, x, chosen, found.others, layers, products)
        check_independence(task, found.output, completed.output)
        constants = completed.table
        if weights is None:
            whole, weights = completed, completed.weights
    assert weights is not None
    kept = _identity if create_graph else Tensor.detach
    return Explanation(
        x=kept(whole.start),
        logits=kept(whole.output),
        value=kept(whole.value),
        target=found.classes,
        versus=found.others,
        weights=weights,
        products=products,
        shares=constants,
        channel_dim=channel_dim,
    )


def _identity(tensor: Tensor) -> Tensor:
    return tensor
