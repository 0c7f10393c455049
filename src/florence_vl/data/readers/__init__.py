"""Readers: data sets on disk as indexable collections of `Record`s.

`open_reader(path)` detects the format; `READERS[name](path, ...)` selects it by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from florence_vl.data.filters import Filter
from florence_vl.data.readers import files
from florence_vl.data.readers.base import READERS, Caption, Reader
from florence_vl.data.readers.folder import FolderReader
from florence_vl.data.readers.images import ImageStore
from florence_vl.data.readers.json_files import IndexedJson, LlavaReader, MessagesReader
from florence_vl.data.readers.parquet import ParquetReader
from florence_vl.data.readers.webdataset import WebDatasetReader
from florence_vl.registry import did_you_mean


def guess_reader(path: str | Path) -> str:
    """Name of the reader for a path, from its ending, a folder's content, or the keys of the first record.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: No known reader fits.
    """
    text = files.local(path)
    lower = text.lower()
    if lower.endswith((".json", ".jsonl")):
        return "messages" if "messages" in IndexedJson(text)[0] else "llava"
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(".tar"):
        return "webdataset"
    if files.is_folder(text):
        layout = _img2dataset(text)
        if layout:
            return layout
        for suffix, name in ((".parquet", "parquet"), (".tar", "webdataset")):
            try:
                files.find_files(text, (suffix,))
            except FileNotFoundError:
                continue
            return name
        return "folder"
    if not files.exists(text):
        raise FileNotFoundError(f"no such data file or folder: {text}")
    raise ValueError(
        f"cannot tell the format of {text}: name a reader ({', '.join(READERS.names())}), or use .json, .jsonl, "
        ".parquet, .tar or a folder"
    )


def _img2dataset(folder: str) -> str | None:
    """The reader of a folder written by img2dataset, where each shard's table is next to its tar or folder.

    Raises:
        ValueError: The folder contains shards and tables that do not belong together.
    """
    try:
        tables = {name.removesuffix(".parquet") for name in files.find_files(folder, (".parquet",))}
    except FileNotFoundError:
        return None
    try:
        shards = {name.removesuffix(".tar") for name in files.find_files(folder, (".tar",))}
    except FileNotFoundError:
        beside = all(files.exists(f"{table}_stats.json") and files.is_folder(table) for table in tables)
        return "folder" if beside else None
    if not tables <= shards:
        raise ValueError(
            f"{folder} contains .tar shards and .parquet tables that do not belong together, such as "
            f"{min(tables - shards)}.parquet: name the files of one kind, e.g. {folder}/*.tar"
        )
    return "webdataset"


def open_reader(path: str | Path, reader: str | None = None, **options: Any) -> Reader:
    """Open a reader for a path.

    Args:
        path: File, folder, glob or fsspec URL.
        reader: Name in `READERS`; None detects it.
        options: Arguments of that reader, e.g. `image_root`. Filters may be mappings, as in a recipe.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The reader or an option is unknown (similar names are suggested), or the file has another layout.
    """
    kind = READERS[reader or guess_reader(path)]
    known = [name for name in inspect.signature(kind).parameters if name != "path"]
    for option in options:
        if option not in known:
            name = reader or guess_reader(path)
            raise ValueError(f"reader {name!r} has no option {option!r}. {did_you_mean(option, known)}")
    if "filters" in options:
        options["filters"] = [_as_filter(value) for value in options["filters"]]
    if isinstance(prefix := options.get("strip_prefixes"), str):
        options["strip_prefixes"] = [prefix]
    return kind(path, **options)


def _as_filter(value: Any) -> Filter:
    """A filter, perhaps as a recipe writes it."""
    if isinstance(value, Filter):
        return value
    if not isinstance(value, Mapping) or not {"column", "test"} <= set(value) <= {"column", "test", "value"}:
        raise ValueError(f"a filter has the keys column, test and value, found {value!r}")
    return Filter(**value)


__all__ = [
    "READERS",
    "Caption",
    "Filter",
    "FolderReader",
    "ImageStore",
    "IndexedJson",
    "LlavaReader",
    "MessagesReader",
    "ParquetReader",
    "Reader",
    "WebDatasetReader",
    "guess_reader",
    "open_reader",
]
