"""A run of metrics and methods: resumable, over any number of processes, with the same rows in the end."""

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from bcoskit import __version__
from bcoskit._checks import check_evaluation_mode
from bcoskit._files import whole_file
from bcoskit._fingerprint import fingerprint
from bcoskit._processes import share
from bcoskit.evaluation._accuracy import Accuracy
from bcoskit.evaluation._loop import (
    Metric,
    Part,
    check_hopeful,
    chunks,
    in_turn,
    item_of,
    labels_of,
    measure_chunk,
    merged,
    settings_of,
)
from bcoskit.evaluation._methods import METHODS, name_of, resolve
from bcoskit.evaluation._result import Failure, Result, Row

SETTINGS, PARTS = "settings.json", "parts"
_REJECTED = "rejected"  # in the settings of a run that ended when its metrics and methods were tried
_IMAGES_OF_ACCURACY = 512  # in one part
_SAMPLED = 16  # images that tell datasets apart

Progress: TypeAlias = Callable[[str, int, int], object]


@dataclass(frozen=True)
class _Job:
    """One metric with one method, and the parts that it consists of."""

    metric: Metric
    method: Any
    units: Sequence[Any]
    parts: list[range]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.metric.name} of {name_of(self.method)}" if self.metric.needs_method else self.metric.name

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.json"


