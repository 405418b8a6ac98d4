"""`bcosify`: an ordinary network becomes a B-cos network, module by module, and keeps its weights."""

import copy
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bcoskit._checks import check_initialized
from bcoskit.convert._classifier import add_constants, move_classifier
from bcoskit.convert._config import BcosConfig
from bcoskit.convert._input import with_constants
from bcoskit.convert._modules import contents, is_bcos, is_skipped, restore, take_place
from bcoskit.convert._probe import Probe, WeightUses, probe, probe_any
from bcoskit.convert._report import ConversionReport, ConvertedModule
from bcoskit.convert._rules import RULES, UNKNOWN, Rule, rule_for
from bcoskit.convert._widening import paired, with_pairs

# Functions that make of a weight the linear transform of a layer, as a classifier with the weight of an embedding.
_TRANSFORMS = frozenset(
    {"linear", "torch.matmul", "Tensor.matmul", "torch.mm", "Tensor.mm", "torch.einsum", "Tensor.t"}
)


def bcosify(
    model: nn.Module,
    config: BcosConfig | None = None,
    *,
    rules: Sequence[Rule] = (),
    skip: Sequence[str] = (),
    example: Tensor | None = None,
    inplace: bool = False,
) -> Any:
    """Turn a network into a B-cos network that keeps its weights (Arya et al., NeurIPS 2024).

    Layers are replaced by an ordered table of rules; parameters stay the same objects, where their shapes do, but for
    biases of batch norms that are kept, into which their means go. Modules that are used several times stay so. Those
    that write to their input in place, such as `ReLU(inplace=True)`, no longer do, since the backward pass of a B-cos
    layer needs its output; where the network's own code does, it gets a copy. The layers that read the image read
    pairs `[x, 1 - x]` afterwards, by filters `(w, -w) / 2` behind a fixed normalisation, so that with
    `BcosConfig.preset("exact")` the converted network gives the logits that the original gives for the normalised
    image, at padded borders as well. What became of each module is told by the result's attribute `conversion`, a
    `ConversionReport`.

    Args:
        model: The network: of timm, torchvision, or any other module.
        config: What is made of it; by default `BcosConfig()`, which is that of the paper but for max pools and logit
            bias.
        rules: Rules that go before those of the package.
        skip: Paths of modules, or patterns such as `"blocks.0.*"`, that stay as they are, with all that is in them.
        example: An input of the original, for networks that take no images of usual sizes, such as signals or volumes:
            a tensor of samples (N, *shape).
        inplace: Whether the network itself is changed, instead of a copy. If the conversion fails it is as before.

    Returns:
        The converted network. Where no layer reads the image by itself, it is a `PairedInput` around the network.

    Raises:
        TypeError: If `model` is no module, or another argument of another type than it must be.
        ValueError: If a module cannot be converted without being wrong, no module is, or `skip` names none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    config = BcosConfig() if config is None else config
    own, patterns = _checked(config, rules, skip, example)
    if not inplace:
        try:
            copied = copy.deepcopy(model)
        except (RuntimeError, ValueError) as error:  # of weights that are made anew before each call, as by pruning
            _refuse(model, patterns)
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(f"`model` cannot be copied, give `inplace=True` or mend this: {reason}") from error
        return _around(copied, config, own, patterns, example)
    before = contents(model.modules())
    try:
        return _around(model, config, own, patterns, example)
    except BaseException:
        restore(before)
        raise


def _checked(config: Any, rules: Any, skip: Any, example: Any) -> tuple[tuple[Rule, ...], tuple[str, ...]]:
    """The rules and the patterns, which may come from generators, after a look at all types."""
    if not isinstance(config, BcosConfig):
        raise TypeError(f"`config` (={config!r}) must be a BcosConfig, such as BcosConfig.preset('v2')")
    own = tuple(rules) if isinstance(rules, Iterable) else (rules,)
    if not all(isinstance(rule, Rule) for rule in own) or isinstance(rules, Rule):
        raise TypeError(f"`rules` (={rules!r}) must be a sequence of Rule")
    patterns = tuple(skip) if isinstance(skip, Iterable) else (skip,)
    if isinstance(skip, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"`skip` (={skip!r}) must be a sequence of paths: for a single one give [{skip!r}]")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"`example` must be a tensor, got {type(example).__name__}")
    if example is not None and example.ndim < 2:
        raise ValueError(f"`example` of shape {tuple(example.shape)} must be samples: (N, *shape)")
    if config.encode and example is not None and not example.is_floating_point():
        raise ValueError(f"`example` of dtype {example.dtype} is no image: give `encode=False` in `config`")
    return own, patterns


def _converted(
    model: nn.Module, config: BcosConfig, rules: tuple[Rule, ...], skip: tuple[str, ...], example: Tensor | None
) -> nn.Module:
    _refuse(model, skip)
    probed = probe_any(model, example)
    seen = probed if isinstance(probed, Probe) else None
    if config.encode and isinstance(probed, Exception):
        raise ValueError(
            "`model` takes no image of a usual size: give an `example` of its input, or `encode=False` for inputs that "
            f"are no images. Of the last it said: {' '.join(str(probed).split())[:300]}"
        ) from probed
    bypassed = set[str]()
    if seen is not None and config.max_out > 1:
        with WeightUses(model) as uses:
            probe(model, seen.example)
        bypassed = set(uses.found)
    if seen is not None and seen.example.ndim > 1:
        config = with_constants(config, model, seen.example.shape[1])
    notes = list[ConvertedModule]()
    classifier = None if seen is None else move_classifier(model, config, seen, skip, notes)
    if classifier is None and config.has_constants:
        notes.append(_without_constants(config))
    walk = _Walk(config, (*rules, *RULES), skip, bypassed, notes)
    root = walk.converted(model, "")
    if not walk.replaced:
        raise ValueError("`model` has no module that a rule converts")
    _write_to_no_input(root)
    if classifier is not None and config.has_constants:
        add_constants(root, config, classifier)
    network = root if not config.encode or seen is None else with_pairs(root, config, seen, notes, skip)
    if seen is not None:
        notes = _with_bypassed(network, config, seen, notes, "" if network is root else "model.")
    setattr(network, "conversion", ConversionReport(config, tuple(notes), skip, bool(rules)))  # noqa: B010 - no module
    return network


def _without_constants(config: BcosConfig) -> ConvertedModule:
    """What a report says where the logits come from no linear layer, to which their constants could be added."""
    for name in ("logit_bias", "temperature"):
        if getattr(config, name) not in (None, "uniform"):
            raise ValueError(
                f"`{name}` (={getattr(config, name)}) is for networks whose output is that of a linear layer, which is "
                "not seen in this one: leave it out"
            )
    return ConvertedModule("", "logits", "kept", "without a bias: they are not seen to come from a linear layer")


def _around(
    model: Any, config: BcosConfig, rules: tuple[Rule, ...], skip: tuple[str, ...], example: Tensor | None
) -> nn.Module:
    """A conversion of the part of a network by name that is to be converted, and what it has to know of that."""
    part = getattr(model, "converted_part", "")
    if part:
        config = with_constants(config, model, model.in_chans)
    inner = _converted(model.get_submodule(part) if part else model, config, rules, skip, example)
    if part:
        model.set_submodule(part, inner)
        model.conversion = inner.conversion
    elif inner is not model:  # a network behind another input
        return inner
    told = getattr(model, "on_converted", None)
    if told is not None:
        told(partial(bcosify, config=config, rules=rules, skip=skip, example=example, inplace=True))
    return model


def _write_to_no_input(root: nn.Module) -> None:
    """Switch off modules that write to their input: for their derivatives B-cos layers keep what they give."""
    for module in root.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010 - torch does not declare it


def _refuse(model: nn.Module, skip: tuple[str, ...]) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"`skip` (={pattern!r}) names no module of the network")
    for path, module in model.named_modules():
        if is_skipped(path, skip):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"the module {path!r} is a compiled script: convert what it was made from")  # noqa: TRY004
        if module._forward_pre_hooks and any(name.endswith(("_g", "_orig")) for name in module._parameters):
            raise ValueError(
                f"the module {path!r} makes its weight anew before each call (weight norm, spectral norm, pruning): "
                "remove that first"
            )
        if parametrize.is_parametrized(module):
            raise ValueError(f"the module {path!r} has a parametrised weight: remove the parametrisation first")
        check_initialized(path, module)
        if any(
            tensor is not None and tensor.is_meta
            for tensor in (*module._parameters.values(), *module._buffers.values())
        ):
            raise ValueError(f"the module {path!r} is on the device 'meta', without values: load its weights first")
        if is_bcos(module):
            raise ValueError(f"the module {path!r} is a B-cos layer already: `set_b` changes its exponent")


class _Walk:
    """The walk through the modules, each of which is converted once.

    Those of `bypassed`, whose weights the network computes with itself, keep the number of their filters.
    """

    def __init__(
        self,
        config: BcosConfig,
        rules: tuple[Rule, ...],
        skip: tuple[str, ...],
        bypassed: Set[str],
        notes: list[ConvertedModule],
    ) -> None:
        self._config, self._rules, self._skip, self._notes = config, rules, skip, notes
        self._bypassed = bypassed
        self._done = dict[nn.Module, nn.Module]()
        self.replaced = 0

    def converted(self, module: nn.Module, path: str) -> nn.Module:
        """What takes the place of a module: another one, or itself with converted children."""
        if module in self._done:
            return self._done[module]
        new = self._made(module, path)
        self._done[module] = self._done[new] = new
        if new is module:
            for name, child in list(module.named_children()):
                below = f"{path}.{name}" if path else name
                # `named_children` tells of a module once: what is there under another name as well changes with it.
                for other, same in list(module._modules.items()):
                    if same is child:
                        module._modules[other] = self.converted(child, below)
        return new

    def _made(self, module: nn.Module, path: str) -> nn.Module:
        kind = type(module).__name__
        if any(fnmatchcase(path, pattern) for pattern in self._skip):
            self._notes.append(ConvertedModule(path, kind, "skipped", "as it was"))
            self._done |= {part: part for part in module.modules()}
            return module
        rule = rule_for(module, self._rules)
        if rule is None:
            if any(parameter is not None for parameter in module._parameters.values()) or _holds_constants(module):
                self._notes.append(ConvertedModule(path, kind, "left", "has values of its own, no rule"))
            return module
        config = replace(self._config, max_out=1) if path in self._bypassed else self._config
        made = rule.make(module, config, path)
        if not isinstance(made, (str, nn.Module)):
            raise TypeError(
                f"the rule for {kind} made {type(made).__name__} of {path!r}: it must return a module, or the reason "
                "why it leaves the old one as it is"
            )
        if isinstance(made, str):
            outcome = "left" if made in UNKNOWN else "kept"
            self._notes.append(ConvertedModule(path, kind, outcome, made))
            return module
        if made is module:
            self._notes.append(ConvertedModule(path, kind, "changed", "without bias or fast path"))
            return module
        take_place(made, module)
        self.replaced += any(map(is_bcos, made.modules()))
        self._notes.append(ConvertedModule(path, kind, "replaced", type(made).__name__))
        return made


def _holds_constants(module: nn.Module) -> bool:
    """Whether a layer stores numbers that are no parameters, such as the statistics of a frozen norm."""
    stored = (value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set)
    return not module._modules and any(value is not None and value.is_floating_point() for value in stored)


def _with_bypassed(
    network: nn.Module, config: BcosConfig, seen: Probe, notes: list[ConvertedModule], above: str
) -> list[ConvertedModule]:
    """Mark the layers whose weights are used without them, and B-cos layers that are not called.

    What the network's own code writes to in place becomes a copy.

    Raises:
        ValueError: If the network does not run, or calls none of them.
    """
    with WeightUses(network) as uses:
        try:
            found = probe(network, paired(seen.example) if config.encode else seen.example)
            called, written = found.called, found.written
        except Exception as error:
            raise ValueError(
                f"the converted network does not run: {' '.join(str(error).split())}; name the module in `skip`, or "
                "give a rule for it"
            ) from error
    layers = {path for path, module in network.named_modules() if is_bcos(module)}
    for path in layers & written:
        network.get_submodule(path).register_forward_hook(_copy)
    if layers and not layers & called:
        raise ValueError(
            "`model` calls none of the modules that were converted: its forward pass uses their weights, or holds them "
            "in a plain list, where `nn.ModuleList` is to be used"
        )
    tables = {path for path, module in network.named_modules() if isinstance(module, nn.Embedding)}
    as_layers = {path for path in tables if not _TRANSFORMS.isdisjoint(uses.found.get(path, ()))}
    used = (layers & set(uses.found)) | as_layers
    by_path = {path.removeprefix(above): path for path in layers | as_layers}
    return [_seen_in_use(note, by_path.get(note.path), called, used) for note in notes]


def _copy(_layer: nn.Module, _inputs: Any, output: Any) -> Any:
    """Of an output that the network writes to; for its derivatives a B-cos layer keeps the one that it gives."""
    return output.clone() if isinstance(output, Tensor) and output.requires_grad else output


def _seen_in_use(note: ConvertedModule, path: str | None, called: Set[str], used: Set[str]) -> ConvertedModule:
    """What a report says of a module, after a look at who uses its weight."""
    if path in used and note.outcome in ("replaced", "kept"):
        way = "beside its calls" if path in called else "without a call"
        return replace(note, outcome="bypassed", detail=f"stays linear: the network uses its weight {way}")
    if path is not None and path not in called and note.outcome == "replaced":
        return replace(note, detail=f"{note.detail}, not called in evaluation mode")
    return note
