"""Common parts of readers: the registry and caption prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from florence_vl.data.records import BadRecord, Record, bad_record_on_error, image_part, text_part
from florence_vl.data.sampler import mix
from florence_vl.registry import Registry

DEFAULT_PROMPTS = ("Describe this image in detail.",)


class Reader:
    """A map-style, picklable view of a data set on disk: `len(reader)` and `reader[i] -> Record`.

    Args:
        path: File, folder, glob or fsspec URL.
        name: Name of the source in records; the path's stem by default.

    Attributes:
        block: Number of records that are read together; a mixture shuffles blocks of this size (1: any order is
            efficient).
        shares_pictures: Whether several records may show the same picture.
    """

    block: int = 1
    shares_pictures: bool = False

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        self.path = str(path)
        self.name = name or Path(self.path.rstrip("/")).stem

    def __len__(self) -> int:
        raise TypeError(f"{type(self).__name__} must define __len__")

    def __getitem__(self, index: int) -> Record:
        """Record number `index`.

        Raises:
            BadRecord: The record cannot be read, for any reason.
            IndexError: Outside [0, len).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.path}, which has {len(self)}")
        with bad_record_on_error(f"{self.name} record {index}"):
            return self._read(int(index)).check()

    def _read(self, index: int) -> Record:
        """Record number `index`, in [0, len); `__getitem__` checks the result."""
        raise TypeError(f"{type(self).__name__} must define _read")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {len(self)} records)"


READERS: Registry[type[Reader]] = Registry("reader")


@dataclass(frozen=True)
class Caption:
    """Converts captions to records: the record's number determines the prompt, and unwanted prefixes are removed.

    Args:
        column: Column, JSON key or extension of the caption.
        prompts: User texts; "" gives the image without text.
        strip_prefixes: Prefixes to remove (case-sensitive); the rest is then capitalized.
    """

    column: str
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    strip_prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompts or isinstance(self.prompts, str):
            raise ValueError('prompts must be a list of at least one text ("" for none)')

    def clean(self, text: str) -> str:
        """The caption without surrounding space and unwanted prefix."""
        text = text.strip()
        for prefix in self.strip_prefixes:
            if text.startswith(prefix.strip()):
                text = text[len(prefix.strip()) :].lstrip(" ,:")
                return text[:1].upper() + text[1:]
        return text

    def messages(self, text: Any, index: int, where: str) -> list[dict[str, Any]]:
        """A user turn with the image and a prompt, and the caption as the answer.

        Raises:
            BadRecord: Kind "messages": there is no caption.
        """
        if not isinstance(text, str) or not text.strip():
            raise BadRecord("messages", f"{where} has no caption in {self.column!r}")
        prompt = self.prompts[mix(index) % len(self.prompts)]
        question = [image_part(), *([text_part(prompt)] if prompt else [])]
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [text_part(self.clean(text))]},
        ]


def as_prompts(prompts: str | Sequence[str] | None) -> tuple[str, ...]:
    """Prompts as a tuple; None gives the default."""
    if prompts is None:
        return DEFAULT_PROMPTS
    return (prompts,) if isinstance(prompts, str) else tuple(prompts)
