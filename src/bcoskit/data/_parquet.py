"""Labelled images in parquet shards."""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcoskit.data._files import expand
from bcoskit.data._images import ImageError
from bcoskit.data._labelled import ImageDataset, Transform, index_labels

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
SPLIT_NAMES = {name for names in SPLITS.values() for name in names}

_IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "class")
_NUMBERED = re.compile(r"-\d+-of-(\d+)\.(parquet|tar)$")


class ParquetImages(ImageDataset):
    """Labelled images in parquet shards, in the layout of Hugging Face datasets; memory holds them encoded.

    The image column holds encoded images, as binary values or as structs with a binary field `bytes`. The label
    column holds integers, or strings that become the classes in sorted order, or lists of these, where images may be
    of several classes. The names of integer classes are read from the `huggingface` metadata of the schema; without
    it they are "0", "1" and so on.

    Args:
        paths: A shard, folder or pattern, or several, read in this order. The shards that a folder or pattern
            stands for must be the complete set of one split, in one folder.
        transform: Applied to the upright RGB image; without it the items hold the image itself.
        image_column: Name of the image column; by default the one found by its type and name.
        label_column: Name of the label column; by default the one found by its type and name.

    Raises:
        ImageError: If there is no such file, shards are missing, unreadable or disagree, the columns cannot
            be told, or images or labels are missing or out of range.
        ModuleNotFoundError: If pyarrow is not installed.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        transform: Transform | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        given = [paths] if isinstance(paths, str | os.PathLike) else paths
        files = [file for path in given for file in _shard_files(path)]
        shards = [_read_shard(file, image_column, label_column) for file in files]
        if not shards:
            raise ImageError("`paths` is empty: give at least one parquet file")
        images, labels, names = zip(*shards, strict=True)
        if len(set(names)) > 1:
            raise ImageError("the parquet files disagree on the class names: read them one by one")
        values = [label for shard in labels for label in shard]
        if values and all(value == -1 for value in values):
            raise UnlabelledError(f"{files[0]}: has no labels, all of them are -1")
        indices, classes = index_labels(values, names[0])
        super().__init__(_BinaryColumn(files, images), indices, classes, transform)


class _BinaryColumn:
    """Values of the columns of several shards behind one another, as bytes."""

    def __init__(self, shards: Sequence[Path], columns: Sequence["pa.ChunkedArray"]) -> None:
        import pyarrow as pa

        chunks = [chunk for column in columns for chunk in column.chunks]
        self._values = pa.chunked_array(chunks, type=pa.large_binary())
        self._shards, self._begins = shards, list(accumulate(map(len, columns), initial=0))

    def __len__(self) -> int:
        return len(self._values)

    def place(self, index: int) -> str:
        """The shard, and the row in it."""
        shard = bisect_right(self._begins, index % len(self)) - 1
        return f"{self._shards[shard]}: row {index % len(self) - self._begins[shard]}"

    def __getitem__(self, index: int) -> bytes:
        return self._values[index].as_py()


def _split_of(shard: Path) -> str:
    prefix = re.split(r"[-_.]", shard.name)[0]
    return prefix if prefix in SPLIT_NAMES else shard.parent.name


class UnlabelledError(ImageError):
    """A split without labels, for which others write -1."""


def split_shards(root: Path, split: str, suffix: str = ".parquet") -> list[Path]:
    """The shards of one of `SPLITS` in a folder or in a folder in it, or `root` if it is one."""
    return next(splits_of(root, split, suffix), [])


def splits_of(root: Path, split: str, suffix: str = ".parquet") -> Iterator[list[Path]]:
    """The same of each folder or name by which one of `SPLITS` goes."""
    inside = [*root.glob(f"*{suffix}"), *root.glob(f"*/*{suffix}")]
    found = [root] if root.suffix == suffix else sorted(inside)
    visible = [shard for shard in found if not any(part[0] == "." for part in shard.relative_to(root).parts)]
    for name in SPLITS[split]:
        shards = [shard for shard in visible if _split_of(shard) == name]
        if shards:
            yield shards if shards == [root] else _complete(shards, root)


def _shard_files(path: str | os.PathLike[str]) -> list[Path]:
    shards = list(expand(path, {".parquet"}))
    return shards if shards == [Path(path)] else _complete(shards, path)


def _complete(shards: list[Path], given: str | os.PathLike[str]) -> list[Path]:
    """Refuses shards of several folders or splits and an incomplete set, all of which would read well."""
    if len({shard.parent for shard in shards}) > 1:
        raise ImageError(f"{given}: its shards lie in several folders: choose one")
    splits = {_split_of(shard) for shard in shards}
    if len(splits) > 1 and splits & SPLIT_NAMES:
        raise ImageError(f"{given}: its shards belong to several splits {sorted(splits)}: choose one")
    for shard in shards:
        numbered = _NUMBERED.search(shard.name)
        if numbered is not None and int(numbered[1]) != len(shards):
            raise ImageError(f"{given}: holds {len(shards)} of the {int(numbered[1])} shards of {shard.name}")
    return shards


def _read_shard(
    path: Path, image_column: str | None, label_column: str | None
) -> tuple["pa.ChunkedArray", list[Any], tuple[str, ...] | None]:
    """The encoded images, labels and class names (None if not named) of one shard."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('parquet files need pyarrow: pip install "bcoskit[data]"') from error
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            image_name = _image_column(schema, path) if image_column is None else image_column
            label_name = _label_column(schema, path) if label_column is None else label_column
            for name in (image_name, label_name):
                if name not in schema.names:
                    raise ImageError(f"{path}: has no column {name!r} among its columns {schema.names}")
            table = file.read(columns=[image_name, label_name])
    except (OSError, pa.ArrowException) as error:
        raise ImageError(f"{path}: no readable parquet file ({' '.join(str(error).split())})") from error
    images, labels = table[image_name], table[label_name]
    if not _holds_images(images.type):
        raise ImageError(f"{path}: column {image_name!r} holds {images.type}, not encoded images")
    if not _holds_labels(labels.type):
        raise ImageError(
            f"{path}: column {label_name!r} holds {labels.type}, neither integers nor strings, nor lists of them"
        )
    if pa.types.is_struct(images.type):
        images = table.flatten()[f"{image_name}.bytes"]
    for name, column in ((image_name, images), (label_name, labels)):
        if column.null_count:
            raise ImageError(f"{path}: column {name!r} lacks {column.null_count} of {len(column)} values")
    return images.cast(pa.large_binary()), labels.to_pylist(), _class_names(schema, label_name, path)


