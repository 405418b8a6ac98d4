"""`bcosify`: an ordinary network becomes a B-cos network, module by module, and keeps its weights."""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bcoskit._double import DoublePrecision
from bcoskit.convert._config import BcosConfig
from bcoskit.convert._input import PairedInput, normalization, widen, with_constants
from bcoskit.convert._probe import Probe, probe, probe_any
from bcoskit.convert._report import ConversionReport, ConvertedModule
from bcoskit.convert._rules import RULES, Rule, rule_for
from bcoskit.nn import LogitLayer, Normalize
from bcoskit.nn._base import BcosArguments

_Model = TypeVar("_Model", bound=nn.Module)
_TOLERANCE = 1e-5
_ROUNDING = 0.1  # relative; a larger difference is none of rounding
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
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

    Layers are replaced by an ordered table of rules; parameters stay the same objects, where their shapes do. Modules
    that are used several times stay so. The layers that read the image read pairs `[x, 1 - x]` afterwards, by filters
    `(w, -w) / 2` behind a fixed normalisation, so that with `BcosConfig.preset("exact")` the converted network gives
    the logits that the original gives for the normalised image, at padded borders as well. What became of each module
    is told by the result's attribute `conversion`, a `ConversionReport`.

    Args:
        model: The network: of timm, torchvision, or any other module.
        config: What is made of it; by default that of the paper.
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
    _check_types(config, rules, skip, example)
    if not inplace:
        try:
            copied = copy.deepcopy(model)
        except RuntimeError as error:  # of weights that are made anew before each call, as by pruning
            _refuse(model, tuple(skip))
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(f"`model` cannot be copied, give `inplace=True` or mend this: {reason}") from error
        return _around(copied, config, tuple(rules), tuple(skip), example)
    before = [(module, module.__class__, _contents(module)) for module in model.modules()]
    try:
        return _around(model, config, tuple(rules), tuple(skip), example)
    except BaseException:
        for module, kind, _ in before:
            module.__class__ = kind
        _restore([(module, contents) for module, _, contents in before])
        raise


