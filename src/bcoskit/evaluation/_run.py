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
from bcoskit.evaluation._loop import Metric, check_hopeful, chunks, item_of, measure_chunk, settings_of
from bcoskit.evaluation._methods import METHODS, name_of, resolve
from bcoskit.evaluation._result import Failure, Result, Row

SETTINGS, PARTS = "settings.json", "parts"
_REJECTED = "rejected"  # in the settings of a run that ended at its predictions, since its metrics do not fit them
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
        "versions": {"bcoskit": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    _begin(out, settings, resume)
    first = _job(Accuracy(), None, model, dataset, (), out, _IMAGES_OF_ACCURACY)
    results = [_worked(first, model, dataset, progress)]
    for metric in wanted:
        for method in methods if metric.needs_method else (None,):
            try:
                job = _job(metric, method, model, dataset, results[0].rows, out, batch_size)
            except ValueError:  # such as too few images for so many grids
                _reject(out)
                raise
            results.append(_worked(job, model, dataset, progress))
    return results


def _digests_of(dataset: Any) -> dict[str, Any]:
    """Of labels and regions, if they are at hand, and of some items: tells datasets apart without reading them.

    An item that cannot be read has none: it may be mended before the run is resumed.
    """
    digests: dict[str, Any] = {}
    labels, regions = getattr(dataset, "labels", None), getattr(dataset, "regions", None)
    if labels is not None:
        digests["labels"] = _sha(torch.as_tensor(labels).to(torch.int64).cpu().numpy().tobytes())
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
    """The name of a method, and of a function the digest of its code and of the values that it holds."""
    inner = method
    held: list[Any] = []
    while isinstance(inner, partial):
        held += [inner.args, sorted(inner.keywords.items())]
        inner = cast("Any", inner.func)
    code = getattr(inner, "__code__", None)
    if code is None or isinstance(method, str) or inner in METHODS.values():
        return name_of(method)
    return f"{name_of(method)} {_sha(_function_bytes(inner), *map(_value_bytes, held))[:8]}"


def _function_bytes(function: Any, callers: tuple[Any, ...] = ()) -> bytes:
    if function in callers:  # it calls itself
        return b"itself"
    # A cell may be empty, of a name that is not assigned yet.
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    held = (*cells, function.__defaults__, function.__kwdefaults__)
    return _code_bytes(function.__code__) + _value_bytes(held, (*callers, function))


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


def _begin(out: Path, settings: dict[str, Any], resume: bool) -> None:
    file, parts = out / SETTINGS, out / PARTS
    rank, processes = share()
    now = json.loads(json.dumps(settings, default=_plain))
    if file.exists():
        before = _settings_before(file)
        rejected = processes == 1 and before.get(_REJECTED, False)
        if not resume and processes == 1 and not rejected:
            raise ValueError(f"`out` (={str(out)!r}) holds a run already; `resume` it, or choose another folder")
        changed = [key for key in now if not _agree(before.get(key), now[key])]
        if rejected and {*changed} - {"metrics", "methods", "batch_size"}:  # its predictions are others
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
    if resume and rank == 0:
        for part in parts.glob("*/*.json"):
            found = _read_part(part)
            if found is None or found[1]:  # what has failed may succeed now
                part.unlink(missing_ok=True)


def _settings_before(file: Path) -> dict[str, Any]:
    try:
        before = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read, so that the run cannot be resumed ({error})") from error
    return before if isinstance(before, dict) else {}


def _reject(out: Path) -> None:
    """Leave the folder of a run that has measured nothing but its predictions to one with other settings."""
    _, processes = share()
    if processes == 1 and all(part.parent.name.startswith(Accuracy.name) for part in (out / PARTS).glob("*/*.json")):
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
    label = f"{metric.name}-{name_of(method)}" if metric.needs_method else metric.name
    known = json.dumps([label, settings_of(metric), repr(units)], default=_plain)
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", label)[:60]
    folder = out / PARTS / f"{readable}-{hashlib.sha256(known.encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return _Job(metric, method, units, chunks(len(units), size), folder)


def _worked(job: _Job, model: nn.Module, dataset: Any, progress: Progress | None) -> Result:
    """Do what is missing of a job, the own share first, and collect all of it."""
    rank, processes = share()
    own = range(rank, len(job.parts), processes)
    others = [index for index in reversed(range(len(job.parts))) if index % processes != rank]
    found: dict[int, tuple[list[Row], list[Failure]]] = {}
    for index in (*own, *others):
        part = _read_part(job.file(index))
        if part is None:
            part = measure_chunk(job.metric, model, dataset, job.units, job.parts[index], job.method)
            _check(found, part, len(job.units))
            _write_part(job.file(index), *part)
        found[index] = part
        if progress is not None:
            progress(job.name, sum(len(job.parts[done]) for done in found), len(job.units))
    rows = [row for index in sorted(found) for row in found[index][0]]
    failures = [failure for index in sorted(found) for failure in found[index][1]]
    check_hopeful(rows, failures, len(job.units))
    method = name_of(job.method) if job.metric.needs_method else None
    return Result(job.metric.name, method, tuple(rows), settings_of(job.metric), tuple(failures))


def _check(
    found: dict[int, tuple[list[Row], list[Failure]]], part: tuple[list[Row], list[Failure]], total: int
) -> None:
    every = [*found.values(), part]
    check_hopeful([row for rows, _ in every for row in rows], [each for _, failed in every for each in failed], total)


def _read_part(file: Path) -> tuple[list[Row], list[Failure]] | None:
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
