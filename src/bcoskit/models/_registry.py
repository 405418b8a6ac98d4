"""Networks by name: what makes a network out of a row or a file."""

import difflib
import fnmatch
import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bcoskit._files import write_tensors
from bcoskit.data import ImageTransform
from bcoskit.models._building import WithoutValues
from bcoskit.models._containers import Container, WeightsError, read_container
from bcoskit.models._download import cached
from bcoskit.models._hub_files import hub_file, reason
from bcoskit.models._matching import match, rows_of
from bcoskit.models._network import Network
from bcoskit.models._row import TIMM, Checkpoint, Loss, ModelRow
from bcoskit.models._rows import ROWS

# Of layers of this package, beside what their weights hold.
_CONSTANTS = ("b", "max_out", "normalize_weight", "scale", "eps", "centered", "temperature", "bias", "mean", "std")

_LARGEST_SIDE = 10_000


def list_models(pattern: str = "*", *, weights: bool = False) -> list[str]:
    """The names of all networks, in alphabetical order.

    Args:
        pattern: Shell pattern that names must match, as in `"*resnet*"`.
        weights: Whether only networks are listed for which `create_model(name, weights=True)` finds weights: in the
            package, or by a download.

    Returns:
        The names.
    """
    names = sorted(fnmatch.filter(ROWS, pattern))
    return [name for name in names if _at_hand(ROWS[name].checkpoint)] if weights else names


def model_row(name: str | os.PathLike[str], weights: bool | str | os.PathLike[str] = False) -> ModelRow:
    """What is known of a network before it is made.

    Args:
        name: As of `create_model`: one of `list_models()`, `timm/NAME` for an ordinary network of timm, or a
            `.safetensors` file.
        weights: As of `create_model`. A file that says so itself counts: classes, transform and conversion are its.

    Returns:
        The row of the table, or what the file makes of it.

    Raises:
        ValueError: If there is no network of that name; the message names the nearest ones.
        WeightsError: If the file is missing or corrupt, or is of another network.
        ConnectionError: If weights cannot be downloaded.
    """
    sources = _sources(name, weights)
    if sources[0] is None:
        return sources[1]
    path, row = sources
    return _row_of(path, row, read_container(path))


def _named_row(name: str) -> ModelRow:
    if name.startswith(TIMM):
        from bcoskit.models._timm import timm_row

        return timm_row(name)
    if name not in ROWS:
        near = difflib.get_close_matches(name, ROWS, n=3, cutoff=0.3)
        hint = f"near: {', '.join(near)}" if near else "`list_models()` lists all"
        raise ValueError(f"{name!r} is neither the name of a model nor a .safetensors file of weights; {hint}")
    return ROWS[name]


