"""Readers: data sets on disk as indexable collections of `Record`s.

`open_reader(path)` chooses by the file; `READERS[name](path, ...)` by name.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from florence_vl.data.readers import files
from florence_vl.data.readers.base import READERS, Caption, Filter, Reader
from florence_vl.data.readers.folder import FolderReader
from florence_vl.data.readers.images import ImageStore
from florence_vl.data.readers.json_files import IndexedJson, LlavaReader, MessagesReader
from florence_vl.data.readers.parquet import ParquetReader
from florence_vl.data.readers.webdataset import WebDatasetReader
from florence_vl.registry import did_you_mean


def guess_reader(path: str | Path) -> str:
    """Name of the reader for a path, from its ending, a folder's content, or the first record's keys.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: No reader is known for it.
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
    """The reader of a folder that img2dataset wrote: each shard's table lies beside its tar or its folder.

    Raises:
        ValueError: The folder holds shards and tables that do not belong together.
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
            f"{folder} holds .tar shards and .parquet tables that do not belong together, such as "
            f"{min(tables - shards)}.parquet: name the files of one kind, e.g. {folder}/*.tar"
        )
    return "webdataset"


def open_reader(path: str | Path, reader: str | None = None, **options: Any) -> Reader:
    """A reader for a path.

    Args:
        path: File, folder, glob or fsspec URL.
        reader: Name in `READERS`; None chooses by the path.
        options: Arguments of that reader, e.g. `image_root`.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: Unknown reader or option (near names are listed), or the file does not have the layout.
    """
    kind = READERS[reader or guess_reader(path)]
    known = [name for name in inspect.signature(kind).parameters if name != "path"]
    for option in options:
        if option not in known:
            name = reader or guess_reader(path)
            raise ValueError(f"reader {name!r} has no option {option!r}. {did_you_mean(option, known)}")
    return kind(path, **options)


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
