"""What a row of the table of networks holds: plain values, from which a network is built late and in one place."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from bcoskit._fuse import fuse
from bcoskit.data import ImageTransform
from bcoskit.models._network import Network

if TYPE_CHECKING:
    from bcoskit.convert import BcosConfig

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

Loss: TypeAlias = Literal["bce", "cross_entropy", "none"]
Dataset: TypeAlias = Literal["in1k", "cifar10", "embedding"]

TIMM = "timm/"  # before the names of networks that are timm's

_NUM_CLASSES: dict[str, int] = {"in1k": 1000, "cifar10": 10, "embedding": 1024}


@dataclass(frozen=True)
class Checkpoint:
    """Released weights.

    Attributes:
        location: A URL; the name of a file in the package's assets; or a page from which one downloads by hand.
        sha256: The first hexadecimal digits of the file's SHA-256, if published.
        accuracy: Published top-1 accuracy in percent, if there is one.
        measured_on: The images on which it was measured.
        licence: Terms of use of the weights.
        by_hand: Whether `location` is such a page.
    """

    location: str
    sha256: str | None = None
    accuracy: float | None = None
    measured_on: str = "ImageNet-1k"
    licence: str = "Apache-2.0"
    by_hand: bool = False

    @property
    def is_url(self) -> bool:
        """Whether it is downloaded."""
        return not self.carried and not self.by_hand

    @property
    def carried(self) -> bool:
        """Whether it is in the package."""
        return not self.location.startswith("https://")

    @property
    def source(self) -> str:
        """Where it comes from, in short: the package, or the server and repository."""
        if self.carried:
            return "in the package"
        server, *path = self.location.removeprefix("https://").split("/")
        return "/".join((server, *path[:2])) if server == "github.com" else server


@dataclass(frozen=True)
class ModelRow:
    """What is known of a named network.

    Attributes:
        name: `arch.tag`: the architecture as timm spells it, and the recipe of the weights.
        family: The module in `bcoskit.models` and the name in it that makes the network.
        arguments: Keyword arguments that go with it.
        transform: From a picture to the network's input, as at test time.
        dataset: What its classes are those of.
        loss: What the network is trained with: binary or softmax cross-entropy.
        prefix: Before every key in the authors' files.
        checkpoint: Its trained weights, if there are any.
        own_classes: Names of the classes, if they are not those of `dataset`.
        fused: Whether a file holds the network as `bcoskit.fuse` makes it.
        conversion: What `bcoskit.bcosify` makes of the ordinary network, None if it stays one.
        skip: As of `bcoskit.bcosify`.
    """

    name: str
    family: tuple[str, str]
    arguments: Mapping[str, Any]
    transform: ImageTransform
    dataset: Dataset
    loss: Loss
    prefix: str = ""
    checkpoint: Checkpoint | None = None
    own_classes: tuple[str, ...] | None = None
    fused: bool = False
    conversion: "BcosConfig | None" = None
    skip: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return _NUM_CLASSES[self.dataset] if self.own_classes is None else len(self.own_classes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; of ImageNet those of torchvision, in the order of their WordNet numbers."""
        if self.own_classes is not None:
            return self.own_classes
        if self.dataset == "cifar10":
            return CIFAR10_CLASSES
        if self.dataset == "in1k":
            from torchvision.models import ResNet18_Weights

            return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
        return numbers(self.num_classes)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input."""
        return self.transform.channels * (2 if self.transform.encoding == "bcos" else 1)

    def build(self, num_classes: int | None = None) -> Network:
        """The network, without anything that `create_model` adds to it.

        Args:
            num_classes: Number of logits; that of the row if None.
        """
        module, name = self.family
        make = getattr(importlib.import_module(f"bcoskit.models.{module}"), name)
        count = self.num_classes if num_classes is None else num_classes
        channels = self.transform.channels if self.conversion is not None else self.in_channels
        network = cast("Network", make(num_classes=count, in_channels=channels, **self.arguments))
        if self.conversion is not None:
            from bcoskit.convert import bcosify  # with timm, which takes a second

            network.transform = self.ordinary_transform
            network = bcosify(network.eval(), self.conversion, skip=self.skip, inplace=True)
            if not isinstance(network, Network):
                raise ValueError(f"{self.name!r} cannot be converted as a network by name: no layer reads its image")
        return fuse(network.eval()) if self.fused else network

    @property
    def needs_values(self) -> bool:
        """Whether the network cannot be built without values: it is not ours, or has to be tried to be converted."""
        return self.conversion is not None or self.name.startswith(TIMM)

    @property
    def ordinary_transform(self) -> ImageTransform:
        """The transform of the network before its conversion, which has the same constants."""
        return replace(self.transform, encoding="normalized")

    def converted(self, config: "BcosConfig", skip: tuple[str, ...] = ()) -> "ModelRow":
        """The row of what `bcoskit.bcosify` makes of an ordinary network.

        Raises:
            ValueError: If the network is a B-cos network already, or has no classes.
        """
        if self.transform.encoding != "normalized":
            raise ValueError(f"{self.name!r} is a B-cos network already, it cannot be converted")
        if not config.encode:
            raise ValueError("`encode` (=False) cannot be of a network by name: its images are encoded")
        if config.mean is None:
            config = replace(config, mean=self.transform.mean, std=self.transform.std)
        elif len(config.mean) != self.transform.channels:
            raise ValueError(
                f"`mean` (={config.mean}) must have one value for each of {self.transform.channels} channels"
            )
        return replace(
            self,
            transform=replace(self.transform, encoding="bcos"),
            loss="bce",
            checkpoint=None,
            conversion=config,
            skip=skip,
        )

    def with_classes(self, num_classes: int | None) -> "ModelRow":
        """The row with another number of classes, which then have numbers for names.

        Raises:
            ValueError: If the number is below 1.
        """
        if num_classes is None:
            return self
        if type(num_classes) is not int or num_classes < 1:
            raise ValueError(f"`num_classes` (={num_classes!r}) must be an integer of at least 1")
        if num_classes == self.num_classes:
            return self
        return replace(self, own_classes=numbers(num_classes))

    def with_channels(self, in_channels: int | None) -> "ModelRow":
        """The row with other input channels: of a colour image or a grey one, encoded.

        Raises:
            ValueError: If the number is neither of them.
        """
        if in_channels is None or in_channels == self.in_channels:
            return self
        per_colour = self.in_channels // self.transform.channels
        if type(in_channels) is not int or in_channels not in (per_colour, 3 * per_colour):
            raise ValueError(
                f"`in_channels` (={in_channels}) must be {3 * per_colour} for RGB or {per_colour} for grey images"
            )
        channels = cast("Literal[1, 3]", in_channels // per_colour)
        usual = self.transform
        mean, std = usual.mean, usual.std
        if len(mean) != channels:
            mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
        return replace(self, transform=replace(usual, channels=channels, mean=mean, std=std))


def numbers(count: int) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(str(index) for index in range(count))
