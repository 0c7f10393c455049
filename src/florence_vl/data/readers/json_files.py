"""Readers of LLaVA JSON and JSON lines, and of chat-message JSON lines, by byte offsets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from florence_vl.data.readers import files
from florence_vl.data.readers.base import READERS, Reader
from florence_vl.data.readers.conversation import from_row, row_images, warn_unused
from florence_vl.data.readers.images import ImageStore
from florence_vl.data.readers.index import cached_array, line_number, scan_json_array, scan_json_lines
from florence_vl.data.records import BadRecord, Record, byte_order_mark, printable

_SPACE = b" \t\r\n"


class IndexedJson:
    """Objects of a JSON list or of JSON lines by number, without loading the file.

    The first opening scans the file (about 1 GB in a few seconds) and stores the offsets in the cache folder; later
    ones map them. `io[i]` is one positioned read and one parse.

    Args:
        path: Local path or fsspec URL.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is empty, or not a list of objects or lines.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = files.local(path)
        key = files.identity(self.path)
        if key[1] == 0:
            raise ValueError(f"{self.path} is empty")
        with files.open_file(self.path) as file:
            head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip(_SPACE)
        encoding = byte_order_mark(head)
        if encoding:
            raise ValueError(f"{self.path} is {encoding.upper()} text: convert it to UTF-8")
        if head and not head.startswith((b"[", b"{")):
            hint = files.pointer_hint(self.path)
            raise ValueError(
                f"{self.path} is neither a JSON list of records nor JSON lines: it begins with {head[:20]!r}{hint}"
            )
        if head.startswith(b"{") and head[1:].lstrip(_SPACE).startswith(b'"') and b"\n" in head.rstrip(_SPACE):
            self._check_lines(head)
        self.is_array = head.startswith(b"[")
        self._key = key
        self._offsets: np.ndarray | None = None
        self._length = len(self.offsets) - 1
        if self._length < 1:
            raise ValueError(f"{self.path} holds no records")

    def _check_lines(self, head: bytes) -> None:
        """Raise an error for one object over several lines, such as `{"data": [...]}`."""
        first = head.split(b"\n", 1)[0].rstrip(_SPACE)
        if first == b"{" or first.endswith((b"[", b"{", b",")):
            raise ValueError(
                f"{self.path} is one JSON object over several lines, not a list of records: write its list "
                "to a separate file"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_offsets": None}  # workers map the index themselves

    @property
    def offsets(self) -> np.ndarray:
        """Starts of the records and the end: uint64 (records + 1,), memory-mapped."""
        if self._offsets is None:
            kind, scan = ("json", scan_json_array) if self.is_array else ("jsonl", scan_json_lines)
            self._offsets = cached_array(self._key, kind, lambda: scan(self.path))
        return self._offsets

    def __len__(self) -> int:
        return self._length

    def raw(self, index: int) -> bytes:
        """The text of a record."""
        start, end = (int(x) for x in self.offsets[index : index + 2])
        text = files.read_range(self.path, start, end - start).rstrip(_SPACE)
        if self.is_array:
            text = text.removesuffix(b",").rstrip(_SPACE)
        return text.removeprefix(b"\xef\xbb\xbf")

    def where(self, index: int) -> str:
        """File and line of a record, for messages (reads the file up to it)."""
        return f"{self.path} line {line_number(self.path, int(self.offsets[index]))}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The parsed object.

        Raises:
            BadRecord: Kind "messages": not valid JSON, or not an object; the message gives the line.
        """
        text = self.raw(index)
        try:
            row = json.loads(text.decode())  # json.loads would guess an encoding
            if b"\0" in text:
                raise BadRecord("messages", f"{self.where(index)} contains NUL characters: convert the file to UTF-8")
        except RecursionError:
            raise BadRecord("messages", f"{self.where(index)}: the JSON is nested too deeply") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            start = int(self.offsets[index]) + (error.start if isinstance(error, UnicodeDecodeError) else 0)
            line = line_number(self.path, start)
            if isinstance(error, json.JSONDecodeError):
                line += error.lineno - 1
                reason = f"{error.msg} at column {error.colno}"
            else:
                reason = f"not UTF-8 ({error.reason})"
            raise BadRecord("messages", f"{self.path} line {line}: invalid JSON: {reason}") from None
        if not isinstance(row, dict):
            raise BadRecord("messages", f"{self.where(index)}: expected an object, found {type(row).__name__}")
        return row


class _JsonReader(Reader):
    """A reader whose rows are JSON objects."""

    required = ""
    shares_pictures = True

    def __init__(
        self,
        path: str | Path,
        image_root: str | Path | Sequence[str | Path] | None = None,
        name: str | None = None,
        allow_outside: bool = False,
    ) -> None:
        super().__init__(path, name)
        self.rows = IndexedJson(path)
        self.images = ImageStore(image_root if image_root is not None else _parent(self.rows.path), allow_outside)
        self._check_layout()

    def _check_layout(self) -> None:
        try:
            first = self.rows[0]
        except BadRecord as error:
            raise ValueError(f"{error}. The first record must be readable: it determines the file's layout") from None
        if self.required not in first:
            other = "messages" if self.required == "conversations" else "llava"
            hint = ""
            if READER_KEYS[other] in first:
                hint = f" It is read by the reader {other!r}."
            raise ValueError(
                f"{self.path}: the first record has no {self.required!r}; its keys are "
                f"{printable(', '.join(first))}.{hint}"
            )
        warn_unused(self.path, first, (self.required,))

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, index: int) -> Record:
        row = self.rows[index]
        where = f"{self.name} record {index} (id {row.get('id', index)!r:.80})"
        messages, sources = from_row(row, self.required, row_images(row, where), self.images, where)
        return Record(str(row.get("id", index)), self.name, messages, sources)


def _parent(path: str) -> str:
    return path.rsplit("/", 1)[0] if files.is_url(path) else str(Path(path).absolute().parent)


READER_KEYS = {"llava": "conversations", "messages": "messages"}


@READERS.register("llava")
class LlavaReader(_JsonReader):
    """LLaVA's format: `id`, optional `image` (name or list of names), `conversations` of `{from, value}`.

    Args:
        path: JSON list or JSON lines; local or fsspec URL.
        image_root: Base folder of image names, see `ImageStore`; the file's folder by default.
        name: Name of the source.
        allow_outside: Also open images outside `image_root`: absolute names, `..`, URLs.

    Raises:
        FileNotFoundError: The file or image root does not exist.
        ValueError: The file has another layout.
    """

    required = "conversations"


@READERS.register("messages")
class MessagesReader(_JsonReader):
    """Chat messages: `messages` of `{role, content}` and optional `images`; see `conversation.from_messages`.

    Args:
        path: JSON lines or JSON list; local or fsspec URL.
        image_root: Base folder of image names, see `ImageStore`; the file's folder by default.
        name: Name of the source.
        allow_outside: Also open images outside `image_root`: absolute names, `..`, URLs.

    Raises:
        FileNotFoundError: The file or image root does not exist.
        ValueError: The file has another layout.
    """

    required = "messages"