def evaluate(
    model: nn.Module,
    dataset: Any,
    metrics: Sequence[Metric],
    methods: Sequence[Any] = ("bcos",),
    *,
    out: str | Path,
    name: str = "model",
    batch_size: int = 1,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[Result]:
    """Measure metrics with methods on a dataset, and keep every row.

    Predictions of all images come first. Each part of the work, `batch_size` units, is written to `out` when it is
    done; a run that was broken off goes on with what is missing, and ends with the same rows. Several processes, as
    `torchrun` starts them (`RANK`, `WORLD_SIZE`), share the parts and take over what another one has not done; there,
    a run with the same network, images and settings that is in `out` is always gone on with.

    Args:
        model: A network in evaluation mode.
        dataset: A sequence of (encoded image, label), for `EnergyPointing` (encoded image, label, region).
        metrics: What is measured, such as `GridPointing(count=100)`.
        methods: Attribution methods, see `attribute`; each with each metric that needs one.
        out: Folder of the run.
        name: What the network is called in rows.
        batch_size: Units, images or grids, that are measured at once; it decides rounding.
        resume: Go on with the run in `out`, if there is one; what failed is tried again.
        progress: Called as `progress(job, done, total)` for each metric and method.

    Returns:
        The results, in the order of metrics and methods, accuracy first.

    Raises:
        ValueError: If `out` holds another run, or one that is not to be resumed; as the metrics.
    """
    check_evaluation_mode(model)
    out = Path(out)
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be at least 1")
    names = [name_of(method) for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"`methods` (={names}) must have different names")
    for method in methods:
        resolve(method)  # raises for what is none
    wanted = [metric for metric in metrics if metric.name != Accuracy.name]
    settings = {
        "model": name,
        "weights": fingerprint(model, str(model)),
        "images": len(dataset),
        "data": _digests_of(dataset),
        "metrics": [{"metric": metric.name, **settings_of(metric)} for metric in wanted],
        "methods": [_identity(method) for method in methods],
        "batch_size": batch_size,
        "loss": getattr(model, "loss", None),  # which says what its probabilities are
        "versions": {"bcoskit": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    is_new = _begin(out, settings, resume)
    first = _job(Accuracy(), None, model, dataset, (), out, _IMAGES_OF_ACCURACY)
    predictions = _worked(first, model, dataset, progress)
    try:
        jobs = [
            _job(metric, method, model, dataset, predictions.rows, out, batch_size)
            for metric in wanted
            for method in (methods if metric.needs_method else (None,))
        ]
        for job in jobs:
            _tried(job, model, dataset, progress)
    # Such as too few images for so many grids, a method that needs another network, or a package that is missing.
    except (ValueError, ImportError):
        if is_new:
            _reject(out)
        raise
    return [predictions, *(_worked(job, model, dataset, progress) for job in jobs)]


def _digests_of(dataset: Any) -> dict[str, Any]:
    """Of labels and regions, if they are at hand, and of some items: tells datasets apart without reading them.

    An item that cannot be read has none: it may be mended before the run is resumed.
    """
    digests: dict[str, Any] = {}
    labels, regions = labels_of(dataset), getattr(dataset, "regions", None)
    if labels is not None:
        digests["labels"] = _sha(labels.cpu().numpy().tobytes())
    if regions is not None:
        digests["regions"] = _sha(*map(_value_bytes, regions))
    for index in sorted({round(place * (len(dataset) - 1) / _SAMPLED) for place in range(_SAMPLED + 1)}):
        try:
            x, label, *others = item_of(dataset, index)
        except ValueError:
            digests[f"item {index}"] = None
        else:
            digests[f"item {index}"] = _sha(*map(_value_bytes, (x, label, *others)))
    return digests


def _bytes_of(tensor: Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    return f"{tuple(values.shape)}".encode() + values.flatten().view(torch.uint8).numpy().tobytes()


def _sha(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _identity(method: Any) -> str:
    """The name of a method, and of a function the digest of its code and of the values that it holds and names."""
    inner = method
    held: list[Any] = []
    while isinstance(inner, partial):
        held += [inner.args, sorted(inner.keywords.items())]
        inner = cast("Any", inner.func)
    if not isinstance(inner, FunctionType):  # an object that is called like one
        held.append(sorted(getattr(inner, "__dict__", {}).items()))
        inner = None if hasattr(inner, "attribute") else type(inner).__call__
    if not isinstance(inner, FunctionType) or inner in METHODS.values():
        return name_of(method)
    return f"{name_of(method)} {_sha(_function_bytes(inner), *map(_value_bytes, held))[:8]}"


def _function_bytes(function: Any, callers: tuple[Any, ...] = ()) -> bytes:
    if function in callers:  # it calls itself
        return b"itself"
    # A cell may be empty, of a name that is not assigned yet.
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    named = [function.__globals__.get(name) for name in sorted(_names_in(function.__code__))]
    # Functions of other modules, such as those of torch, go with their versions.
    own = [each for each in named if not isinstance(each, FunctionType) or each.__module__ == function.__module__]
    held = (*cells, function.__defaults__, function.__kwdefaults__, *own)
    return _code_bytes(function.__code__) + _value_bytes(held, (*callers, function))


def _names_in(code: CodeType) -> set[str]:
    inner = (_names_in(each) for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names}.union(*inner)


def _code_bytes(code: CodeType) -> bytes:
    constants = (_code_bytes(each) if isinstance(each, CodeType) else _value_bytes(each) for each in code.co_consts)
    return code.co_code + repr(code.co_names).encode() + b"".join(constants)


def _value_bytes(value: Any, callers: tuple[Any, ...] = ()) -> bytes:
    """Of a value, the same in every process; of objects that have no such bytes, those of their type."""
    if isinstance(value, Tensor):
        return _bytes_of(value)
    if isinstance(value, np.ndarray):
        return f"{value.shape} {value.dtype}".encode() + value.tobytes()
    if isinstance(value, (list, tuple)):
        return b"(" + b",".join(_value_bytes(each, callers) for each in value) + b")"
    if isinstance(value, (set, frozenset)):
        return b"{" + b",".join(sorted(_value_bytes(each, callers) for each in value)) + b"}"
    if isinstance(value, dict):
        return _value_bytes(list(value.items()), callers)
    if isinstance(value, FunctionType):
        return _function_bytes(value, callers)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value).encode()
    return type(value).__qualname__.encode()


def _begin(out: Path, settings: dict[str, Any], resume: bool) -> bool:
    """Make the folder of a run, or find that of the run that goes on; whether nothing is in it that must be kept."""
    file, parts = out / SETTINGS, out / PARTS
    rank, processes = share()
    now = json.loads(json.dumps(settings, default=_plain))
    is_new = True
    if file.exists():
        before = _settings_before(file)
        is_new = rejected = processes == 1 and before.get(_REJECTED, False)
        if not resume and processes == 1 and not rejected:
            raise ValueError(f"`out` (={str(out)!r}) holds a run already; `resume` it, or choose another folder")
        changed = [key for key in now if not _agree(before.get(key, now[key]), now[key])]  # earlier ones had fewer
        if rejected and {*changed} - {"metrics", "methods"}:  # what it has measured is of something else
            shutil.rmtree(parts, ignore_errors=True)
        elif changed and not rejected:
            raise ValueError(
                f"`{changed[0]}` (={now[changed[0]]}) is not that of the run in {out}; resume it with the same "
                "settings, or choose another folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())) and processes == 1:
        raise ValueError(f"`out` (={str(out)!r}) must be a new folder, or that of an earlier run")
    parts.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(now, indent=2) + "\n")
    if (resume or is_new) and rank == 0:
        for part in parts.glob("*/*.json"):
            found = _read_part(part)
            if found is None or found[1]:  # what has failed may succeed now
                part.unlink(missing_ok=True)
    return is_new


def _settings_before(file: Path) -> dict[str, Any]:
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read, so that the run cannot be resumed ({error})") from error
    return before if isinstance(before, dict) else {}


def _reject(out: Path) -> None:
    """Leave the folder of a run whose metrics or methods do not fit to one with others, which takes what is done."""
    _, processes = share()
    if processes == 1:
        write_text(out / SETTINGS, json.dumps(_settings_before(out / SETTINGS) | {_REJECTED: True}, indent=2) + "\n")


def _agree(before: Any, now: Any) -> bool:
    """Whether settings are the same, as far as both are known."""
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(
            before[key] is None or now[key] is None or before[key] == now[key] for key in now
        )
    return bool(before == now)


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} cannot be written to JSON")


def _job(
    metric: Metric, method: Any, model: nn.Module, dataset: Any, ranking: Sequence[Row], out: Path, size: int
) -> _Job:
    units = metric.units(model, dataset, ranking)
    label = f"{metric.name}-{_identity(method)}" if metric.needs_method else metric.name
    known = json.dumps([label, settings_of(metric), repr(units)], default=_plain)
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", label)[:60]
    folder = out / PARTS / f"{readable}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return _Job(metric, method, units, chunks(len(units), size), folder)


def _worked(job: _Job, model: nn.Module, dataset: Any, progress: Progress | None) -> Result:
    """Do what is missing of a job, and collect all of it."""
    found: dict[int, Part] = {}
    check_hopeful(found, len(job.units))
    for index in _turns(job):
        found[index] = _part(job, index, model, dataset)
        check_hopeful(found, len(job.units))
        if progress is not None:
            progress(job.name, sum(len(job.parts[done]) for done in found), len(job.units))
    rows, failures = merged(found)
    method = name_of(job.method) if job.metric.needs_method else None
    return Result(job.metric.name, method, tuple(rows), settings_of(job.metric), tuple(failures))


def _tried(job: _Job, model: nn.Module, dataset: Any, progress: Progress | None) -> None:
    """Measure some parts from all over until one succeeds, so that what does not fit is told before the long work.

    Raises:
        ValueError: If none does, all for the same reason.
    """
    found: dict[int, Part] = {}
    for index in _turns(job):
        found[index] = _part(job, index, model, dataset)
        check_hopeful(found, len(job.units))
        if progress is not None:
            progress(job.name, sum(len(job.parts[done]) for done in found), len(job.units))
        if found[index][0]:
            return


def _turns(job: _Job) -> list[int]:
    """The parts of a job in the order in which this process works on them, its own share first."""
    rank, processes = share()
    others = [index for index in reversed(range(len(job.parts))) if index % processes != rank]
    return [*in_turn(range(rank, len(job.parts), processes)), *others]


def _part(job: _Job, index: int, model: nn.Module, dataset: Any) -> Part:
    """What is found of a part, by this run or earlier."""
    part = _read_part(job.file(index))
    if part is None:
        part = measure_chunk(job.metric, model, dataset, job.units, job.parts[index], job.method)
        _write_part(job.file(index), *part)
    return part


def _read_part(file: Path) -> Part | None:
    """What an earlier run, or another process, has found; None if that is missing or damaged."""
    try:
        content = json.loads(file.read_text())
        return content["rows"], [Failure(**failure) for failure in content["failures"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_part(file: Path, rows: list[Row], failures: list[Failure]) -> None:
    content = {"rows": rows, "failures": [asdict(failure) for failure in failures]}
    write_text(file, json.dumps(content, allow_nan=False))


def write_text(file: Path, text: str) -> None:
    """Write a file that appears complete or not at all."""
    with whole_file(file) as unfinished:
        unfinished.write_text(text)


def table_rows(results: Sequence[Result], settings: dict[str, Any]) -> Iterator[Row]:
    """All rows of a run with what they were measured by: network, weights, metric, method, seed and versions."""
    for result in results:
        for row in result.rows:
            yield {
                "model": settings["model"],
                "weights": settings["weights"],
                "metric": result.metric,
                "method": result.method,
                "seed": result.settings.get("seed"),
                **{f"{package}_version": version for package, version in settings["versions"].items()},
                **row,
            }
