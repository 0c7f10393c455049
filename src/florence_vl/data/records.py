"""The training record: messages and their images, whatever file they were read from."""

from __future__ import annotations

import codecs
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from PIL import Image

from florence_vl.registry import did_you_mean

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image")


class BadRecord(ValueError):
    """A record that cannot become a training sample; readers and training loops count these by `kind`.

    Args:
        kind: One of `BadRecord.KINDS`: "image" (missing, broken, or not an image), "unsupervised" (no supervised
            token), "too_long" (exceeds `max_length`), "messages" (malformed conversation), "unreadable" (damaged bytes,
            or any other failure of the reader or the encoder).
        message: What was found, for the user.
    """

    KINDS = ("image", "unsupervised", "too_long", "messages", "unreadable")

    def __init__(self, kind: str, message: str) -> None:
        if kind not in self.KINDS:
            raise ValueError(f"unknown kind of bad record {kind!r}. {did_you_mean(kind, self.KINDS)}")
        super().__init__(printable(message))
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:
        return type(self), (self.kind, str(self))


@contextmanager
def bad_record_on_error(where: str) -> Iterator[None]:
    """Convert every exception of the block to a `BadRecord`, so that one record cannot end a run.

    `DataReport` counts these like other bad records and stops the run if there are too many, so that a bug does not
    stay hidden.

    Args:
        where: Name of the record, for messages.

    Raises:
        BadRecord: That of the block, or kind "unreadable" with the type and text of another exception.
    """
    try:
        yield
    except BadRecord:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise BadRecord("unreadable", f"{where}: {reason}") from error


