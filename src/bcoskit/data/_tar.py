"""Labelled images in tar files, as WebDataset writes them."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from bcoskit.data._files import IMAGE_SUFFIXES
from bcoskit.data._images import ImageError
from bcoskit.data._labelled import ImageDataset, Transform, index_labels

_CLASSES = "classes.txt"
_Place = tuple[Path, int, int]  # a file, and where in it an image lies: offset and size


class TarImages(ImageDataset):
    """Labelled images in tar files in the layout of WebDataset, read from where they lie when asked for.

    Files of a tar file that share a name up to its first dot are one sample: an image, and in `NAME.cls` its class
    index, or several of them, separated by spaces. Hidden files are left out. The names of the classes stand in
    `classes.txt` beside the tar files, one a line; without it they are "0", "1" and so on. Opening reads the tar files'
    headers and labels alone.

    Args:
        paths: The tar files, in this order.
        transform: Applied to the upright RGB image; without it the items hold the image itself.

    Raises:
        ImageError: If a file cannot be read, a sample lacks its image or label, or labels are out of range.
        TypeError: If `paths` is a single path.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], transform: Transform | None = None) -> None:
        if isinstance(paths, (str, bytes, os.PathLike)):
            raise TypeError(f"`paths` (={paths!r}) must be a list of tar files")
        files = [Path(path) for path in paths]
        samples = [sample for file in files for sample in _samples(file)]
        if not samples:
            raise ImageError(f"{files[0].parent if files else 'paths'}: the tar files hold no images")
        labels = [label for _, label in samples]
        several = any(len(label) > 1 for label in labels)
        if not several and not all(labels):
            raise ImageError(f"{files[0].parent}: an image has no label, while all others have one each")
        indices, classes = index_labels(labels if several else [label[0] for label in labels], _names(files[0].parent))
        super().__init__(_Places([place for place, _ in samples]), indices, classes, transform)


class _Places:
    """Encoded images, read from tar files."""

    def __init__(self, places: list[_Place]) -> None:
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def place(self, index: int) -> str:
        """The tar file, and the name of the image in it, as far as its header has room for it."""
        path, offset, _ = self._places[index]
        try:
            with path.open("rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                name = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            name = f"byte {offset}"
        return f"{path}: {name}"

    def __getitem__(self, index: int) -> bytes:
        path, offset, size = self._places[index]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise ImageError(f"{path}: {error.strerror}") from error


def _names(folder: Path) -> list[str] | None:
    file = folder / _CLASSES
    if not file.exists():
        return None
    try:
        names = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{file}: cannot be read ({error})") from error
    if len(set(names)) != len(names) or not all(names):
        raise ImageError(f"{file}: must hold the name of one class in each line")
    return names


def _index(word: bytes) -> int:
    if b"_" in word:  # which Python allows between digits
        raise ValueError(f"invalid class index {word!r}")
    return int(word)


def _samples(path: Path) -> Iterator[tuple[_Place, list[int]]]:
    """The images of one tar file in its order, with their labels."""
    image: dict[str, _Place] = {}
    label: dict[str, list[int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name, _, suffix = Path(member.name).name.partition(".")
                if not member.isfile() or not name:
                    continue
                key = str(Path(member.name).with_name(name))
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    if key in image:
                        raise ImageError(f"{path}: sample {key!r} has two images")
                    image[key] = (path, member.offset_data, member.size)
                elif suffix == "cls":
                    if key in label:
                        raise ImageError(f"{path}: sample {key!r} has two labels")
                    content = archive.extractfile(member)
                    assert content is not None
                    label[key] = [_index(word) for word in content.read().split()]
            # At a damaged header, and where a file breaks off, `tarfile` stops as at the zeros of an archive's end.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            end = archive.fileobj.read(tarfile.BLOCKSIZE)
            if any(end):
                raise tarfile.ReadError(f"damaged at byte {archive.offset}")
            if len(end) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"cut off after {len(image)} images, the end of the archive is missing")
    except (OSError, tarfile.TarError) as error:
        raise ImageError(f"{path}: no readable tar file ({error})") from error
    except ValueError as error:
        raise ImageError(f"{path}: a label is no class index ({error})") from error
    if image.keys() != label.keys():
        key = min(image.keys() ^ label.keys())
        raise ImageError(f"{path}: sample {key!r} has no {'image' if key in label else 'label'}")
    return ((place, label[key]) for key, place in image.items())
