"""Reader of a folder of images with captions, in text files of the same name or in one metadata file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from florence_vl.data.readers import files
from florence_vl.data.readers.base import READERS, Caption, Reader, as_prompts
from florence_vl.data.readers.conversation import SYSTEM_KEYS, from_row, refuse_meaning, warn_unused
from florence_vl.data.readers.images import ImageStore
from florence_vl.data.readers.webdataset import IMAGE_EXTENSIONS, parse_json
from florence_vl.data.records import BadRecord, ImageRef, ImageSource, Record, byte_order_mark, decode_text

_CAPTION_COLUMNS = ("text", "caption")
_METADATA = ("metadata.jsonl", "metadata.csv")


@READERS.register("folder")
class FolderReader(Reader):
    """Images and their captions, for data sets whose list fits into memory (up to about a million).

    With `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder format) every line has `file_name` and a caption
    in `text` or `caption` (JSON lines also `conversations` or `messages`). Otherwise every image has its caption in a
    text file of the same name.

    Args:
        path: The folder; local or fsspec URL.
        caption: Column of captions in the metadata file.
        prompts: User texts for captions, see `Caption`.
        strip_prefixes: Prefixes to remove from captions.
        name: Name of the source.
        allow_outside: Also open images outside the folder if the metadata file names them.

    Raises:
        FileNotFoundError: The folder does not exist, or contains no images.
        ValueError: The metadata file is malformed.
    """

    def __init__(
        self,
        path: str | Path,
        caption: str | None = None,
        prompts: str | Sequence[str] | None = None,
        strip_prefixes: Sequence[str] = (),
        name: str | None = None,
        allow_outside: bool = False,
    ) -> None:
        super().__init__(path, name)
        self.root = files.local(path)
        if not files.is_folder(self.root):
            raise FileNotFoundError(f"no such folder: {self.root}")
        if all(files.exists(files.join(self.root, name)) for name in ("dataset_info.json", "state.json")):
            raise ValueError(
                f"{self.root} was written by datasets' save_to_disk, whose Arrow files are not read here: write it as "
                f"parquet (datasets.load_from_disk({self.root!r}).to_parquet(...))"
            )
        self.images = ImageStore(self.root, allow_outside)
        self.metadata = next((m for m in _METADATA if files.exists(files.join(self.root, m))), None)
        self._rows: list[Any] = []  # objects, or the error of a line
        self._paths: list[str] = []
        column = caption
        if self.metadata:
            self._rows = self._read_metadata()
            keys = self._rows[0]
            if column is None:
                column = next((c for c in _CAPTION_COLUMNS if c in keys), "text")
            if not ({column, "conversations", "messages"} & set(keys)):
                raise ValueError(
                    f"{self.metadata} in {self.root} has no column {column!r}; its columns are {', '.join(keys)}"
                )
            warn_unused(files.join(self.root, self.metadata), keys, ("file_name", column, "messages", "conversations"))
        else:
            self._paths = files.find_files(self.root, tuple(f".{e}" for e in IMAGE_EXTENSIONS))
        self.caption = Caption(column or "txt", as_prompts(prompts), tuple(strip_prefixes))

    def _read_metadata(self) -> list[Any]:
        assert self.metadata is not None
        path = files.join(self.root, self.metadata)
        with files.open_file(path) as file:
            data = file.read()
        rows = _csv_rows(path, data) if self.metadata.endswith(".csv") else _json_rows(path, data)
        if not rows:
            raise ValueError(f"{path} holds no records")
        if isinstance(rows[0], BadRecord) or not rows[0].get("file_name"):
            reason: object = rows[0]
            if not isinstance(rows[0], BadRecord):
                reason = f"{path}: record 1 has no 'file_name'; its columns are {', '.join(map(repr, rows[0]))}"
            raise ValueError(f"{reason}. The first record must be readable: it determines the file's layout")
        return rows

    def __len__(self) -> int:
        return len(self._rows) or len(self._paths)

    def _read(self, index: int) -> Record:
        if self._rows:
            row = self._rows[index]
            if isinstance(row, BadRecord):
                raise row
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise BadRecord("messages", f"{self.metadata}: record {index + 1} has no 'file_name'")
            where = f"{self.name}/{name}"
            layout = next((key for key in ("messages", "conversations") if row.get(key)), None)
            if layout:
                messages, images = from_row(row, layout, [name], self.images, where)
                return Record(name, self.name, messages, images)
            refuse_meaning(row, where, SYSTEM_KEYS)
            messages = self.caption.messages(row.get(self.caption.column), index, where)
            return Record(name, self.name, messages, [self.images[name]])
        path = self._paths[index]
        sidecar = path.rsplit(".", 1)[0] + ".txt"
        try:
            with files.open_file(sidecar) as file:
                text = decode_text(file.read(), sidecar)
        except FileNotFoundError:
            raise BadRecord("messages", f"{path} has no caption: {sidecar} does not exist") from None
        found: ImageSource = ImageRef(path, name=path) if files.is_url(path) else path
        name = path[len(self.root.rstrip("/")) + 1 :]
        return Record(name, self.name, self.caption.messages(text, index, path), [found])


def _csv_rows(path: str, data: bytes) -> list[dict[str, Any] | BadRecord]:
    """Rows of a CSV file; a row with a wrong number of fields is a `BadRecord`."""
    reader = csv.reader(io.StringIO(decode_text(data, path), newline=""))
    rows: list[dict[str, Any] | BadRecord] = []
    try:
        header = next(reader, [])
        for values in reader:
            if len(values) == len(header):
                rows.append(dict(zip(header, values, strict=True)))
            elif values:  # not a blank line
                rows.append(
                    BadRecord(
                        "messages",
                        f"{path} line {reader.line_num} has {len(values)} fields, the header has {len(header)}: put "
                        "quotes around text that contains a comma",
                    )
                )
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: {error}") from None
    return rows


def _json_rows(path: str, data: bytes) -> list[dict[str, Any] | BadRecord]:
    """Objects of a JSON lines file; an invalid line is a `BadRecord`."""
    if byte_order_mark(data):
        data = decode_text(data, path).encode("utf-8", "surrogatepass")
    return [_parse_line(f"{path} line {n}", line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _parse_line(where: str, line: bytes) -> dict[str, Any] | BadRecord:
    try:
        return parse_json(line, where)
    except BadRecord as error:
        return error