def _image_column(schema: "pa.Schema", path: Path) -> str:
    fitting = [field.name for field in schema if _holds_images(field.type)]
    known = fitting if len(fitting) == 1 else [name for name in _IMAGE_COLUMNS if name in fitting]
    if len(known) != 1:
        raise ImageError(f"{path}: give `image_column`, it cannot be told among the columns {schema.names}")
    return known[0]


def _label_column(schema: "pa.Schema", path: Path) -> str:
    # By name only: a sole column of integers or strings may well be an identifier or a caption.
    known = [name for name in LABEL_COLUMNS if name in schema.names]
    if len(known) != 1:
        raise ImageError(
            f"{path}: the labels cannot be told among the columns {schema.names}: name theirs 'label', or give "
            "`label_column` in Python"
        )
    return known[0]


def _holds_images(column_type: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(column_type):
        index = column_type.get_field_index("bytes")
        return index >= 0 and _holds_images(column_type.field(index).type)
    return pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type)


def _holds_labels(column_type: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(column_type):
        return _holds_labels(column_type.value_type)
    if pa.types.is_list(column_type) or pa.types.is_large_list(column_type):
        return _holds_labels(column_type.value_type) and not pa.types.is_list(column_type.value_type)
    return any(fits(column_type) for fits in (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string))


def _class_names(schema: "pa.Schema", column: str, path: Path) -> tuple[str, ...] | None:
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    try:
        feature = json.loads(metadata)["info"]["features"][column]
        names = feature.get("feature", feature).get("names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(f"{path}: its `huggingface` metadata does not describe column {column!r}") from error
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ImageError(f"{path}: its `huggingface` metadata names the classes {names!r:.200}, no list of names")
    return tuple(names)
