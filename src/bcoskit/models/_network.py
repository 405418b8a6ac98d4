"""What all networks with a name share."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from re import Match
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from bcoskit._layers import outputs_of
from bcoskit.data import ImageTransform

if TYPE_CHECKING:
    from bcoskit.convert import ConversionReport

# He et al., ICCV 2015, by the fan-out.
by_fan_out = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")

Rename: TypeAlias = tuple[str, str | Callable[[Match[str]], str]]


class Network(nn.Module):
    """A network by name: timm's interface, with classes, transform and stages that fit it.

    `forward(x)` is `forward_head(forward_features(x))`: (N, in_chans, H, W) to logits (N, num_classes).

    Attributes:
        name: `arch.tag`.
        transform: From a picture to the network's input, as at test time.
        classes: Names of the classes.
        loss: What its logits become probabilities by: `"bce"` a sigmoid, `"cross_entropy"` a softmax, `"none"`
            nothing, since the output is no vector of classes.
        initialize_filter: Fills the filters of a convolution, where the paper does it in another way than torch.
        classifier_path: Path of the last layer, which `reset_classifier` replaces.
        fused: Whether `bcoskit.fuse` has made it.
        conversion: What `bcoskit.bcosify` has made of it, None if it was not converted.
        converted_part: Path of what is to be converted, if that is not all of it.
        optional_path: Path of a part that only training needs, and that files of weights may lack.
    """

    initialize_filter: ClassVar[Callable[[Tensor], object] | None] = None
    classifier_path: str
    optional_path: ClassVar[str | None] = None
    feature_info: Any
    name: str
    transform: ImageTransform
    classes: tuple[str, ...]
    loss: Literal["bce", "cross_entropy", "none"]
    num_classes: int
    in_chans: int
    rebuild: Callable[[int], nn.Module]
    fused: bool = False
    conversion: "ConversionReport | None" = None
    converted_part: ClassVar[str] = ""

    @property
    def stage_names(self) -> tuple[str, ...]:
        """Paths of the layers whose outputs are the stages of the features, from the input to the last map."""
        return tuple(stage["module"] for stage in self.feature_info)

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs of the stages.

        Args:
            x: (N, in_chans, H, W).

        Returns:
            From the path of each stage to its output: maps (N, C, H', W'), of transformers tokens (N, T, D), before
            a norm that may follow the last of them.
        """
        return outputs_of(self, x, self.stage_names)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, for fine-tuning; the classes then have numbers for names.

        Args:
            num_classes: Number of logits.
            global_pool: Must be None: where a B-cos network averages is part of its classifier.

        Raises:
            ValueError: If an argument is out of its range.
        """
        if global_pool is not None:
            raise ValueError(f"`global_pool` (={global_pool!r}) must be None: it is part of a B-cos classifier")
        if type(num_classes) is not int or num_classes < 1:
            raise ValueError(f"`num_classes` (={num_classes!r}) must be an integer of at least 1")
        if not hasattr(self, "rebuild"):
            raise ValueError("only a network that `create_model` has made knows how its classifier is made")
        if self.fused:
            raise ValueError("a fused network has no classifier to reset: reset that of the original")
        fresh = self.rebuild(num_classes)
        parameter = next(self.parameters())
        for path in (self.classifier_path, self.optional_path):
            if path is not None:
                part = fresh.get_submodule(path).to(parameter.dtype).train(self.training)
                self.set_submodule(path, self.materialize(part, parameter.device))
        self.num_classes = num_classes
        self.classes = tuple(str(index) for index in range(num_classes))

    def on_converted(self, convert: Callable[[nn.Module], nn.Module]) -> None:
        """Called by `bcosify`, which has made this a B-cos network; `convert` does the same to another one."""
        self.in_chans *= 2
        if hasattr(self, "rebuild"):  # not while it is being built
            self.transform = replace(self.transform, encoding="bcos")
            self.loss = "bce"
            self.rebuild = partial(_rebuilt_and_converted, self.rebuild, convert)

    def get_classifier(self, name_only: bool = False) -> Any:
        """The last layer, or its path."""
        return self.classifier_path if name_only else self.get_submodule(self.classifier_path)

    def prune_intermediate_layers(self, *_arguments: Any, **_keywords: Any) -> Any:
        """Refuses: a network by name is whole. `forward_stages` has the outputs of its stages.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("a network by name cannot be cut: `forward_stages` has the outputs of its stages")

    def reset_parameters(self) -> None:
        """Fresh weights everywhere, as the paper's training starts with them."""
        if next(self.parameters()).is_meta:
            return
        for module in self.modules():
            if module is not self:
                self.initialize(module)

    def initialize(self, module: nn.Module) -> None:
        """Fresh weights of one layer: torch's own, where the paper has no other."""
        fill = type(self).initialize_filter
        if fill is not None and isinstance(module, nn.Conv2d):
            fill(module.weight)
            return
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def materialize(self, module: nn.Module, device: torch.device) -> nn.Module:
        """Give the parts of a module that are on the meta device fresh weights on another; the module itself."""
        for part in module.modules():
            missing = [
                (key, tensor)
                for key, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
                if tensor.is_meta
            ]
            for key, tensor in missing:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                trains = isinstance(tensor, nn.Parameter)
                setattr(part, key, nn.Parameter(empty, tensor.requires_grad) if trains else empty)
            if missing:
                self.initialize(part)
        return module

    def authors_renames(self) -> Sequence[Rename]:
        """From our paths to the authors': regular expressions and replacements, all applied in this order."""
        return ()

    def from_authors(self, key: str, tensor: Tensor) -> Tensor:
        """A weight of the authors' in our layout, by our key."""
        return tensor


def _rebuilt_and_converted(
    rebuild: Callable[[int], Any], convert: Callable[[nn.Module], nn.Module], num_classes: int
) -> nn.Module:
    network = rebuild(num_classes)
    return convert(network.materialize(network, torch.device("cpu")).eval())
