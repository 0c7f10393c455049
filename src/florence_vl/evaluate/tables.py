"""Local benchmark files: parquet in the schema of the public data sets, images read lazily."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TablePicture:
    """An image in a cell of a parquet file.

    Attributes:
        path: The parquet file.
        group: Row group.
        row: Row within the group.
        column: Name of the column.
        item: Position in a cell with several images.
        key: Identity of the picture (see `Picture`).
    """

    path: str
    group: int
    row: int
    column: str
    item: int = 0
    key: str = ""

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            ValueError: The cell is empty, or refers to a missing file.
        """
        images = _cell_images(_column(self.path, self.group, self.column)[self.row].as_py())
        return _image_bytes(images[self.item], self)

    def __str__(self) -> str:
        return f"{self.path}, row {self.row} of group {self.group}, column {self.column!r}"


class Table:
    """Rows of one or more parquet files, without their images, which are returned as `TablePicture`.

    Args:
        paths: The files, in order.

    Raises:
        ValueError: A file is not readable as parquet, or the files differ in columns.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.paths = [str(path) for path in paths]
        schemas = []
        for path in paths:
            try:
                schemas.append(pq.read_schema(path))
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{path} is not a parquet file: {error}") from None
        self.schema = schemas[0]
        self.columns = list(schemas[0].names)
        for path, schema in zip(paths, schemas, strict=True):
            if set(schema.names) != set(self.columns):
                odd = sorted(set(schema.names) ^ set(self.columns))
                raise ValueError(f"{path} and {paths[0]} differ in their columns: {', '.join(odd)}")
        self.image_columns = [f.name for f in schemas[0] if _holds_images(f.type)]

    def __len__(self) -> int:
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(path).num_rows for path in self.paths)

    def rows(self) -> Iterator[tuple[dict[str, Any], str, int, int]]:
        """Each row's values without image columns, and its location: file, row group, row in the group."""
        import pyarrow.parquet as pq

        plain = [name for name in self.columns if name not in self.image_columns]
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    # One column is read even if there are only image columns, to get the number of rows.
                    rows = file.read_row_group(group, columns=plain).to_pylist() if plain else [{}]
                    for number, row in enumerate(rows):
                        yield row, path, group, number

    def pictures(self, path: str, group: int, row: int, column: str, key: str | None = None) -> list[TablePicture]:
        """The pictures of one cell; `key` identifies them if the data set says which rows share one."""
        if key is not None:
            keys = [f"{key}#{item}" for item in range(self._count(path, group, row, column))]
        else:
            keys = []
            for item, image in enumerate(_cell_images(_column(path, group, column)[row].as_py())):
                data = _image_bytes(image, TablePicture(path, group, row, column, item))
                keys.append(hashlib.sha256(data).hexdigest()[:20])
        return [TablePicture(path, group, row, column, item, found) for item, found in enumerate(keys)]

    def _count(self, path: str, group: int, row: int, column: str) -> int:
        """Number of images in a cell, without reading their bytes if the file's layout allows it."""
        kind = self.schema.field(column).type
        cell = _column(path, group, f"{column}.path" if _is_struct(kind) else column)[row]
        if not cell.is_valid:
            return 0
        return sum(item.is_valid for item in cell) if _is_list(kind) else 1


def find_files(folder: Path, benchmark: str, split: str, config: str | None = None, main: bool = True) -> list[Path]:
    """A benchmark's parquet files under a data folder.

    Searched, in this order: `<benchmark>.parquet` (not for second tables), `<benchmark>.<config>.parquet`, files in
    `<benchmark>/<config>/` and, if that does not exist, in `<benchmark>/`: those named after the split
    (`<split>-00000-of-00001.parquet`), or all if none is named after any split.

    Args:
        folder: The data folder.
        benchmark: Name of the benchmark.
        split: The split.
        config: The configuration.
        main: Whether to find the benchmark's own table, not a second one.

    Raises:
        FileNotFoundError: No file was found; the message names the places.
    """
    singles = [folder / f"{benchmark}.parquet"] if main else []
    singles += [folder / f"{benchmark}.{config}.parquet"] if config else []
    for single in singles:
        if single.is_file():
            return [single]
    place = folder / benchmark
    if config and (place / config).is_dir():
        place = place / config
    everything = sorted(place.rglob("*.parquet")) if main or place.name == config else []
    named = [path for path in everything if _split_of(path, split)]
    _check_shards(named or everything)
    if named:
        return named
    if everything and not any(_split_of(path, other) for path in everything for other in _SPLITS):
        return everything
    looked = ", ".join(map(str, [*singles, place / f"**/{split}*.parquet"]))
    raise FileNotFoundError(f"no parquet file of {benchmark!r}: looked for {looked}")


def _check_shards(paths: Sequence[Path]) -> None:
    """Raise an error for an incomplete set of files named `...-00000-of-00002.parquet`."""
    groups: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)", path.stem):
            groups.setdefault((str(path.with_name(match[1])), int(match[3])), set()).add(int(match[2]))
    for (prefix, total), there in groups.items():
        if absent := [number for number in range(total) if number not in there]:
            names = ", ".join(f"{prefix}-{number:05}-of-{total:05}.parquet" for number in absent[:3])
            raise FileNotFoundError(f"{len(there)} of {total} files are there; missing: {names}")


_SPLITS = ("train", "test", "validation", "val", "dev", "testdev", "testmini", "image", "lite")


def _split_of(path: Path, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![A-Za-z])", path.name) is not None


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind)


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if _is_list(kind):
        return _holds_images(kind.value_type)
    if _is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


@lru_cache(maxsize=8)
def _column(path: str, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)


def _cell_images(cell: Any) -> list[Any]:
    if cell is None:
        return []
    return [image for image in cell if image is not None] if isinstance(cell, list) else [cell]


def _image_bytes(image: Any, where: TablePicture) -> bytes:
    if isinstance(image, bytes):
        return image
    if image.get("bytes"):
        return image["bytes"]
    if image.get("path"):
        folder = Path(where.path).parent
        file = folder / image["path"]
        if not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{where} refers to {image['path']!r}, which is outside of {folder}")
        if file.is_file():
            return file.read_bytes()
        raise ValueError(f"missing image: {where} refers to {file}, which isn't there")
    raise ValueError(f"missing image: {where} is empty")
