"""Fine-tuning: which layers of a network stay as they are, and how fast the others learn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning
from torch import nn

from bcoskit.models import Network
from bcoskit.training._options import check, check_switches, check_whole


@dataclass(frozen=True)
class FineTuning:
    """How layers of a network that has weights learn, by their distance from the input.

    The stages of a network are those of `model.stage_names`, each with all layers that are registered before it and in
    no earlier stage, the first with what belongs to no layer, such as position embeddings; what comes behind the last
    stage is the last group. Of `n` groups, the first being 0, group `k` learns with
    `learning_rate · layer_decay^(n - 1 - k)` (Clark et al., ICLR 2020, section 3.2, and Bao et al., ICLR 2022, with
    stages for layers), and the classifier with `learning_rate · head`.

    Attributes:
        frozen: What does not learn: the number of stages from the input; or the path of a module, as in `layer2`, for
            it and all that is registered before it. It is in evaluation mode: its running statistics stay, too.
        frozen_epochs: Epochs for which that holds; None for the whole run.
        layer_decay: Factor of the learning rate from one group to the one before it, above 0 and at most 1.
        head: Factor of the learning rate of the classifier, above 0.
        fresh_head: Whether the classifier is fresh even where the number of classes is that of the weights.

    Raises:
        ValueError: If a value is out of its range.
    """

    frozen: int | str = 0
    frozen_epochs: int | None = None
    layer_decay: float = 1.0
    head: float = 1.0
    fresh_head: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.frozen, bool) or not isinstance(self.frozen, (int, str)) or self.frozen == "":
            raise ValueError(f"`frozen` (={self.frozen!r}) must be a number of stages or the path of a module")
        if isinstance(self.frozen, int):
            check_whole("frozen", self.frozen, 0)
        if self.frozen_epochs is not None:
            check_whole("frozen_epochs", self.frozen_epochs, 1)
            if not self.frozen:
                raise ValueError(f"`frozen_epochs` (={self.frozen_epochs}) needs to be told what is `frozen`")
        check("layer_decay", self.layer_decay, 1e-6, 1)
        check("head", self.head, 1e-6)
        check_switches(self, "fresh_head")


class Freezing(lightning.Callback):
    """Keeps the first layers of a network as they are: without gradients, and in evaluation mode.

    Args:
        network: The network.
        tuning: What is frozen, and for how long.

    Raises:
        ValueError: If the network has no such stage or module, or nothing of it would learn.
    """

    def __init__(self, network: Network, tuning: FineTuning) -> None:
        self.epochs = tuning.frozen_epochs
        self._modules, learning = _until(network, tuning.frozen)
        # By their places: where weights are shared out over processes, others take the place of these.
        places = (path.rpartition(".") for path in learning)
        self._parameters = [(network.get_submodule(path), name) for path, _, name in places]
        if self.epochs is None:  # before there is an optimiser, which then never hears of them
            self._set(True)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """As in the epoch in which a run goes on, which it may do within one."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Freeze, or let go."""
        self._set(self.epochs is None or trainer.current_epoch < self.epochs)

    def _set(self, frozen: bool) -> None:
        for module, name in self._parameters:
            module.get_parameter(name).requires_grad_(not frozen)
        for module in self._modules:
            module.training = not frozen


def _until(network: Network, frozen: int | str) -> tuple[list[nn.Module], list[str]]:
    """The modules that `FineTuning.frozen` names, and the paths of what of them would learn."""
    if frozen == 0:
        return [], []
    order, ends = _places(network)
    cut = ends[_last(network, frozen)]
    learning = [path for path, each in network.named_parameters() if each.requires_grad]
    kept = [path for path in learning if order[path.rpartition(".")[0]] <= cut]
    if len(kept) == len(learning):
        raise ValueError(f"`frozen` (={frozen!r}) leaves nothing of {network.name!r} that learns")
    return [module for path, module in network.named_modules() if ends[path] <= cut], kept


def _last(network: Network, frozen: int | str) -> str:
    stages = _stages(network)
    if isinstance(frozen, int):
        if frozen > len(stages):
            raise ValueError(f"`frozen` (={frozen}) is above the number of stages of {network.name!r}{_listed(stages)}")
        return stages[frozen - 1]
    if frozen not in dict(network.named_modules()):
        raise ValueError(f"`frozen` (={frozen!r}) is no module of {network.name!r}{_listed(stages)}")
    return frozen


def check_frozen(tuning: FineTuning, weights: str, gradual: float) -> None:
    """Raise a `ValueError` if what is frozen has learnt nothing, or is to be changed all the same."""
    if tuning.frozen and weights == "fresh":
        raise ValueError(f"`frozen` (={tuning.frozen!r}) is for layers that have learnt something: give `weights`")
    if tuning.frozen and gradual:
        raise ValueError(f"`gradual` (={gradual}) changes all layers, none of which can be `frozen` then")


def parameter_groups(network: nn.Module, tuning: FineTuning, learning_rate: float) -> list[dict[str, Any]]:
    """What an optimiser is given: the parameters that learn, with a learning rate for each group.

    Args:
        network: The network; one by name if the rates differ.
        tuning: How they do.
        learning_rate: Of the last group.

    Raises:
        ValueError: If the network has no stages by which rates could differ.
    """
    if tuning.layer_decay == tuning.head == 1:
        return [{"params": [each for each in network.parameters() if each.requires_grad], "lr": learning_rate}]
    assert isinstance(network, Network)
    stages = _stages(network)
    if not stages and tuning.layer_decay != 1:
        raise ValueError(f"`layer_decay` (={tuning.layer_decay}) needs stages, of which {network.name!r} has none")
    order, ends = _places(network)
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in (*stages, "rest", "head")}
    for path, parameter in network.named_parameters():
        if parameter.requires_grad:
            owner = path.rpartition(".")[0]
            behind = (stage for stage in stages if order[owner] <= ends[stage])
            groups["head" if _in_head(network, path) else next(behind, "rest")].append(parameter)
    rates = {name: tuning.layer_decay ** (len(stages) - index) for index, name in enumerate((*stages, "rest"))}
    rates["head"] = tuning.head
    return [
        {"params": parameters, "lr": learning_rate * rates[name], "name": name}
        for name, parameters in groups.items()
        if parameters
    ]


def _places(network: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """From each path to the module's place in the order of registration, and to that of the last one inside it."""
    order = {path: index for index, (path, _) in enumerate(network.named_modules())}
    ends: dict[str, int] = {}
    for path, index in order.items():
        parts = path.split(".") if path else []
        for length in range(len(parts) + 1):
            ends[".".join(parts[:length])] = index
    return order, ends


def _stages(network: Network) -> list[str]:
    known = dict(network.named_modules())
    return [path for path in network.stage_names if path in known]  # a conversion may have moved it


def _in_head(network: Network, path: str) -> bool:
    heads = (network.classifier_path, network.optional_path)
    return any(path.startswith(f"{head}.") for head in heads if head is not None)


def _listed(stages: Sequence[str]) -> str:
    return f"; its stages: {', '.join(stages)}" if stages else ", which has no stages"
