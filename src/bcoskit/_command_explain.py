"""`bcoskit explain`: images of any number in constant memory, read, explained and written at the same time."""

import errno
import hashlib
import json as json_lines
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from bcoskit import __version__
from bcoskit._command_pictures import count_images, with_pictures
from bcoskit._command_report import Report, cell, figures, probability
from bcoskit._compile_explain import compile_explain
from bcoskit._devices import device_named
from bcoskit._explain import Explanation, explain
from bcoskit._files import whole_file
from bcoskit._fingerprint import fingerprint
from bcoskit._probabilities import probabilities_of
from bcoskit._processes import share, wait_for_all
from bcoskit._targets import class_index
from bcoskit._text import printable
from bcoskit.data import ImageError, ImageTransform, read_image
from bcoskit.data._images import pixels
from bcoskit.models import Network, create_model
from bcoskit.viz import SheetRow, sheet
from bcoskit.viz._pictures import usual_smooth

_TOP = 3  # classes
_KEY = "bcoskit"  # of what a picture tells of itself

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def explain_images(
    images: list[str],
    *,
    model: str = "resnet20.bcos_cifar10",
    weights: str | None = None,
    target: str | None = None,
    top: int | None = None,
    out: Path = Path("explanations"),
    save: bool = False,
    json: bool = False,
    shares: bool = True,
    resume: bool = False,
    compile: bool = False,
    batch_size: int = 16,
    device: str | None = None,
) -> int:
    """Explain images by a network: a table of classes, and a picture for each image.

    Images are read, explained and written at the same time, a few batches of them being in memory. Under `torchrun`
    each process takes its share of the images.

    Args:
        images: Images, folders of images, and patterns.
        model: Name of a network, or a file that training has written.
        weights: File or URL of the network's weights, for instance one of the authors'; by default those that go with
            its name.
        target: Name or index of a class that is explained in any case, before the largest ones.
        top: How many classes are explained; by default three, or all if there are fewer.
        out: Folder for the pictures, which keep the structure of a folder of images. Below a folder of images, it is
            left out of them.
        save: Also write the tensors of each explanation, as a .safetensors file beside the picture.
        json: Print one JSON object per image instead of the table.
        shares: Evaluate all constants of the network, so that the residual tests the explanation.
        resume: Leave out images whose picture is there already, made by the same weights and options of the same file
            as it is now; their figures are read from the picture.
        compile: Compile the network's explanation, which takes a while and then saves time, for many images; needs
            `--no-shares`.
        batch_size: Images that are explained at once.
        device: Where to compute, such as cpu or cuda; by default cuda where there is one, under
            torchrun the one of this process.

    Returns:
        The exit code: 0, or 1 if some images could not be explained.

    Raises:
        ValueError: If an option is out of its range, a picture would overwrite an image, or no image could be
            explained.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` (={batch_size}) must be at least 1")
    if out.exists() and not out.is_dir():
        raise ValueError(f"`out` (={str(out)!r}) must be a folder")
    if compile and shares:
        raise ValueError("`compile` (=True) needs `--no-shares`: constants are evaluated one image at a time")
    rank, processes = share()
    network = create_model(model, weights=True if weights is None else weights).to(device_named(device))
    if top is None:
        top = min(_TOP, len(network.classes))
    if not 1 <= top <= len(network.classes):
        raise ValueError(f"`top` (={top}) must be between 1 and the number of classes, {len(network.classes)}")
    wanted = None if target is None else class_index(network.classes, target, "target")

    # Of all that decides what a picture shows: layers, weights, transform, classes and options.
    options = {"target": wanted, "top": top, "save": save, "shares": shares}
    known = [__version__, str(network), asdict(network.transform), network.classes, network.loss, options]
    made_by = fingerprint(network, json_lines.dumps(known))
    total = len(range(rank, count_images(images, out, processes), processes))
    report = Report(json, network.classes, total, show_progress=rank == 0)
    explainer = _explainer(network, wanted, top, shares, batch_size if compile else None)
    with report:
        sources = islice(with_pictures(images, out), rank, None, processes)
        read = _ahead(partial(_read, network.transform, made_by, resume, save), sources, 2 * batch_size)
        explained = _explained(read, network, explainer, batch_size)
        for outcome in _ahead(partial(_written, network, save), explained, batch_size):
            if isinstance(outcome, _Failure):
                report.failed(outcome.path, outcome.reason)
            else:
                report.explained(outcome.path, outcome.picture, outcome.rows)
    try:
        return report.exit_code()
    finally:
        wait_for_all()  # one bad image of one process must not cost the others theirs


@dataclass(frozen=True)
class _Item:
    """An image as the network sees it, the file that it comes from, the file of its picture and what tells them apart.

    Later with its explanation, a batch of one, and the probabilities of the explained classes.
    """

    path: Path
    picture: Path
    fingerprint: str
    image: Image.Image
    explanation: Explanation | None = None
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class _Failure:
    """An image that cannot be explained."""

    path: Path
    reason: str


@dataclass(frozen=True)
class _Done:
    """An image that is explained, and the figures of its classes."""

    path: Path
    picture: Path
    rows: list[dict[str, Any]]


def _probabilities(network: Network, explanation: Explanation) -> Tensor:
    """Of the explained classes, (N, K); NaN if the outputs are no classes."""
    assert explanation.target is not None
    if network.loss == "none":
        return torch.full(explanation.target.shape, math.nan)
    return probabilities_of(network, explanation.logits).gather(1, explanation.target)


def _ahead(work: Callable[[_Given], _Made], given: Iterator[_Given], limit: int) -> Iterator[_Made]:
    """`map(work, given)` by threads, in order, at most `limit` ahead of what has been taken."""
    pending = deque[Future[_Made]]()
    # Under torchrun torch has one thread per process.
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        try:
            for item in given:
                pending.append(pool.submit(work, item))
                if len(pending) >= limit:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _read(
    transform: ImageTransform, made_by: str, resume: bool, save: bool, source: tuple[Path, Path]
) -> _Item | _Done | _Failure:
    path, picture = source
    image = None
    try:
        own = _fingerprint(path, made_by)
        rows = _rows_of(picture, own) if resume else None
        if rows is not None and (not save or picture.with_suffix(".safetensors").is_file()):
            return _Done(path, picture, rows)
        image = read_image(path)
        return _Item(path, picture, own, transform.view(image))
    except ImageError as error:
        return _Failure(path, str(error) if image is None else f"{path}: {error}")


def _fingerprint(path: Path, made_by: str) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    # The place tells images of one name in two folders apart, whose sizes and times may be the same.
    known = f"{made_by} {path.absolute()} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(os.fsencode(known)).hexdigest()


def _rows_of(picture: Path, fingerprint: str) -> list[dict[str, Any]] | None:
    """The figures that an earlier run has left in a picture; None if there is none, or one of something else."""
    try:
        with Image.open(picture, formats=["PNG"]) as page:
            told = json_lines.loads(page.info[_KEY])
        return told["classes"] if told["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError, SyntaxError):
        return None


def _explainer(
    network: Network, wanted: int | None, top: int, shares: bool, compiled_size: int | None
) -> Callable[[Tensor], Explanation]:
    """What explains the classes with the largest logits, the one that is wanted before them."""

    def chosen(logits: Tensor) -> Tensor:
        if wanted is not None:
            logits = logits.index_fill(1, torch.tensor([wanted], device=logits.device), math.inf)
        return logits.topk(top, dim=1).indices

    if compiled_size is None:
        return lambda x: explain(network, x, chosen, shares=shares)
    program = compile_explain(network)

    def explained(x: Tensor) -> Explanation:
        # A program has one shape: a batch that is too short is filled up.
        missing = compiled_size - len(x)
        return program(torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x, chosen)[: len(x)]

    return explained


def _explained(
    read: Iterator[_Item | _Done | _Failure],
    network: Network,
    explainer: Callable[[Tensor], Explanation],
    batch_size: int,
) -> Iterator[_Item | _Done | _Failure]:
    """The same in the same order, with explanations, which are made by the batch."""
    device = next(network.parameters()).device
    while outcomes := list(islice(read, batch_size)):
        batch = [pixels(outcome.image) for outcome in outcomes if isinstance(outcome, _Item)]
        if batch:
            explanation = explainer(network.transform.encode_pixels(torch.stack(batch)).to(device)).to("cpu")
            probabilities = _probabilities(network, explanation)
            index = iter(range(len(batch)))
            for place, outcome in enumerate(outcomes):
                if isinstance(outcome, _Item):
                    one = next(index)
                    outcomes[place] = replace(outcome, explanation=explanation[one], probabilities=probabilities[one])
        yield from outcomes


def _written(network: Network, save: bool, outcome: _Item | _Done | _Failure) -> _Done | _Failure:
    """Write the picture of an explained image, and what is to be saved of it; each appears complete or not at all.

    A name that is too long for the file system is a failure of its image; whatever else prevents writing raises.
    """
    if not isinstance(outcome, _Item):
        return outcome
    explanation, probabilities = outcome.explanation, outcome.probabilities
    assert explanation is not None
    assert probabilities is not None
    rows = figures(explanation, probabilities, network.classes)
    page = _page(outcome, explanation, rows, network.transform.encoding == "bcos")
    information = PngInfo()
    information.add_text(_KEY, json_lines.dumps({"fingerprint": outcome.fingerprint, "classes": rows}))
    outcome.picture.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(outcome.picture) as unfinished:
            page.save(unfinished, format="PNG", pnginfo=information)
            if save:  # before the picture has its place: where there is one, all is there
                explanation.save(_free(outcome.picture.with_suffix(".safetensors")))
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _Failure(outcome.path, f"{outcome.path}: the name of its picture is too long")
    return _Done(outcome.path, outcome.picture, rows)


def _free(path: Path) -> Path:
    """A file that may be written.

    Raises:
        ValueError: If something else than an explanation is there.
    """
    if path.exists():
        try:
            Explanation.load(path)
        except ValueError as error:
            raise ValueError(f"{path} would be overwritten, and is no explanation: choose another `out`") from error
    return path


def _page(item: _Item, explanation: Explanation, rows: list[dict[str, Any]], colored: bool) -> Image.Image:
    shown = [
        SheetRow(
            f"{cell(row['class'])}\np = {probability(row['probability'])}, logit {row['logit']:.2f}",
            explanation.contributions[0, rank],
            explanation.weights[0, rank] if colored else None,
        )
        for rank, row in enumerate(rows)
    ]
    return sheet(item.image, shown, title=printable(item.path.name), smooth=usual_smooth(item.image.width))
