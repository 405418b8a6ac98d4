"""Where the pictures of `bcoskit explain` go: each image has one of its own, and none takes an image's place."""

import os
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from bcoskit.data import ImageError, find_images


def count_images(images: Sequence[str], out: Path, processes: int = 1) -> int:
    """The number of images that `with_pictures` finds.

    Args:
        images: As of `with_pictures`.
        out: Folder of the pictures.
        processes: How many processes write pictures meanwhile.

    Returns:
        The number.

    Raises:
        ImageError: If there are none.
        ValueError: If a picture would overwrite one of them, or one process would take another's for an image.
    """
    count, folders = 0, set[Path]()
    for image, _ in with_pictures(images, out):
        count += 1
        folders.add(image.parent)
    if count == 0:
        raise ImageError(f"{', '.join(images)}: no images but those in `out` (={str(out)!r})")
    folders = {folder.resolve() for folder in folders}
    if any(folder.is_relative_to(out.resolve()) for folder in folders):
        for image, picture in with_pictures(images, out):
            # Only folders are remembered, so that a million images fill no memory; what lies there may be an image.
            if picture.parent.resolve() not in folders:
                continue
            among = f"`out` (={str(out)!r}) lies among the images"
            if picture.exists():
                raise ValueError(f"{among}: the picture of {image} would overwrite {picture}")
            if processes > 1:
                raise ValueError(f"{among}: of {processes} processes one would take the pictures of others for images")
    return count


def with_pictures(images: Sequence[str], out: Path) -> Iterator[tuple[Path, Path]]:
    """Image files as they are found, each with the file of its picture, of which no two are the same.

    The pictures of single files lie in `out`; those of a folder or pattern keep its structure, in a folder of its
    name if there is anything else. What lies in `out` is left out, if that is in a folder of images.

    Args:
        images: Files, folders and patterns, as of `find_images`.
        out: Folder of the pictures.

    Yields:
        Image and picture.

    Raises:
        ImageError: If a file does not exist, or a folder or pattern holds no image.
    """
    taken: dict[str, int] = {}
    for given in images:
        path = Path(given)
        root = _root(path)
        if root is None:
            yield path, out / _unused(taken, (path.stem, path.name), ".png")
        else:
            folder = out if len(images) == 1 else out / _unused(taken, (root.resolve().name or "root",))
            yield from _below(root, _found(root, given, out), folder)


def _root(given: Path) -> Path | None:
    """The folder below which a folder or a pattern finds its images; None of a single file."""
    if given.is_dir():
        return given
    if os.path.lexists(given):
        return None
    return Path(*takewhile(lambda part: not set(part) & set("*?["), given.parts))


def _found(root: Path, given: str, out: Path) -> Iterator[Path]:
    """The images of a folder or a pattern, without the pictures of an earlier run."""
    files = find_images([given])
    if root.resolve() not in out.resolve().parents:
        return files
    pictures = root / out.resolve().relative_to(root.resolve())
    return (file for file in files if not file.is_relative_to(pictures))


def _below(root: Path, files: Iterator[Path], folder: Path) -> Iterator[tuple[Path, Path]]:
    taken: dict[Path, dict[str, int]] = {}
    for path in files:
        # Folders come depth first: once an image lies elsewhere, a folder that does not hold it is done with.
        taken = {above: names for above, names in taken.items() if path.is_relative_to(above)}
        name = _unused(taken.setdefault(path.parent, {}), (path.stem, path.name), ".png")
        yield path, folder / path.parent.relative_to(root) / name


def _unused(taken: dict[str, int], wishes: Sequence[str], suffix: str = "") -> str:
    """The first wish that is not taken yet, or the last one with a number, with the suffix; it is taken then.

    Upper and lower case count as one, since some file systems do not tell them apart.
    """

    def take(name: str) -> bool:
        new = name.casefold() not in taken
        taken.setdefault(name.casefold(), 1)
        return new

    for wish in wishes:
        if take(wish + suffix):
            return wish + suffix
    last = (wishes[-1] + suffix).casefold()
    while True:
        taken[last] += 1
        name = f"{wishes[-1]}-{taken[last]}{suffix}"
        if take(name):
            return name
