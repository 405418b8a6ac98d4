"""Weights from the internet, in torch's cache."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_CHUNK = 1 << 20
_SECONDS = 20  # without an answer, or without a byte


def cached(url: str, sha256: str | None = None) -> Path:
    """The file of a URL in torch's cache (`torch.hub.get_dir()/checkpoints`), downloaded if it is not there.

    A download that was broken off goes on where it stopped, if the server still has the same file. The file appears
    complete or not at all. Files without a published SHA-256 have a name that only their URL has.

    Args:
        url: Where the file is.
        sha256: The first hexadecimal digits of its SHA-256.

    Returns:
        The file.

    Raises:
        ConnectionError: If it cannot be downloaded.
        ValueError: If the file, downloaded now or before, has another SHA-256.
    """
    name = (
        _file_name(url) if sha256 is not None else f"{hashlib.sha256(url.encode()).hexdigest()[:10]}-{_file_name(url)}"
    )
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if not path.is_file():  # another process may have downloaded it meanwhile
                _fetch(url, path, sha256)
    elif sha256 is not None and not _sha256(path).startswith(sha256):
        raise ValueError(f"{path}: its SHA-256 does not begin with {sha256}; delete the file to download it again")
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """No other process downloads the same file inside."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=2)
    except Timeout:
        with Console(stderr=True).status(f"{path.name}: another process downloads it"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, path: Path, sha256: str | None) -> None:
    partial, version = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.version")
    try:
        _download(url, partial, version)
    except (OSError, HTTPException, ValueError) as error:
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", None) or error
        raise ConnectionError(
            f"cannot download {url} ({type(reason).__name__ if not str(reason) else reason}); "
            f"`weights` may also be a file, or this may be put at {path}"
        ) from error
    finally:
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()
        if not partial.exists():
            version.unlink(missing_ok=True)
    found = _sha256(partial)
    version.unlink(missing_ok=True)
    if sha256 is not None and not found.startswith(sha256):
        partial.unlink()
        raise ValueError(f"{url} was downloaded, but its SHA-256 is {found[:12]}…, not {sha256}…: it is discarded")
    partial.replace(path)


def _file_name(url: str) -> str:
    """The last part of the URL that says something."""
    parts = [part for part in urlsplit(url).path.split("/") if part not in ("", ".", "..", "download")]
    if not parts:
        raise ValueError(f"{url!r} names no file")
    return parts[-1]


def _download(url: str, partial: Path, version: Path) -> None:
    """Append to a file what of the URL it does not have yet, or begin anew if the server has another version."""
    there = partial.stat().st_size if partial.exists() and version.exists() else 0
    resumption = {"Range": f"bytes={there}-", "If-Range": version.read_text()} if there else {}
    try:
        response = urlopen(Request(url, headers={"User-Agent": "bcoskit", **resumption}), timeout=_SECONDS)
    except HTTPError as error:
        error.close()
        if error.code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not there:
            raise
        if error.headers.get("Content-Range") != f"bytes */{there}":  # else all of it is there
            version.unlink()
            _download(url, partial, version)
        return
    with response:
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            there = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            raise OSError(f"the server sent another part of the file than that from byte {there:,} on")
        if not there:  # before its version is replaced: it might be another one's beginning
            partial.unlink(missing_ok=True)
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or "W/"
        if validator.startswith("W/"):  # it does not tell versions apart
            version.unlink(missing_ok=True)
        else:
            version.write_text(validator)
        _receive(response, partial, there)


def _receive(response: Any, partial: Path, there: int) -> None:
    """Write what comes behind what is there; raises `OSError` if it is less than was announced."""
    length = response.headers.get("Content-Length", "")
    total = there + int(length) if length.isdecimal() else None
    with partial.open("ab" if there else "wb") as file, _progress() as progress:
        task = progress.add_task(partial.name.removesuffix(".partial"), total=total, completed=there)
        while chunk := response.read1(_CHUNK):
            file.write(chunk)
            progress.advance(task, len(chunk))
        size = file.tell()
    if size == 0 or (total is not None and size < total):
        of = "" if total is None else f" of {total:,}"
        raise OSError(f"the connection broke off after {size:,}{of} bytes; call again to go on")


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
