"""Files named by paths, folders and patterns."""

import fnmatch
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from bcoskit.data._images import FORMATS, ImageError

IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)


def find_images(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """Expands files, folders and glob patterns to image files, lazily.

    - A file is yielded whatever its name.
    - A folder yields the images in it and below it, in the order of their names. Hidden files and folders are
      left out; symbolic links are followed, each folder being visited once. A folder below it that cannot be
      listed is yielded itself.
    - A pattern (with `*`, `?` or `[`, `**` for any depth) yields the images that it matches. Hidden files and
      folders are left out, and `**` does not follow symbolic links.

    Images are recognised by their suffix, upper or lower case.

    Args:
        paths: Files, folders and patterns, each expanded when its turn comes.

    Yields:
        Paths beginning with what was given.

    Raises:
        ImageError: If a path does not exist, or if a folder or pattern holds no image.
        TypeError: If `paths` is a single string.
    """
    if isinstance(paths, str):
        raise TypeError(f"`paths` must be several paths, got the string {paths!r}: put it in a list")
    return (file for path in paths for file in expand(path, IMAGE_SUFFIXES))


def expand(path: str | os.PathLike[str], suffixes: Collection[str]) -> Iterator[Path]:
    """Expands one file, folder or pattern to files with one of `suffixes`, as `find_images` does.

    Raises:
        ImageError: If there is no such file.
    """
    if not os.fspath(path):
        raise ImageError("a path is empty")
    given = Path(path)
    if given.is_dir():
        files = _walk(given)
    elif os.path.lexists(given):
        yield given
        return
    elif _is_pattern(str(given)):
        files = _match(given)
    else:
        raise ImageError(f"{given}: no such file or folder")
    empty = True
    for file in files:
        if file.suffix.lower() in suffixes or file.is_dir():
            empty = False
            yield file
    if empty:
        raise ImageError(f"{given}: no file found with a suffix of {', '.join(sorted(suffixes))}")


def _walk(folder: Path) -> Iterator[Path]:
    visited = {_identity(folder)}
    pending = _entries(folder)[::-1]
    while pending:
        entry = pending.pop()
        if not _is_folder(entry):
            yield Path(entry.path)
        elif (identity := _identity(entry)) not in visited:
            visited.add(identity)
            try:
                pending.extend(reversed(_entries(entry)))
            except ImageError:
                yield Path(entry.path)  # whoever reads it is told why; the other folders are none the worse


def _match(pattern: Path) -> Iterator[Path]:
    if pattern.name == "**":
        pattern = pattern / "*"
    for folder in _match_folders(pattern.parent):
        for entry in _entries(folder):
            if fnmatch.fnmatch(entry.name, pattern.name) and not _is_folder(entry):
                yield Path(entry.path)


def _match_folders(pattern: Path) -> list[Path]:
    parts = pattern.parts
    fixed = next((index for index, part in enumerate(parts) if _is_pattern(part)), len(parts))
    root = Path(*parts[:fixed])
    found = root.glob(str(Path(*parts[fixed:]))) if fixed < len(parts) else [root]
    return sorted(
        {
            folder
            for folder in found
            if folder.is_dir() and not any(part.startswith(".") for part in folder.relative_to(root).parts)
        }
    )


def _is_pattern(text: str) -> bool:
    return any(character in text for character in "*?[")


def _entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise ImageError(f"{os.fspath(folder)}: {error.strerror}") from error
    return sorted(visible, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # `entry.is_dir()` alone raises at a link that points to itself.
    try:
        return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and Path(entry.path).is_dir())
    except OSError:  # of what may not be looked at
        return False


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino
