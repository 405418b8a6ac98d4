"""`export_onnx`: a network's explanation as one file."""

import copy
import errno
import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bcoskit import __version__
from bcoskit._checks import check_evaluation_mode, untouched
from bcoskit._explain import explain
from bcoskit._files import whole_file
from bcoskit._fuse import fuse
from bcoskit._layers import logits_of, uncompiled
from bcoskit.data import ImageTransform
from bcoskit.dynamic import ProductPolicy
from bcoskit.export._check import disagreement
from bcoskit.export._trace import SizesSeen, batch_size, trace_explanation
from bcoskit.models import Loss

_LARGEST = 2**31  # bytes, of a file in the format
_EXPORTING = Lock()  # while torch traces, it changes what others of its functions do, in all threads


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` has written.

    Attributes:
        path: The file.
        error: The largest difference between its outputs and those of `explain` in double precision, relative to the
            largest entry; None if it was not run, since onnxruntime is not installed.
    """

    path: Path
    error: float | None


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    transform: ImageTransform | None = None,
    classes: Sequence[str] | None = None,
    loss: Loss | None = None,
    card: Mapping[str, str] | None = None,
    weights_output: bool = False,
    products: ProductPolicy = "split",
) -> OnnxExport:
    """Write a network with its explanation as one ONNX file: forward and backward pass, without torch.

    Inputs are `image` (N, channels, H, W), float32 in [0, 1], whose encoding or normalisation is part of the file, and
    `target` (N,), int64, the class that is explained, or -1 for the largest logit; any other number is an error when
    the file is run. Outputs are `logits` (N, K), `contributions` (N, H, W), which are `W(x)·x` summed over the
    channels, and with `weights_output` the `weights` W(x) (N, channels of the network's input, H, W). N is free.

    What evaluation only multiplies with is folded into the filters (`bcoskit.fuse`). Where onnxruntime is installed
    the file is run with batches of 1 and 3 images, and must agree with `explain` to 1e-5 of the largest entry, or as
    closely as `explain` in single precision agrees with itself in double precision.

    The metadata of the file hold `classes` and `transform` as JSON, and as text `name`, `architecture`, `loss`,
    `products`, `bcoskit_version` and what `card` says.

    Args:
        model: A network in evaluation mode with logits (N, K). It is not changed.
        path: The file, which ends in `.onnx`; it appears complete or not at all.
        transform: The network's test-time transform; by default the one that a network by name has.
        classes: Names of the classes; by default those that it has, or numbers.
        loss: What makes probabilities of the logits: `"bce"` a sigmoid, `"cross_entropy"` a softmax, `"none"` nothing;
            by default what a network by name says, else `"none"`.
        card: What else is to be known of the network, such as `source` and `licence`, by other keys than the above.
        weights_output: Whether the file also returns W(x).
        products: As of `explain`.

    Returns:
        The file, and how closely it agrees.

    Raises:
        ImportError: If the packages of `bcoskit[export]` are not installed.
        TypeError: If `model` is no module, or something else is of a wrong type.
        ValueError: If the network is in training mode, there is no transform, the network cannot be run with what the
            transform makes, it has no logits (N, K), `classes` are not as many, `loss` is unknown, `card` has a
            key that is taken, an operation has no counterpart in the format, the weights are too large for one file,
            or the file does not agree with `explain`.
        NotLinearError: If the network is not dynamic linear.
        OSError: If the file cannot be written.
    """
    _require("onnx", "onnx_ir", "onnxscript")
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"`path` (={str(path)!r}) must end in .onnx")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    network: Any = uncompiled(model)
    check_evaluation_mode(network)
    transform = getattr(network, "transform", None) if transform is None else transform
    if transform is None:
        raise ValueError("`transform` must be given: `model` does not come of `create_model`")
    if not isinstance(transform, ImageTransform):
        raise TypeError(f"`transform` must be an ImageTransform, got {type(transform).__name__}")
    with whole_file(path) as unfinished:
        unfinished.touch()  # says at once if it cannot be written
        with _EXPORTING:
            network, enter = _on_cpu(network), _entrance(transform)
            count, batch = _count_classes(network, enter, transform, products)
            metadata = _metadata(network, transform, classes, loss, card, products, count)
            _write(network, enter, transform, batch, weights_output, products, metadata, unfinished)
            error = None
            if _is_installed("onnxruntime"):
                error = disagreement(unfinished, network, enter, _shape(transform), products)
    return OnnxExport(path, error)


def _write(
    network: nn.Module,
    enter: Callable[[Tensor], Tensor],
    transform: ImageTransform,
    batch: int,
    weights_output: bool,
    products: ProductPolicy,
    metadata: dict[str, str],
    path: Path,
) -> None:
    import onnx_ir

    from bcoskit.export._graph import onnx_model

    fused = _fused(network)
    shape = _shape(transform)
    outputs = ["logits", "contributions", *["weights"] * weights_output]
    try:
        with untouched(torch.device("cpu")):
            trace = trace_explanation(lambda x: logits_of(fused(x)), enter, shape, batch, products, weights_output)
        model = onnx_model(trace, shape, batch, outputs)
    except Exception as error:  # tracers and exporters answer what they cannot do with nearly every kind of exception
        raise ValueError(f"the explanation of the network cannot be exported: {_reason(error)}") from error
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.producer_name, model.producer_version = "bcoskit", __version__
    _check_size(
        sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    )
    try:
        onnx_ir.save(model, path)
    except OSError:
        raise
    except Exception as error:  # of protobuf, whose kinds are no subclasses of one
        raise ValueError(
            f"the file cannot be written, as one of 2 GiB and more cannot: {type(error).__name__}: {error!s:.300}"
        ) from error


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy in single precision, whatever device and precision the network has."""
    network = copy.deepcopy(model).requires_grad_(False).to("cpu", torch.float32)
    _check_size(sum(tensor.nbytes for tensor in network.state_dict().values()))
    return network


def _check_size(weights: int) -> None:
    if weights >= _LARGEST:
        raise ValueError(f"the weights have {weights / 2**30:.1f} GiB, an ONNX file holds less than 2")


def _fused(network: nn.Module) -> nn.Module:
    try:
        return fuse(network)
    except ValueError:  # exponents that were learnt stay as they are
        return network


def _shape(transform: ImageTransform) -> tuple[int, int, int]:
    return transform.channels, transform.size, transform.size


def _entrance(transform: ImageTransform) -> Callable[[Tensor], Tensor]:
    """What makes a network's input of images, as `ImageTransform.encode_pixels`, without a look at values."""
    if transform.encoding == "bcos":
        return lambda image: torch.cat([image, 1 - image], 1)

    def normalized(image: Tensor) -> Tensor:
        mean, std = (image.new_tensor(values).reshape(-1, 1, 1) for values in (transform.mean, transform.std))
        return (image - mean) / std

    return normalized


def _count_classes(
    network: nn.Module, enter: Callable[[Tensor], Tensor], transform: ImageTransform, products: ProductPolicy
) -> tuple[int, int]:
    """The number of logits of a network that `explain` explains, and of samples to trace; raises as `explain`."""
    image = torch.rand(1, *_shape(transform), generator=torch.Generator().manual_seed(0))
    x = enter(image)
    try:
        with untouched(image.device), torch.no_grad():
            output = logits_of(network(x))
    except Exception as error:  # whatever a network raises
        raise ValueError(
            f"`model` cannot be run with an input of shape {tuple(x.shape)}, which `transform` makes: {_reason(error)}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"`model` has outputs of shape {shape}, must have logits (N, K)")
    with SizesSeen() as seen:
        explain(network, x, products=products)
    return output.shape[1], batch_size(seen.found)


def _metadata(
    network: Any,
    transform: ImageTransform,
    classes: Sequence[str] | None,
    loss: str | None,
    card: Mapping[str, str] | None,
    products: ProductPolicy,
    count: int,
) -> dict[str, str]:
    if isinstance(classes, str):
        raise TypeError(f"`classes` (={classes!r:.200}) must be a list of names")
    names = getattr(network, "classes", None) if classes is None else classes
    names = [str(index) for index in range(count)] if names is None else list(names)
    if len(names) != count:
        raise ValueError(f"`classes` has {len(names)} names, the network has {count} logits")
    unnamed = [name for name in names if not isinstance(name, str)]
    if unnamed:
        raise TypeError(f"`classes` must be names, got {unnamed[0]!r:.200} of type {type(unnamed[0]).__name__}")
    loss_name: Any = getattr(network, "loss", "none") if loss is None else loss
    if loss_name not in get_args(Loss):
        raise ValueError(f"`loss` (={loss_name!r:.200}) must be one of {', '.join(get_args(Loss))}")
    name = getattr(network, "name", None)
    name = name if isinstance(name, str) else None
    known = {
        "name": name or type(network).__name__,
        "architecture": name.partition(".")[0] if name else type(network).__name__,
        "loss": loss_name,
        "classes": json.dumps(names),
        "transform": json.dumps(asdict(transform)),
        "products": products,
        "bcoskit_version": __version__,
    }
    return known | _checked_card(card or {}, known)


def _checked_card(card: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """What a card adds to what is known of a network anyway."""
    for key, value in card.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"`card` must hold text by name, its {key!r} is {value!r:.200}")
        if key in known:
            raise ValueError(
                f"`card` must not hold {key!r} (={value!r:.200}): the file says {known[key]!r:.200} itself"
            )
    return dict(card)


def _reason(error: BaseException) -> str:
    """What of a chain of exceptions names the operation, in one line."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = "\n".join(str(link) for link in chain)
    if "_local_scalar_dense" in text or "data-dependent" in text.lower():
        return "the network decides by values of its input in Python"
    found = re.search(r"OpOverload\(op='([\w.:]+)'|No decomposition[^\n]*?(aten[.:]+\w+)", text)
    if found is not None:
        return f"ONNX has no counterpart of the operation {found[1] or found[2]}"
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    return f"{type(chain[-1]).__name__}: {lines[0] if lines else 'no reason is given':.300}"


def _require(*packages: str) -> None:
    for package in packages:
        if not _is_installed(package):
            raise ImportError(f'export needs {package}: pip install "bcoskit[export]"')


def _is_installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return False
    return True