def create_model(
    name: str | os.PathLike[str],
    weights: bool | str | os.PathLike[str] = False,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> Network:
    """Make a network by its name, or from a file that training has written.

    The network is in evaluation mode; its attributes `transform`, `classes` and `loss` tell how a picture becomes its
    input and what its logits mean.

    Args:
        name: One of `list_models()`; `timm/NAME` for an ordinary network of timm; or a `.safetensors` file that
            `bcoskit train` or `save_model` has written: it says itself which network it holds, and its weights are
            loaded.
        weights: Whether to load the trained weights of that name, which are downloaded into torch's cache if need be;
            or the URL or file of weights. A file may be a `.safetensors` file, with what it says of classes and
            transform, or one of the authors: a state dict, a training checkpoint, of which an averaged copy (EMA)
            is taken if it has one.
        num_classes: Number of classes, if it is not that of the row; classes then have numbers for names. If the
            weights are for another number, the classifier is fresh, for fine-tuning.
        in_channels: Channels of the input, 6 for RGB and 2 for grey images, both encoded (3 and 1 for ordinary
            networks), if it is not that of the row.

    Returns:
        The network, of `torch.get_default_dtype()`, on the default device.

    Raises:
        ValueError: If there is no such name, it has no trained weights, or an argument contradicts the weights.
        WeightsError: If the file is missing or corrupt, would run code, or does not hold finite weights of this
            network.
        ConnectionError: If weights cannot be downloaded.
    """
    sources = _sources(name, weights)
    if sources[0] is not None:
        return _from_file(*sources, num_classes, in_channels)
    row = sources[1].with_classes(num_classes).with_channels(in_channels)
    return _pretrained(row) if weights else _filled(_skeleton(row), {})


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    transform: ImageTransform | None = None,
    training: Mapping[str, Any] | None = None,
    half: bool = False,
) -> None:
    """Write weights with all that is needed to use them, as one `.safetensors` file that `create_model` opens.

    The file appears complete or not at all.

    Args:
        model: A network that was made by `create_model`, in its original or another state.
        path: The file, which ends in `.safetensors`.
        name: The name of the network; by default that by which it was made.
        classes: Names of its classes; by default those that it has.
        transform: Its test-time transform; by default the one that it has.
        training: Plain values on how the weights came about.
        half: Store filters and matrices in half precision, in half of the bytes; they are rounded to 11 bits, and
            networks compute with them in single precision as ever. What is too small or too large for that is stored
            as it is.

    Raises:
        TypeError: If `classes` is a single string, or `training` holds what JSON cannot.
        ValueError: If there is no network of that name, `model` is another one or has another number of classes, an
            exponent or another constant is not that of the name, a weight is not finite, classes or transform are of no
            use to it, or `path` has another suffix.
    """
    if name is None or classes is None or transform is None:
        if not isinstance(model, Network) or not hasattr(model, "transform"):
            raise ValueError("`name`, `classes` and `transform` must be given: `model` does not come of `create_model`")
        name = model.name if name is None else name
        classes = model.classes if classes is None else classes
        transform = model.transform if transform is None else transform
    conversion: Any = getattr(model, "conversion", None)
    if conversion is not None and conversion.has_own_rules:
        raise ValueError("`model` was converted by `rules` of its own, which a file cannot hold")
    row, path = _named_row(name), Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` (={str(path)!r}) must end in .safetensors")
    if isinstance(classes, str):
        raise TypeError(f"`classes` (={classes!r:.200}) must be a list of names")
    if not isinstance(training, (Mapping, type(None))):
        raise TypeError(f"`training` (={training!r:.200}) must be a mapping of plain values")
    try:
        json.dumps(training)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`training` (={training!r:.200}) must hold plain values: {error}") from error
    description = {
        "model": name,
        "classes": list(classes),
        "transform": asdict(transform),
        "loss": model.loss if isinstance(model, Network) and hasattr(model, "loss") else row.loss,
        "training": dict(training or {}),
        "fused": getattr(model, "fused", False),
    }
    if conversion is not None:
        description["conversion"] = {**asdict(conversion.config), "skip": list(conversion.skip)}
    tensors = model.state_dict()
    if row.name.startswith(TIMM) and not isinstance(model, Network):
        tensors = {f"model.{key}": tensor for key, tensor in tensors.items()}
    container = Container(tensors, description)
    described = _described(path, container)  # as it will be read
    if half:
        tensors = {key: _halved(tensor) for key, tensor in tensors.items()}
    rebuilt = _rebuilt(described, described.num_classes)
    fault = match(Container(tensors, {}), rebuilt, row.prefix).fault
    if fault is not None:
        raise ValueError(f"`model` is not {name} with {len(classes)} classes of finite weights: it {fault}")
    _check_constants(model, rebuilt, name)
    write_tensors(path, tensors, description)


def _check_constants(model: nn.Module, rebuilt: nn.Module, name: str) -> None:
    """Raise a `ValueError` if a layer has a constant that a file does not hold, and that the name does not tell."""
    above = "model." if isinstance(rebuilt, Network) and not isinstance(model, Network) else ""
    known = dict(rebuilt.named_modules())
    for path, layer in model.named_modules():
        expected = known.get(f"{above}{path}" if path else above.removesuffix("."))
        if type(expected) is not type(layer) or not type(layer).__module__.startswith("bcoskit.nn."):
            continue
        for attribute in _CONSTANTS:
            ours, theirs = (vars(each).get(attribute) for each in (layer, expected))
            if ours != theirs:
                raise ValueError(
                    f"`model` differs from {name} in {path}.{attribute} (={ours}, not {theirs}), which a file does not "
                    "hold"
                )


def _carried() -> list[str]:
    """The networks whose weights are in the package."""
    return [name for name, row in ROWS.items() if row.checkpoint is not None and row.checkpoint.carried]


def _halved(tensor: Tensor) -> Tensor:
    """Filters in half precision, unless their values are too small or too large for its 11 bits."""
    if tensor.ndim < 2 or not tensor.is_floating_point() or not tensor.numel():
        return tensor
    half = tensor.half()
    rows, error = tensor.detach().flatten(1), (half.float() - tensor).detach().flatten(1)
    return half if bool((error.abs().amax(1) <= rows.abs().amax(1) * 2.0**-11).all()) else tensor


def _at_hand(checkpoint: Checkpoint | None) -> bool:
    return checkpoint is not None and not checkpoint.by_hand


def _sources(
    name: str | os.PathLike[str], weights: bool | str | os.PathLike[str]
) -> tuple[Path, ModelRow | None] | tuple[None, ModelRow]:
    """The file of weights, None if there is to be none or timm has it, and the row, None if the file is to tell."""
    if isinstance(name, os.PathLike) or (name not in ROWS and Path(name).suffix == ".safetensors"):
        if not isinstance(weights, bool):
            raise ValueError(f"`weights` (={str(weights)!r}) must not be given: {name} is a file of weights itself")
        if Path(name).suffix != ".safetensors":
            raise WeightsError(
                f"{name}: is no .safetensors file; give the name of the network, and the file as `weights`"
            )
        return Path(name), None
    row = _named_row(name)
    if weights is False or (weights is True and name.startswith(TIMM)):
        return None, row
    return _released(row) if weights is True else _given(weights), row


def _released(row: ModelRow) -> Path:
    """The file of a row's own weights, after a download if need be."""
    checkpoint = row.checkpoint
    if checkpoint is None:
        having = list_models(f"{row.name.partition('.')[0]}.*", weights=True) or _carried()
        raise ValueError(f"{row.name!r} has no trained weights; networks that have some: {', '.join(having[:8])}")
    if checkpoint.by_hand:
        raise ValueError(
            f"the weights of {row.name!r} cannot be downloaded by name: get their file from {checkpoint.location} "
            "and give it as `weights`"
        )
    if checkpoint.is_url:
        return cached(checkpoint.location, checkpoint.sha256)
    with resources.as_file(resources.files("bcoskit.assets") / checkpoint.location) as path:
        return path


def _pretrained(row: ModelRow) -> Network:
    """A network of timm with the weights that timm has for it."""
    import timm

    configuration: Any = timm.get_pretrained_cfg(row.arguments["architecture"])
    if not configuration.has_weights:
        raise ValueError(f"{row.name!r} has no trained weights in timm; give a file as `weights`")
    arguments: dict[str, Any] = {"pretrained": True}
    try:
        if configuration.hf_hub_id and not configuration.hf_hub_filename:
            arguments["file"] = str(hub_file(configuration.hf_hub_id))
        return _filled(_skeleton(replace(row, arguments={**row.arguments, **arguments})), {})
    except Exception as error:  # what timm's downloads stand on has many kinds
        message = f"the weights of {row.name!r} cannot be had from timm ({reason(error)}); give a file as `weights`"
        raise ConnectionError(message) from error


def _given(weights: str | os.PathLike[str]) -> Path:
    if not isinstance(weights, (str, os.PathLike)) or not os.fspath(weights):
        raise TypeError(f"`weights` (={weights!r}) must be True, False, a file or a URL")
    text = os.fspath(weights)
    return cached(text) if text.lower().startswith(("https://", "http://")) else Path(weights)


def _skeleton(row: ModelRow) -> Network:
    """The network of a row, without values."""
    network = _rebuilt(row, row.num_classes)
    network.name, network.transform, network.classes, network.loss = row.name, row.transform, row.classes, row.loss
    network.rebuild = partial(_rebuilt, row)
    return network


def _filled(network: Network, tensors: Mapping[str, Tensor]) -> Network:
    """Give a skeleton its weights. What is not given is fresh; no weight is made twice."""
    device = torch.get_default_device()
    expected = network.state_dict()
    taken: set[int] = set()
    own = {key: _owned(tensor, expected[key].dtype, device, taken) for key, tensor in tensors.items()}
    network.load_state_dict(own, strict=False, assign=True)
    network.materialize(network, device)
    return network.eval()


def _rebuilt(row: ModelRow, num_classes: int) -> Network:
    with nullcontext() if row.needs_values else WithoutValues():
        return row.build(num_classes)


def _owned(tensor: Tensor, dtype: torch.dtype, device: torch.device, taken: set[int]) -> Tensor:
    """The tensor itself where it has memory of its own, otherwise a copy."""
    tensor = tensor.detach().to(device, dtype).contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in taken:
        tensor = tensor.clone()
    taken.add(tensor.data_ptr())
    return tensor


def _from_file(path: Path, row: ModelRow | None, num_classes: int | None, in_channels: int | None) -> Network:
    """The network whose weights a file holds: the one that the file describes, which must be `row` if that is given.

    Only a file of bare weights, without description, leaves all to `row`.
    """
    container = read_container(path)
    row = _row_of(path, row, container)
    if in_channels is not None and in_channels != row.in_channels:
        raise ValueError(
            f"`in_channels` (={in_channels}) contradicts the weights, which are for {row.in_channels}; "
            "the network's `transform` makes grey images fit"
        )
    wanted = row.with_classes(num_classes)
    network = _skeleton(wanted)
    fresh = _fresh_parts(container, network, wanted) if num_classes is not None else ()
    found = match(container, network, wanted.prefix, fresh=fresh)
    if found.fault is not None:
        raise WeightsError(f"{path}: does not fit {wanted.name} with {wanted.num_classes} classes, it {found.fault}")
    return _filled(network, found.tensors)


def _row_of(path: Path, row: ModelRow | None, container: Container) -> ModelRow:
    """The row that a file describes, which must be that of `row` if that is given; `row` if it describes none."""
    if row is not None and container.description.get("model") is None:
        return row
    described = _described(path, container)
    if row is not None and row.name != described.name:
        raise WeightsError(f"{path}: holds weights of {described.name}, not of {row.name}")
    return described


def _fresh_parts(container: Container, network: Network, row: ModelRow) -> tuple[str, ...]:
    """The classifiers, if the file has them for another number of classes."""
    weight = next(
        key for key in network.state_dict() if key.startswith(f"{network.classifier_path}.") and key.endswith("weight")
    )
    rows = rows_of(container, network, row.prefix, weight)
    if rows is None or rows == len(network.state_dict()[weight]):
        return ()
    if row.fused:
        raise ValueError(f"`num_classes` (={row.num_classes}) cannot change a fused network: take the original")
    return (
        (network.classifier_path,)
        if network.optional_path is None
        else (network.classifier_path, network.optional_path)
    )


def _described(path: Path, container: Container) -> ModelRow:
    """The row that a file's description stands for; every value of it is checked, since anyone may have written it."""
    name, classes = container.description.get("model"), container.description.get("classes")
    if name is None:
        raise WeightsError(
            f"{path}: does not say which network it holds; give the name of the network, and the file as `weights`"
        )
    try:
        row = _named_row(name)
    except (AttributeError, TypeError, ValueError):
        raise WeightsError(f"{path}: holds weights of an unknown network, {reprlib.repr(name)}") from None
    if not isinstance(classes, list) or not classes or not all(isinstance(each, str) for each in classes):
        raise WeightsError(f"{path}: its `classes` (={reprlib.repr(classes)}) must be a list of names")
    lengths = [len(tensor) for tensor in container.tensors.values() if tensor.ndim and tensor.numel()]
    if len(classes) > max(lengths, default=0):
        # Seen before a network is built, which might be far larger than the file.
        raise WeightsError(f"{path}: names {len(classes)} classes, but no weight has as many rows")
    row = _converted(path, row, container, len(classes))
    try:
        transform = _transform(container.description.get("transform"), row.transform)
    except (TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"{path}: its `transform` is of no use ({error})") from error
    loss = container.description.get("loss", row.loss)
    if loss not in get_args(Loss):
        raise WeightsError(f"{path}: its `loss` (={reprlib.repr(loss)}) must be one of {', '.join(get_args(Loss))}")
    fused = container.description.get("fused") is True
    return replace(row, own_classes=tuple(classes), transform=transform, loss=loss, fused=fused)


def _converted(path: Path, row: ModelRow, container: Container, num_classes: int) -> ModelRow:
    """The row with the conversion that a file describes, after a look at whether it holds as much as that has."""
    described = container.description.get("conversion")
    if described is not None:
        from bcoskit.convert import BcosConfig

        try:
            values = dict(described)
            skip = tuple(str(pattern) for pattern in values.pop("skip", ()))
            for key in ("mean", "std"):
                values[key] = None if values.get(key) is None else tuple(values[key])
            row = row.converted(BcosConfig(**values), skip)
        except (TypeError, ValueError, OverflowError) as error:
            raise WeightsError(f"{path}: its `conversion` is of no use ({error})") from error
    if row.needs_values:
        with torch.device("meta"):
            ordinary = replace(row, conversion=None).build(num_classes)
        needed = sum(parameter.numel() for parameter in ordinary.parameters())
        needed *= 1 if row.conversion is None else row.conversion.max_out
        if needed > 2 * sum(tensor.numel() for tensor in container.tensors.values()):
            raise WeightsError(f"{path}: holds far less than the weights of {row.name}")
    return row


def _transform(values: Any, usual: ImageTransform) -> ImageTransform:
    """The transform with values from a file, which must encode as `usual` does, perhaps at another size."""
    transform = ImageTransform(**values)
    sizes = (transform.size, transform.channels, transform.size if transform.resize is None else transform.resize)
    if not all(type(size) is int and size <= _LARGEST_SIDE for size in sizes):
        raise ValueError(f"size, channels and resize must be integers up to {_LARGEST_SIDE}: {reprlib.repr(sizes)}")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (*transform.mean, *transform.std)):
        raise ValueError("mean and std must be finite numbers")
    if transform.encoding != usual.encoding:
        raise ValueError(f"the network needs encoding {usual.encoding!r}")
    return transform
