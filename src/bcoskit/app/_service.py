"""Explanations for many users at once, from bytes of images to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import BoundedSemaphore

import torch
from PIL import Image
from torch import Tensor, nn

from bcoskit._checks import check_evaluation_mode
from bcoskit._devices import device_of
from bcoskit._explain import Explanation, explain
from bcoskit._probabilities import probabilities_of
from bcoskit._targets import class_index
from bcoskit.app._batches import Batcher
from bcoskit.data import ImageError, ImageTransform, read_image
from bcoskit.data._images import MAX_PIXELS, pixels
from bcoskit.evaluation import METHODS, attribute
from bcoskit.models import Network

_DECODERS = 2  # images that are decoded at once, since each may take hundreds of megabytes


@dataclass(frozen=True, eq=False)
class Photograph:
    """An image as the networks see it; nothing else of it is kept.

    Attributes:
        view: What the network sees.
        ordinary: What the ordinary network sees, None without one.
    """

    view: Image.Image
    ordinary: Image.Image | None = None


@dataclass(frozen=True)
class _Explained:
    """What explanations in one batch have in common."""

    versus: bool
    shares: bool


@dataclass(frozen=True)
class _Attributed:
    """What attributions in one batch have in common."""

    method: str
    ordinary: bool


class ExplanationService:
    """Explains images by a network, and by other methods and an ordinary network to compare; safe to use by threads.

    Requests that wait at the same time are computed in one batch. What is slow to compute, other methods, waits in a
    queue of its own.

    Args:
        model: A network of `create_model`, in evaluation mode.
        ordinary: A network of `create_model` without B-cos layers that knows the same classes.
        max_bytes: Size of an image that is read.
        max_pixels: Number of its pixels, at most 100 million.
        batch_size: Images that are explained at once.

    Raises:
        TypeError: If a network is not one of `create_model`.
        ValueError: If a number is not positive or too large, a network is in training mode, or the two have other
            classes.
    """

    def __init__(
        self,
        model: Network,
        ordinary: Network | None = None,
        *,
        max_bytes: int = 20_000_000,
        max_pixels: int = 50_000_000,
        batch_size: int = 16,
    ) -> None:
        for name, network in (("model", model), ("ordinary", ordinary)):
            if network is not None:
                _check_network(name, network)
        for name, value in (("max_bytes", max_bytes), ("max_pixels", max_pixels), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` (={value}) must be positive")
        if max_pixels > MAX_PIXELS:
            raise ValueError(f"`max_pixels` (={max_pixels}) must be at most {MAX_PIXELS}, as of `read_image`")
        self.model, self.ordinary = model, ordinary
        self.max_bytes, self.max_pixels = max_bytes, max_pixels
        self.classes = tuple(model.classes)
        self._ordinary_index = None if ordinary is None else _matched(self.classes, tuple(ordinary.classes))
        self._decoding = BoundedSemaphore(_DECODERS)
        self._explanations = Batcher[tuple[Image.Image, int | None, int | None], Explanation](
            self._explained, batch_size
        )
        self._attributions = Batcher[tuple[Image.Image, int], Tensor](self._attributed, batch_size)

    @property
    def has_classes(self) -> bool:
        """Whether the outputs of the network are classes, with probabilities."""
        return self.model.loss != "none"

    @property
    def colored(self) -> bool:
        """Whether the weights have colours, since the input is encoded as `[x, 1 - x]`."""
        return self.model.transform.encoding == "bcos"

    def close(self) -> None:
        """Answer what waits, then end."""
        self._explanations.close()
        self._attributions.close()

    def read(self, data: bytes) -> Photograph:
        """An image of any format that `read_image` knows, as the networks see it.

        Args:
            data: The bytes of its file.

        Raises:
            ImageError: If it has too many bytes or pixels, or cannot be read; the message names no file.
        """
        if len(data) > self.max_bytes:
            raise ImageError(f"the image has {len(data) / 1e6:.1f} MB, more than the {self.max_bytes / 1e6:g} allowed")
        with self._decoding:
            try:
                image = read_image(data, max_pixels=self.max_pixels)
                view = self.model.transform.view(image)
                ordinary = None if self.ordinary is None else self.ordinary.transform.view(image)
            except ImageError as error:
                raise ImageError(f"the image cannot be used: {str(error).partition('>: ')[2] or error}") from None
        return Photograph(view, ordinary)

    def class_index(self, given: str | int | None, name: str) -> int | None:
        """The index of a class that the argument `name` gives by name or index; None for None or an empty text.

        Raises:
            ValueError: If there is no such class, or there are several of that name.
        """
        return None if given in (None, "") else class_index(self.classes, given, name)

    def explain(
        self, photograph: Photograph, target: int | None = None, versus: int | None = None, *, shares: bool = True
    ) -> Explanation:
        """The explanation of one image, a batch of one on the CPU.

        Args:
            photograph: The image.
            target: The class; the one with the largest logit if None.
            versus: A class whose logit is subtracted.
            shares: As of `bcoskit.explain`.

        Raises:
            ValueError: If a class is out of range, or one is compared with itself; as `bcoskit.explain`.
        """
        for name, index in (("target", target), ("versus", versus)):
            if index is not None and not 0 <= index < len(self.classes):
                raise ValueError(f"`{name}` (={index}) must be the index of a class, below {len(self.classes)}")
        if versus is not None and versus == target:
            raise ValueError(f"class {self.classes[versus]!r} cannot be explained against itself")
        found = self._explanations.ask(_Explained(versus is not None, shares), (photograph.view, target, versus))
        if found.target is not None and found.versus is not None and bool(found.target.eq(found.versus).all()):
            raise ValueError(f"class {self.classes[int(found.target)]!r} cannot be explained against itself")
        return found

    def probabilities(self, logits: Tensor) -> Tensor | None:
        """Of the logits (C,) by the network's loss; None if its outputs are no classes."""
        if not self.has_classes:
            return None
        return probabilities_of(self.model, logits)

    def attribute(self, photograph: Photograph, target: int, method: str, *, ordinary: bool = False) -> Tensor:
        """Contributions (H, W) by a method of `bcoskit.evaluation.METHODS`.

        Args:
            photograph: The image.
            target: The class.
            method: The method.
            ordinary: Whether the ordinary network is explained.

        Raises:
            ValueError: If the method is unknown or does not fit the network, or there is no ordinary network.
        """
        if method not in METHODS:
            raise ValueError(f"`method` (={method[:60]!r}) must be of: {', '.join(METHODS)}")
        view = photograph.ordinary if ordinary else photograph.view
        if view is None or (ordinary and self._ordinary_index is None):
            raise ValueError("`ordinary` (=True) needs an ordinary network")
        if ordinary and self._ordinary_index is not None:
            target = self._ordinary_index[target]
        return self._attributions.ask(_Attributed(method, ordinary), (view, target))

    def _explained(
        self, kind: _Explained, items: Sequence[tuple[Image.Image, int | None, int | None]]
    ) -> list[Explanation]:
        chosen = torch.tensor([-1 if target is None else target for _, target, _ in items])
        versus = [index for _, _, index in items if index is not None] if kind.versus else None
        x = _encoded(self.model, self.model.transform, [view for view, _, _ in items])

        def targets(logits: Tensor) -> Tensor:
            given = chosen.to(logits.device)
            return given.where(given >= 0, logits.argmax(1))

        found = explain(self.model, x, targets, versus=versus, shares=kind.shares).to("cpu")
        # What one user keeps must not hold the images of others.
        parts = [found[index] for index in range(len(items))]
        return [replace(part, x=part.x.clone(), weights=part.weights.clone()) for part in parts]

    def _attributed(self, kind: _Attributed, items: Sequence[tuple[Image.Image, int]]) -> list[Tensor]:
        network = self.ordinary if kind.ordinary else self.model
        assert network is not None
        x = _encoded(network, network.transform, [view for view, _ in items])
        target = torch.tensor([target for _, target in items], device=x.device)
        return [found.clone() for found in attribute(network, x, target, kind.method).to("cpu")]


def _check_network(name: str, network: object) -> None:
    if not isinstance(network, Network) or not hasattr(network, "transform"):
        raise TypeError(f"`{name}` must be a network of `create_model`, not {type(network).__name__}")
    check_evaluation_mode(network, name)


def _matched(classes: tuple[str, ...], others: tuple[str, ...]) -> list[int]:
    """Where each class is among those of another network, by name, or by number where all names differ."""
    if set(classes) <= set(others) and len(set(classes)) == len(classes):
        return [others.index(name) for name in classes]
    if len(classes) == len(others) and (classes == others or not set(classes) & set(others)):
        return list(range(len(classes)))
    missing = next((name for name in classes if name not in others), classes[0])
    raise ValueError(
        f"`ordinary` must know the classes of `model`, but there is no {missing!r} among its {len(others)}"
    )


def _encoded(network: nn.Module, transform: ImageTransform, views: Sequence[Image.Image]) -> Tensor:
    values = torch.stack([pixels(view) for view in views])
    return transform.encode_pixels(values).to(device_of(network))
