"""The training record: messages and the images they show, whatever file it was read from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

from PIL import Image

from florence_vl.registry import did_you_mean

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image")


class BadRecord(ValueError):
    """A record that cannot become a training sample; readers and loops count these by `kind`.

    Args:
        kind: One of `BadRecord.KINDS`: "image" (missing, broken, or not an image), "unsupervised" (no token to
            learn), "too_long" (does not fit `max_length`), "messages" (malformed conversation).
        message: What was found, for the user.
    """

    KINDS = ("image", "unsupervised", "too_long", "messages")

    def __init__(self, kind: str, message: str) -> None:
        if kind not in self.KINDS:
            raise ValueError(f"unknown kind of bad record {kind!r}. {did_you_mean(kind, self.KINDS)}")
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:
        return type(self), (self.kind, str(self))


@dataclass(frozen=True)
class ImageRef:
    """Bytes of an image inside a larger file (tar member, zip, column of a table), read only when asked.

    Args:
        uri: Path or fsspec address of the file.
        offset: First byte of the image.
        length: Number of bytes; None reads to the end of the file.
        name: What messages call the image; `uri@offset` by default.
    """

    uri: str
    offset: int = 0
    length: int | None = None
    name: str | None = None

    def read(self) -> bytes:
        """The encoded image's bytes.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file ends before `length` bytes.
        """
        import fsspec

        with fsspec.open(self.uri, "rb") as file:
            file.seek(self.offset)
            data = file.read() if self.length is None else file.read(self.length)
        if self.length is not None and len(data) != self.length:
            raise ValueError(f"{self}: expected {self.length} bytes, the file ends after {len(data)}")
        return data

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
        images: One source for every image part, in reading order.
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

    def check(self) -> Record:
        """Verify the shape of the messages and that every image part has its image.

        Returns:
            The record itself.

        Raises:
            BadRecord: kind "messages", naming the record, what was found and what was expected.
        """
        self.messages = normalise_messages(self.messages, where=f"record {self.id!r} of {self.source!r}")
        parts = self.num_image_parts
        if parts != len(self.images):
            raise BadRecord(
                "messages",
                f"record {self.id!r} of {self.source!r} has {parts} image parts in its messages but "
                f"{len(self.images)} images",
            )
        return self


def caption_of(record: Record) -> tuple[ImageSource, str] | str:
    """Image and caption of a record, or why it has none.

    The caption is the first answer of the conversation; records must show exactly one image.
    """
    if len(record.images) != 1:
        return "no image" if not record.images else "more than one image"
    for message in record.messages:
        if message["role"] == "assistant":
            text = " ".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
            return (record.images[0], text) if text else "empty caption"
    return "no caption"


def normalise_messages(messages: Any, where: str = "conversation") -> list[dict[str, Any]]:
    """Check messages and turn the short form (`content` as a string) into a list of parts.

    Args:
        messages: What a reader or a user hands in.
        where: Name of the record, for messages.

    Returns:
        New messages in the form described at `Record`, with `role` and `content` only.

    Raises:
        BadRecord: kind "messages".
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
        if role not in ROLES:
            raise bad(f"message {index} has unknown role {role!r}. {did_you_mean(str(role), ROLES)}")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or not content:
            raise bad(f"message {index} ({role}) has no content: give text, or a list of text and image parts")
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in PART_TYPES:
                raise bad(f"message {index} ({role}) has a part of unknown type {kind!r}; known: text, image")
            if kind == "text" and not isinstance(part.get("text"), str):
                raise bad(f"message {index} ({role}) has a text part without text: {part!r:.80}")
            if kind == "image" and role != "user":
                raise bad(f"message {index} ({role}) shows an image; only user messages can")
        result.append({"role": role, "content": [dict(part) for part in content]})
    return result


def text_part(text: str) -> dict[str, str]:
    """A text part of a message."""
    return {"type": "text", "text": text}


def image_part() -> dict[str, str]:
    """An image part of a message; its source stands in the record's `images`."""
    return {"type": "image"}
