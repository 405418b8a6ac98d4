"""What a network does with an input, seen from outside: who reads the image, who is called, who gives the output."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bcoskit._layers import logits_of
from bcoskit.dynamic._mode import name_of, tensors_in

_DIMENSIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_SIZES = (32, 64, 96, 128, 224, 256, 384)


@dataclass(frozen=True)
class Probe:
    """What was seen.

    Attributes:
        example: The input.
        output: The network's output, if it is one tensor.
        outputs: All tensors of the network's output, in their order; those in data classes as well.
        inner: The last output of each layer that is one tensor, by its path.
        readers: Paths of the layers that read the input itself.
        last: Path of the layer whose output is the network's.
        called: Paths of the modules that were called.
        written: Paths of the layers whose output was written to in place.
    """

    example: Tensor
    output: Tensor | None
    outputs: tuple[Tensor, ...]
    inner: Mapping[str, Tensor]
    readers: tuple[str, ...]
    last: str | None
    called: frozenset[str]
    written: frozenset[str]


def probe(model: nn.Module, example: Tensor) -> Probe:
    """Run a network on an example, in evaluation mode and without gradients; it is as before afterwards."""
    readers, called, outputs = list[str](), set[str](), dict[str, Tensor]()
    versions = list[tuple[str, Tensor, int]]()
    handles: list[Any] = []

    def watch(path: str, module: nn.Module) -> None:
        def note(caller: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if caller is not module:  # the one in whose place this one came, and whose hooks it shares
                return
            called.add(path)
            if not path:  # a network of one layer has nothing inside
                return
            if arguments and isinstance(arguments[0], Tensor) and _is_same(arguments[0], example):
                readers.append(path)
            if isinstance(output, Tensor):
                outputs[path] = output
                versions.append((path, output, output._version))

        handles.append(module.register_forward_hook(note))

    for path, module in _leaves(model):
        watch(path, module)
    try:
        with evaluating(model):
            result = model(example)
    finally:
        for handle in handles:
            handle.remove()
    logits = logits_of(result)
    output = logits if isinstance(logits, Tensor) else None
    last = None
    if output is not None:
        last = next((path for path, found in reversed(outputs.items()) if found is output), None)
    return Probe(
        example,
        output,
        tuple(_tensors(result)),
        outputs,
        tuple(dict.fromkeys(readers)),
        last,
        frozenset(called),
        frozenset(path for path, tensor, version in versions if tensor._version != version),
    )


def _leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if not module._modules]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
    elif isinstance(logits_of(value), Tensor):
        yield logits_of(value)


def _is_same(tensor: Tensor, example: Tensor) -> bool:
    try:
        return tensor.data_ptr() == example.data_ptr() and tensor.shape == example.shape
    except RuntimeError:  # what `torch.vmap` hands to layers has no storage
        return False


class WeightUses(TorchFunctionMode):
    """Watches which layers' weights are computed with while the layers themselves do not run.

    Args:
        model: The network.

    Attributes:
        found: Names of the functions that take a weight, by the path of its layer.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = {}
        self._leaves = _leaves(model)
        self._owners: dict[int, set[str]] = {}
        for path, module in self._leaves:
            for parameter in module._parameters.values():
                self._owners.setdefault(id(parameter), set()).add(path)
        self._running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "WeightUses":
        for path, module in self._leaves:
            self._watch(path, module)
        super().__enter__()
        return self

    def _watch(self, path: str, module: nn.Module) -> None:
        def begin(caller: nn.Module, _arguments: Any) -> None:
            if caller is module:  # and none whose hooks it shares
                self._running.append(path)

        def end(caller: nn.Module, _arguments: Any, _output: Any) -> None:
            if caller is module:
                self._running.remove(path)

        self._handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not any(tensor.is_floating_point() for tensor in tensors_in(output)):  # shapes and types are read by many
            return output
        for tensor in tensors_in([args, kwargs]):
            owners = self._owners.get(id(tensor), set())
            if owners.isdisjoint(self._running):
                for path in owners:
                    self.found.setdefault(path, set()).add(name_of(func))
        return output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; modes, buffers and torch's random state as before afterwards."""
    training = [module for module in model.modules() if module.training]
    tables = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for module, table in tables:
            module._buffers.update(table)
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def examples(model: nn.Module) -> Iterator[Tensor]:
    """Small inputs that a network may take: noise of the sizes that its configuration names, or usual ones."""
    first = next((module for module in model.modules() if isinstance(module, tuple(_DIMENSIONS))), None)
    dimensions = next((count for kind, count in _DIMENSIONS.items() if isinstance(first, kind)), 2)
    configuration = getattr(model, "pretrained_cfg", None) or {}
    size = configuration.get("input_size")
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None and built_for is not None:  # timm may have been asked for another size
        size = (size[0], *built_for)
    sizes: list[tuple[int, ...]] = [(side,) * dimensions for side in (_SIZES if dimensions < 3 else _SIZES[:2])]
    if size is not None:
        # A network that takes other sizes than its own is quicker to try with small ones.
        sizes = [(side, side) for side in _SIZES if side < size[-1]] + [tuple(size[1:])]
        if configuration.get("fixed_input_size"):
            sizes = [tuple(size[1:])]
    own = getattr(first, "in_channels", 3)
    # The configuration tells the channels that timm's own weights are for; others may have been asked for.
    counts = (own,) if size is None else tuple(dict.fromkeys((size[0], own)))
    parameter = next(model.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    for count, shape in product(counts, sizes):
        yield torch.randn(1, count, *shape, generator=generator).to(parameter.device, parameter.dtype)


def probe_any(model: nn.Module, given: Tensor | None) -> Probe | Exception:
    """Probe with a given example, or with the first that works; if none does, what the network said of the last.

    Raises:
        ValueError: If the network does not take the given one.
    """
    if given is not None:
        try:
            return probe(model, given)
        except Exception as error:
            raise ValueError(
                f"`example` of shape {tuple(given.shape)} is no input of the network: {' '.join(str(error).split())}"
            ) from error
    refusal: Exception = ValueError("there is no input to try")
    for example in examples(model):
        try:
            return probe(model, example)
        except Exception as error:  # not this size
            refusal = error
    return refusal
