"""A benchmark question: its prompt, its images, and the reference of its answer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

IMAGE = object()  # marks the position of an image in a prompt


class Picture(Protocol):
    """An image that is read lazily."""

    @property
    def key(self) -> str:
        """Identity of the picture, so that it is encoded once."""
        ...

    def read(self) -> bytes:
        """The encoded bytes."""
        ...


@dataclass(frozen=True)
class BytesPicture:
    """A picture in memory."""

    data: bytes

    @cached_property
    def key(self) -> str:
        """Content hash."""
        return hashlib.sha256(self.data).hexdigest()[:20]

    def read(self) -> bytes:
        """The encoded bytes."""
        return self.data


@dataclass(frozen=True)
class ImagePicture:
    """A decoded picture, for callers that have no file; it is encoded only where bytes are needed.

    Attributes:
        image: RGB.
    """

    image: PILImage

    @cached_property
    def key(self) -> str:
        """Hash of size and pixels."""
        digest = hashlib.sha256(repr(self.image.size).encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()[:20]

    def read(self) -> bytes:
        """A PNG file."""
        file = io.BytesIO()
        self.image.save(file, "PNG", compress_level=1)
        return file.getvalue()


@dataclass(frozen=True)
class Question:
    """One question of one benchmark.

    Attributes:
        id: Unique within its benchmark.
        benchmark: The benchmark's name.
        parts: Text and `IMAGE` marks, in reading order.
        images: One picture per mark.
        reference: Input of the metric, JSON values only.
    """

    id: str
    benchmark: str
    parts: tuple[Any, ...]
    images: Sequence[Picture] = ()
    reference: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The prompt as text, with `<image>` for images on separate lines."""
        return "\n".join("<image>" if part is IMAGE else part for part in self.parts)

    @property
    def text(self) -> str:
        """The prompt's text without image marks."""
        return "\n".join(part for part in self.parts if part is not IMAGE)

    @property
    def picture_key(self) -> str:
        """Key of all its pictures together; questions with the same key share the encoded images."""
        return "+".join(picture.key for picture in self.images)

    def content(self) -> list[dict[str, str]]:
        """Message content as chat templates expect it: `{"type": "image"}` and `{"type": "text", "text": ...}`."""
        return [{"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in self.parts]