def printable(text: str) -> str:
    """The text with lone surrogates and control characters escaped, so that it can be printed and written as UTF-8."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or not _unsafe(c) else ascii(c)[1:-1] for c in text)


def _unsafe(character: str) -> bool:
    return character < " " or "\x7f" <= character < "\xa0" or "\ud800" <= character <= "\udfff"


def decode_text(data: bytes, where: str) -> str:
    """Decode the text of a file: UTF-8, or as its byte order mark specifies. Nothing is replaced.

    Args:
        data: The file's bytes.
        where: Name of the file, for messages.

    Raises:
        BadRecord: Kind "messages": the bytes are not valid text.
    """
    encoding = byte_order_mark(data) or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadRecord(
            "messages",
            f"{where} is not {encoding.removesuffix('-sig').upper()} text (byte {error.start}: {error.reason}): "
            "convert it to UTF-8",
        ) from None
    if "\0" in text:
        raise BadRecord("messages", f"{where} contains NUL characters: convert it to UTF-8")
    return text


def byte_order_mark(data: bytes) -> str | None:
    """The encoding of a byte order mark at the start of the data, or None."""
    return next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), None)


_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

MAX_IMAGE_BYTES = 256 << 20
"""Maximum size of an encoded image inside an archive; larger ones are bad records."""


@dataclass(frozen=True)
class ImageRef:
    """Bytes of an image inside a larger file (tar member, zip, column of a table), read lazily.

    Args:
        uri: Path or fsspec URL of the file.
        offset: First byte of the image.
        length: Number of bytes; None reads to the end of the file.
        name: Name for messages; `uri@offset` by default.
        crc: CRC-32 of the bytes, if the archive contains it.
    """

    uri: str
    offset: int = 0
    length: int | None = None
    name: str | None = None
    crc: int | None = None

    def read(self) -> bytes:
        """The encoded image's bytes.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file ends before `length` bytes, or there are more than `MAX_IMAGE_BYTES`.
        """
        import fsspec

        limit = MAX_IMAGE_BYTES + 1
        if self.length is not None and self.length >= limit:
            raise ValueError(f"{self} has {self.length} bytes, more than the limit of {MAX_IMAGE_BYTES}")
        with fsspec.open(self.uri, "rb") as file:
            file.seek(self.offset)
            data = file.read(limit if self.length is None else self.length)
        if len(data) == limit:
            raise ValueError(f"{self} has more than the limit of {MAX_IMAGE_BYTES} bytes")
        if self.length is not None and len(data) != self.length:
            raise ValueError(f"{self}: expected {self.length} bytes, the file ends after {len(data)}")
        if self.crc is not None and zlib.crc32(data) != self.crc:
            raise ValueError(f"{self} is damaged: its checksum differs from the archive's")
        return data

    def head(self, length: int) -> bytes:
        """The first bytes, at most `length`; their checksum is not compared."""
        import fsspec

        with fsspec.open(self.uri, "rb") as file:
            file.seek(self.offset)
            return file.read(length if self.length is None else min(length, self.length))

    def __str__(self) -> str:
        return self.name or f"{self.uri}@{self.offset}"


ImageSource = Union[str, Path, bytes, Image.Image, ImageRef]  # noqa: UP007


@dataclass
class Record:
    """One conversation about zero or more images.

    Args:
        id: Name of the record inside its source.
        source: Name of the data set it comes from.
        messages: Chat messages: `{"role": "system"|"user"|"assistant", "content": [{"type": "text", "text": ...} |
            {"type": "image"}, ...]}`. Text is text: `<image>` inside a text part is never a placeholder.
        images: One source per image part, in reading order.
    """

    id: str
    source: str
    messages: list[dict[str, Any]]
    images: list[ImageSource] = field(default_factory=list)

    @property
    def num_image_parts(self) -> int:
        """Number of image parts in the messages."""
        return sum(part.get("type") == "image" for message in self.messages for part in message["content"])

    def text(self, role: str | None = None) -> str:
        """All text parts (of one role), joined by newlines: for statistics and previews."""
        parts = (
            part["text"]
            for message in self.messages
            if role is None or message["role"] == role
            for part in message["content"]
            if part["type"] == "text"
        )
        return "\n".join(parts)

    def checked_messages(self) -> list[dict[str, Any]]:
        """The messages in their normal form, with an image for every image part.

        Raises:
            BadRecord: Kind "messages"; the message names the record, what was found and what was expected.
        """
        where = f"record {self.id!r} of {self.source!r}"
        messages = normalize_messages(self.messages, where)
        parts = sum(part["type"] == "image" for message in messages for part in message["content"])
        if parts != len(self.images):
            raise BadRecord(
                "messages", f"{where} has {parts} image parts in its messages but {len(self.images)} images"
            )
        return messages

    def check(self) -> Record:
        """Put the messages into their normal form, and make the id printable.

        Returns:
            The record itself.

        Raises:
            BadRecord: See `checked_messages`.
        """
        self.id = printable(self.id)
        self.messages = self.checked_messages()
        return self


def caption_of(record: Record) -> tuple[ImageSource, str] | str:
    """Image and caption of a record, or the reason why it has none.

    The caption is the first answer of the conversation; records must have exactly one image.
    """
    if len(record.images) != 1:
        return "no image" if not record.images else "more than one image"
    for message in record.messages:
        if message["role"] == "assistant":
            text = " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
            return (record.images[0], text) if text else "empty caption"
    return "no caption"


def normalize_messages(messages: Any, where: str = "conversation") -> list[dict[str, Any]]:
    """Check messages and convert the short form (`content` as a string) to a list of parts.

    Args:
        messages: Messages from a reader or a user.
        where: Name of the record, for messages.

    Returns:
        New messages in the form of `Record`, with `role` and `content` only.

    Raises:
        BadRecord: Kind "messages".
    """

    def bad(text: str) -> BadRecord:
        return BadRecord("messages", f"{where}: {text}")

    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise bad(f"messages must be a list, found {type(messages).__name__}")
    if not messages:
        raise bad("there are no messages")
    result = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise bad(f"message {index} must be a dict with 'role' and 'content', found {message!r:.80}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise bad(f"message {index} has unknown role {role!r}. {did_you_mean(str(role), ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or not content:
            raise bad(f"message {index} ({role}) has no content: give text, or a list of text and image parts")
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if not isinstance(kind, str) or kind not in PART_TYPES:
                raise bad(f"message {index} ({role}) has a part of unknown type {kind!r}; known: text, image")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise bad(f"message {index} ({role}) has a text part without text: {part!r:.80}")
            if kind == "text":
                try:
                    part["text"].encode()
                except UnicodeEncodeError as error:
                    raise bad(
                        f"message {index} ({role}) contains half of a character (a lone surrogate, "
                        f"{part['text'][error.start]!a}): the text was truncated or escaped incorrectly"
                    ) from None
            if kind == "image" and role != "user":
                raise bad(f"message {index} ({role}) shows an image; only user messages can")
        result.append({"role": role, "content": [dict(part) for part in content]})
    return result


def text_part(text: str) -> dict[str, str]:
    """A text part of a message."""
    return {"type": "text", "text": text}


def image_part() -> dict[str, str]:
    """An image part of a message; its source is in the record's `images`."""
    return {"type": "image"}
