"""Reader of a folder of images with captions: text files beside them, or one metadata file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from florence_vl.data.readers import files
from florence_vl.data.readers.base import READERS, Caption, Reader, as_prompts
from florence_vl.data.readers.conversation import from_llava, from_messages
from florence_vl.data.readers.images import ImageStore
from florence_vl.data.readers.webdataset import IMAGE_EXTENSIONS
from florence_vl.data.records import BadRecord, ImageRef, ImageSource, Record

_CAPTION_COLUMNS = ("text", "caption")
_METADATA = ("metadata.jsonl", "metadata.csv")


@READERS.register("folder")
class FolderReader(Reader):
    """Images and their captions, for data of a size that a listing holds (up to about a million).

    With `metadata.jsonl` or `metadata.csv` (Hugging Face's imagefolder form) every line names `file_name` and a caption
    in `text` or `caption` (JSON lines also `conversations` or `messages`). Otherwise every image has its caption in a
    text file of the same name.

    Args:
        path: The folder; local or fsspec URL.
        caption: Column of captions in the metadata file.
        prompts: User texts for captions, see `Caption`.
        strip_prefixes: Openings to cut from captions.
        name: Name of the source.

    Raises:
        FileNotFoundError: No such folder, or no images in it.
        ValueError: The metadata file is malformed.
    """

    def __init__(
        self,
        path: str | Path,
        caption: str | None = None,
        prompts: str | Sequence[str] | None = None,
        strip_prefixes: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        super().__init__(path, name)
        self.root = files.local(path)
        if not files.is_folder(self.root):
            raise FileNotFoundError(f"no such folder: {self.root}")
        self.images = ImageStore(self.root)
        self.metadata = next((m for m in _METADATA if files.exists(files.join(self.root, m))), None)
        self._rows: list[dict[str, Any]] = []
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
        else:
            self._paths = files.find_files(self.root, tuple(f".{e}" for e in IMAGE_EXTENSIONS))
        self.caption = Caption(column or "txt", as_prompts(prompts), tuple(strip_prefixes))

    def _read_metadata(self) -> list[dict[str, Any]]:
        assert self.metadata is not None
        path = files.join(self.root, self.metadata)
        with files.open_file(path) as file:
            text = file.read().decode("utf-8-sig")
        rows: list[dict[str, Any]] = []
        if self.metadata.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            for number, line in enumerate(text.splitlines(), 1):
                if not line.strip():
                    continue
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path} line {number}: invalid JSON: {error.msg} at column {error.colno}"
                    ) from None
        if not rows:
            raise ValueError(f"{path} holds no records")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not row.get("file_name"):
                raise ValueError(f"{path}: record {number} has no 'file_name'")
        return rows

    def __len__(self) -> int:
        return len(self._rows) or len(self._paths)

    def __getitem__(self, index: int) -> Record:
        index = self._check_index(index)
        if self._rows:
            row = self._rows[index]
            name = str(row["file_name"])
            source = self.images[name]
            where = f"{self.name}/{name}"
            if row.get("messages"):
                messages, images = from_messages(row["messages"], [name], self.images, where)
                return Record(name, self.name, messages, images).check()
            if row.get("conversations"):
                messages = from_llava(row["conversations"], 1, where)
            else:
                messages = self.caption.messages(row.get(self.caption.column), index, where)
            return Record(name, self.name, messages, [source]).check()
        path = self._paths[index]
        sidecar = path.rsplit(".", 1)[0] + ".txt"
        try:
            with files.open_file(sidecar) as file:
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            raise BadRecord("messages", f"{path} has no caption: {sidecar} does not exist") from None
        found: ImageSource = ImageRef(path, name=path) if files.is_url(path) else path
        name = path[len(self.root.rstrip("/")) + 1 :]
        return Record(name, self.name, self.caption.messages(text, index, path), [found]).check()
