"""Weights from the internet, in torch's cache."""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_CHUNK = 1 << 20
_SECONDS = 20  # without an answer, or without a byte


def cached(url: str, sha256: str | None = None) -> Path:
    """The file of a URL in torch's cache (`torch.hub.get_dir()/checkpoints`), downloaded if it is not there.

    A download that was broken off goes on where it stopped. The file appears complete or not at all.

    Args:
        url: Where the file is.
        sha256: The first hexadecimal digits of its SHA-256.

    Returns:
        The file.

    Raises:
        ConnectionError: If it cannot be downloaded.
        ValueError: If the downloaded file has another SHA-256.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(url)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with FileLock(f"{partial}.lock"):
        if path.is_file():  # another process has downloaded it meanwhile
            return path
        try:
            _download(url, partial)
        except (OSError, urllib.error.URLError) as error:
            reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
            raise ConnectionError(
                f"cannot download {url} ({reason}); `weights` may also be a file, or this may be put at {path}"
            ) from error
        found = _sha256(partial)
        if sha256 is not None and not found.startswith(sha256):
            partial.unlink()
            raise ValueError(f"{url} was downloaded, but its SHA-256 is {found[:12]}…, not {sha256}…: it is discarded")
        partial.replace(path)
    Path(f"{partial}.lock").unlink(missing_ok=True)
    return path


def _file_name(url: str) -> str:
    """The last part of the URL that says something."""
    parts = [part for part in urlsplit(url).path.split("/") if part not in ("", "download")]
    if not parts:
        raise ValueError(f"{url!r} names no file")
    return parts[-1]


def _download(url: str, partial: Path) -> None:
    """Append to a file what of the URL it does not have yet."""
    there = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "bcoskit", **_range(there)})
    try:
        response = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416 or not there:
            raise
        return  # nothing beyond what is there: it is complete, and its hash is checked next
    with response:
        there = there if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else there + int(length)
        with partial.open("ab" if there else "wb") as file, _progress() as progress:
            task = progress.add_task(partial.name.removesuffix(".partial"), total=total, completed=there)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                progress.advance(task, len(chunk))
            size = file.tell()
    if total is not None and size < total:
        raise OSError(f"the connection broke off after {size:,} of {total:,} bytes; call again to go on")


def _range(start: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-"} if start else {}


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