def _check_types(config: Any, rules: Any, skip: Any, example: Any) -> None:
    if not isinstance(config, BcosConfig):
        raise TypeError(f"`config` (={config!r}) must be a BcosConfig, such as BcosConfig.preset('v2')")
    if isinstance(rules, Rule) or not all(isinstance(rule, Rule) for rule in rules):
        raise TypeError(f"`rules` (={rules!r}) must be a sequence of Rule")
    if isinstance(skip, str) or not all(isinstance(pattern, str) for pattern in skip):
        raise TypeError(f"`skip` (={skip!r}) must be a sequence of paths: for a single one give [{skip!r}]")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"`example` must be a tensor, got {type(example).__name__}")
    if example is not None and example.ndim < 2:
        raise ValueError(f"`example` of shape {tuple(example.shape)} must be samples: (N, *shape)")


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module holds, and what its tables hold, which stay the same objects: handles of hooks know them."""
    return {name: (value, value.copy() if isinstance(value, dict) else None) for name, value in module.__dict__.items()}


def _restore(before: list[tuple[nn.Module, dict[str, tuple[Any, Any]]]]) -> None:
    """Give modules the contents that they had."""
    for module, contents in before:
        module.__dict__.clear()
        for name, (value, entries) in contents.items():
            if entries is not None:
                value.clear()
                value.update(entries)
            module.__dict__[name] = value


def _converted(
    model: nn.Module, config: BcosConfig, rules: tuple[Rule, ...], skip: tuple[str, ...], example: Tensor | None
) -> nn.Module:
    _refuse(model, skip)
    seen = probe_any(model, example)
    if config.encode and seen is None:
        raise ValueError(
            "`model` takes no image of a usual size: give an `example` of its input, or `encode=False` for inputs that "
            "are no images"
        )
    if seen is not None and seen.example.ndim > 1:
        config = with_constants(config, model, seen.example.shape[1])
    notes = list[ConvertedModule]()
    classifier = None if seen is None else _classifier(model, config, seen, skip, notes)
    walk = _Walk(config, (*rules, *RULES), skip, notes)
    root = walk.converted(model, "")
    if not walk.replaced:
        raise ValueError("`model` has no module that a rule converts")
    if classifier is not None:
        _add_constants(root, config, classifier)
    network = root if not config.encode or seen is None else _with_pairs(root, config, seen, notes)
    if seen is not None:
        notes = _with_bypassed(network, config, seen, notes)
    setattr(network, "conversion", ConversionReport(config, tuple(notes), skip, bool(rules)))  # noqa: B010 - no module
    return network


def _around(
    model: Any, config: BcosConfig, rules: tuple[Rule, ...], skip: tuple[str, ...], example: Tensor | None
) -> nn.Module:
    """A conversion of the part of a network by name that is to be converted, and what it has to know of that."""
    part = getattr(model, "converted_part", "")
    if part:
        config = with_constants(config, model, model.in_chans)
    inner = _converted(model.get_submodule(part), config, rules, skip, example)
    if part:
        model.set_submodule(part, inner)
        model.conversion = inner.conversion
    elif inner is not model:  # a network behind another input
        return inner
    told = getattr(model, "on_converted", None)
    if told is not None:
        told(partial(bcosify, config=config, rules=rules, skip=skip, example=example, inplace=True))
    return model


def _refuse(model: nn.Module, skip: tuple[str, ...]) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"`skip` (={pattern!r}) names no module of the network")
    for path, module in model.named_modules():
        if _is_skipped(path, skip):
            continue
        if module._forward_pre_hooks and {"weight_g", "weight_orig"} & set(module._parameters):
            raise ValueError(
                f"the module {path!r} makes its weight anew before each call (weight norm, spectral norm, pruning): "
                "remove that first"
            )
        if parametrize.is_parametrized(module):
            raise ValueError(f"the module {path!r} has a parametrised weight: remove the parametrisation first")
        if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in module._parameters.values()):
            raise ValueError(f"the lazy module {path!r} has no weights yet: run the network once first")
        if _is_bcos(module):
            raise ValueError(f"the module {path!r} is a B-cos layer already: `set_b` changes its exponent")


def _is_skipped(path: str, skip: tuple[str, ...]) -> bool:
    """Whether a module, or one that it is in, stays as it is."""
    parts = path.split(".") if path else []
    above = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return any(fnmatchcase(each, pattern) for each in above for pattern in skip)


def _is_bcos(module: nn.Module) -> bool:
    return isinstance(module, BcosArguments)


class _Walk:
    """The walk through the modules, each of which is converted once."""

    def __init__(
        self, config: BcosConfig, rules: tuple[Rule, ...], skip: tuple[str, ...], notes: list[ConvertedModule]
    ) -> None:
        self._config, self._rules, self._skip, self._notes = config, rules, skip, notes
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
            if any(parameter is not None for parameter in module._parameters.values()):
                self._notes.append(ConvertedModule(path, kind, "left", "has parameters of its own, no rule"))
            return module
        made = rule.make(module, self._config, path)
        if not isinstance(made, (str, nn.Module)):
            raise TypeError(
                f"the rule for {kind} made {type(made).__name__} of {path!r}: it must return a module, or the reason "
                "why it leaves the old one as it is"
            )
        if isinstance(made, str):
            outcome = "left" if "own" in made else "kept"
            self._notes.append(ConvertedModule(path, kind, outcome, made))
            return module
        if made is module:
            self._notes.append(ConvertedModule(path, kind, "changed", "without bias or fast path"))
            return module
        _take_place(made, module)
        self.replaced += any(map(_is_bcos, made.modules()))
        self._notes.append(ConvertedModule(path, kind, "replaced", type(made).__name__))
        return made


def _take_place(new: nn.Module, old: nn.Module) -> None:
    """Give a new module the mode and the hooks of the one in whose place it comes."""
    kept = set(old.modules())
    for part in new.modules():
        if part not in kept:
            part.training = old.training
    if old in set(new.modules()):  # it goes on being called, with its hooks
        return
    for name in _HOOKS:
        vars(new)[name] = vars(new)[name] or vars(old)[name]


def _with_pairs(root: nn.Module, config: BcosConfig, seen: Probe, notes: list[ConvertedModule]) -> nn.Module:
    """The network with an input of pairs: by wider first layers, or behind a step if that does not work."""
    channels, dimensions = seen.example.shape[1], seen.example.ndim - 2
    normalize = normalization(config, channels, dimensions)
    readers = _readers(root, seen)
    if readers:
        before = [(module, _contents(module)) for module in root.modules()]
        if _widened(root, readers, normalize, seen.example):
            notes += [
                ConvertedModule(path, "first layer", "changed", f"reads {2 * channels} channels, normalised")
                for path in readers
            ]
            return root
        _restore(before)
    notes.append(ConvertedModule("", type(root).__name__, "changed", f"behind PairedInput, {2 * channels} channels"))
    around = PairedInput(root, normalize)
    around.training = normalize.training = root.training
    return around


def _widened(root: nn.Module, readers: list[str], normalize: Normalize, example: Tensor) -> bool:
    """Widen the layers that read the image; whether the network then gives for pairs what it gave for the image.

    It does not where more than these layers reads the image, or their code does more than to convolve it.
    """
    pair = _paired(torch.rand(example.shape, generator=torch.Generator().manual_seed(1)).to(example))
    before = [(module, _contents(module)) for module in root.modules()]
    try:
        difference = _difference_of_widening(root, readers, normalize, pair)
        if _TOLERANCE < difference < _ROUNDING:  # by rounding, which a deep network lets grow?
            _restore(before)
            double = copy.deepcopy(root).double()
            with DoublePrecision():
                difference = _difference_of_widening(double, readers, normalize, pair.double())
            widen(root, readers, normalize)
    except Exception:  # whatever the code around the first layer says to more channels
        return False
    return difference <= _TOLERANCE


def _difference_of_widening(root: nn.Module, readers: list[str], normalize: Normalize, pair: Tensor) -> float:
    """Widen, and compare all outputs, relative to the largest of each; 0 if they are not finite, and tell nothing.

    With exponent 1 and raw filters: by others the pair has another cosine than the image. What a last layer of zeros
    makes of all images alike is compared by the outputs of the layers instead.
    """
    image, complement = normalize(pair).chunk(2, 1)
    image = (image - complement) / 2
    with _linear_layers(root):
        expected = probe(root, image)
        of_another = probe(root, -image).outputs
    widen(root, readers, normalize)
    with _linear_layers(root):
        found = probe(root, pair)
    pairs = list(zip_longest(found.outputs, expected.outputs))
    if all(map(torch.equal, expected.outputs, of_another)):
        pairs += [(found.inner[path], each) for path, each in expected.inner.items() if path in found.inner]
    return max((_difference(ours, theirs) for ours, theirs in pairs), default=0.0)


def _difference(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None or expected is None or found.shape != expected.shape:
        return math.inf
    if not found.numel() or not bool(expected.isfinite().all()):
        return 0.0
    scale = expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((found.double() - expected.double()).abs().max() / scale)


@contextmanager
def _linear_layers(root: nn.Module) -> Iterator[None]:
    """The B-cos layers compute linear transforms inside, and are as before afterwards."""
    layers: list[Any] = [module for module in root.modules() if _is_bcos(module)]
    before = [(layer, _contents(layer)) for layer in layers]
    try:
        for layer in layers:
            layer._parameters.pop("b", None)
            layer.b, layer.normalize_weight = 1.0, False
        yield
    finally:
        _restore(before)


def _readers(root: nn.Module, seen: Probe) -> list[str]:
    """The layers that read the image: those that were seen, and those that timm names, which may read a resized one."""
    named: Any = (getattr(root, "pretrained_cfg", None) or {}).get("first_conv") or ()
    known = dict(root.named_modules())
    paths = [path for path in ((named,) if isinstance(named, str) else named) if path in known]
    fitting = [path for path in paths if getattr(known[path], "in_channels", None) == seen.example.shape[1]]
    return list(dict.fromkeys((*seen.readers, *fitting))) if seen.readers else []


def _paired(x: Tensor) -> Tensor:
    return torch.cat([x, 1 - x], 1)


def _with_bypassed(
    network: nn.Module, config: BcosConfig, seen: Probe, notes: list[ConvertedModule]
) -> list[ConvertedModule]:
    """Mark the B-cos layers that are never called, where the original called none either."""
    try:
        called = probe(network, _paired(seen.example) if config.encode else seen.example).called
    except Exception as error:
        raise ValueError(
            f"the converted network does not run: {' '.join(str(error).split())}; name the module in `skip`, or give a "
            "rule for it"
        ) from error
    unused = {path for path, module in network.named_modules() if isinstance(module, BcosArguments)} - called
    return [
        ConvertedModule(note.path, note.kind, "bypassed", "stays linear: the network uses its weight without a call")
        if note.outcome == "replaced" and note.path in unused
        else note
        for note in notes
    ]


def _classifier(
    model: nn.Module, config: BcosConfig, seen: Probe, skip: tuple[str, ...], notes: list[ConvertedModule]
) -> str | None:
    """The path of the last layer, after it has been put before the pooling where that is wanted and possible."""
    if seen.last is None or _is_skipped(seen.last, skip) or not isinstance(model.get_submodule(seen.last), nn.Linear):
        return None
    if config.classifier == "before pooling":
        for pool_path in _pools_before(model, seen.last):
            if _is_skipped(pool_path, skip):
                continue
            # An image with which the map has one position tells nothing: the next one is larger.
            outcomes = (_moved(model, pool_path, seen.last, *tried) for tried in _larger(model, seen))
            if next((outcome for outcome in outcomes if outcome is not None), False):
                detail = f"classifies positions, then averages; was {pool_path} and {seen.last}"
                notes.append(ConvertedModule(seen.last, "classifier", "changed", detail))
                return f"{seen.last}.logits" if _wants_constants(config) else None
        notes.append(ConvertedModule(seen.last, "classifier", "kept", "no pool that it could be put before"))
    return seen.last if _wants_constants(config) else None


def _wants_constants(config: BcosConfig) -> bool:
    return config.logit_bias is not None or config.temperature is not None


def _pools_before(model: nn.Module, last: str) -> list[str]:
    """Pools over all positions, beside the classifier or at the top."""
    above = last.rpartition(".")[0]
    names = ("global_pool", "avgpool", "pool")
    paths = [f"{prefix}.{name}" if prefix else name for prefix in dict.fromkeys((above, "")) for name in names]
    known = {path for path, _ in model.named_modules()}
    return [path for path in paths if path in known]


def _larger(model: nn.Module, seen: Probe) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs of several sizes and the outputs for them: of a small one the last map may have one position."""
    for factor in (1, 2, 4):
        example = seen.example.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        example = example + torch.randn(example.shape, generator=torch.Generator().manual_seed(factor)).to(example)
        try:
            output = probe(model, example).output
        except Exception:  # not this size
            continue
        if output is not None:
            yield example, output


def _moved(model: nn.Module, pool_path: str, last: str, example: Tensor, expected: Tensor) -> bool | None:
    """Put the classifier before the pool, and prove that the output is the same; if not, nothing is changed.

    None if the example does not tell.
    """
    before = [(module, _contents(module)) for module in model.modules()]
    linear: Any = model.get_submodule(last)
    above = last.rpartition(".")[0]
    flatten_path = f"{above}.flatten" if above else "flatten"
    changed = (module for path, module in model.named_modules() if path in (last, pool_path, flatten_path))
    if any(vars(module)[name] for module in changed for name in _HOOKS):
        return False
    conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
    conv.weight = nn.Parameter(linear.weight.detach()[..., None, None], linear.weight.requires_grad)
    conv.bias = linear.bias
    head = nn.Sequential(OrderedDict(conv=conv, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(-3)))
    same: bool | None = False
    try:
        if any(path == flatten_path for path, _ in model.named_modules()):
            model.set_submodule(flatten_path, nn.Identity().train(linear.training))
        model.set_submodule(pool_path, nn.Identity().train(linear.training))
        model.set_submodule(last, head.train(linear.training))
        same = _same_outputs(model, conv, example, expected)
    except Exception:  # code between pool and classifier that needs a vector
        pass
    if not same:
        _restore(before)
    return same


def _same_outputs(model: nn.Module, conv: nn.Module, example: Tensor, expected: Tensor) -> bool | None:
    """Whether the outputs are as before, on a map of several positions; None if there is one position."""
    positions = list[int]()
    handle = conv.register_forward_hook(lambda _module, _inputs, output: positions.append(output[0, 0].numel()))
    try:
        output = probe(model, example).output
    finally:
        handle.remove()
    if output is None or output.shape != expected.shape or not positions:
        return False
    if positions[-1] == 1:
        return None
    return bool((output - expected).abs().max() <= _TOLERANCE * expected.abs().max())


def _add_constants(root: nn.Module, config: BcosConfig, path: str) -> None:
    name = path.removesuffix(".logits")
    layer: Any = root.get_submodule(name)
    last = layer.conv if path != name else layer
    classes = last.out_channels if path != name else last.out_features
    bias = -math.log(max(classes - 1, 1)) if config.logit_bias == "uniform" else config.logit_bias
    logits = LogitLayer(config.temperature, bias).train(layer.training)
    if path != name:
        layer.add_module("logits", logits)
    else:
        root.set_submodule(name, nn.Sequential(OrderedDict(linear=layer, logits=logits)).train(layer.training))
