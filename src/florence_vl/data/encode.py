"""A record becomes a sample: token ids, labels from the chat template's generation marks, and pixel values."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from florence_vl.data.records import BadRecord, Record, normalise_messages
from florence_vl.model.chat_template import CHAT_TEMPLATES, has_generation_marks
from florence_vl.model.pictures import image_name, open_image
from florence_vl.model.processing import FlorenceVLProcessor
from florence_vl.registry import did_you_mean

IGNORE = -100
"""Label of a position that is not learned (`torch.nn.CrossEntropyLoss`'s default `ignore_index`)."""

ON_LONG = ("error", "drop", "truncate_turns")

_render_lock = threading.Lock()  # transformers' generation tracker belongs to the compiled template, which is shared


@dataclass
class Sample:
    """One conversation, ready for a collator.

    Args:
        input_ids: (L,) int64, with one placeholder for each image token.
        labels: (L,) int64: the id where the assistant wrote it, -100 elsewhere and at position 0.
        pixel_values: (images, 3, H, W) float32 in reading order; None without images.
        id: The record's.
        source: The record's data set.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    id: str = ""
    source: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return 0 if self.pixel_values is None else len(self.pixel_values)

    @property
    def num_supervised(self) -> int:
        """Number of tokens that are learned."""
        return int((self.labels != IGNORE).sum())


class RecordEncoder:
    """Turns records into samples, deterministically and without padding.

    Labels come from the template's generation marks: each answer and its end token. The text is tokenized once.

    Args:
        processor: The model's.
        template: Name in `CHAT_TEMPLATES`; None takes the processor's own chat template.
        max_length: Longest sample, tokens, image tokens included; None for no limit but the LLM's context, which
            the processor names.
        on_long: What happens to a longer one. `error`: ValueError. `drop`: BadRecord of kind "too_long", for the caller
            to count. `truncate_turns`: its last turns are dropped, with their images, until it fits; BadRecord if the
            first turn alone does not. An image is never cut.
        template_options: Options of `ChatTemplate.build`, with `template` only.

    Raises:
        ValueError: Unknown template, option or `on_long`; a template that does not fit the tokenizer or has no
            generation marks; images of their native aspect ratio.
    """

    def __init__(
        self,
        processor: FlorenceVLProcessor,
        template: str | None = None,
        max_length: int | None = None,
        on_long: str = "error",
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        if on_long not in ON_LONG:
            raise ValueError(f"unknown on_long {on_long!r}. {did_you_mean(on_long, ON_LONG)}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; it must be at least 2 tokens")
        if processor.image_processor.image_aspect_ratio == "native":
            raise ValueError(
                "training data cannot be encoded with image_aspect_ratio='native' yet: it gives each image its own "
                "number of tokens, and the encoder counts one number for all. Set it to pad or squash"
            )
        self.processor = processor
        context = processor.context_length
        self.max_length, self._limit = max_length, f"max_length={max_length}"
        if context is not None and (max_length is None or context < max_length):
            self.max_length, self._limit = context, f"the context of the LLM, {context} tokens"
        self.on_long = on_long
        if template is not None:
            self.template = CHAT_TEMPLATES[template].build(
                processor.tokenizer, processor.image_token, **(template_options or {})
            )
        elif template_options:
            raise ValueError("template_options need a template name; the processor's own template is fixed")
        else:
            self.template = processor.template_text()
        if not has_generation_marks(self.template):
            raise ValueError(
                "the processor's chat template has no {% generation %} marks, so nothing says what to learn. Name one "
                f"of ours: template={' | '.join(CHAT_TEMPLATES.names())}"
            )
        self._variables = {"add_generation_prompt": False, **processor.tokenizer.special_tokens_map}

    def __call__(self, record: Record) -> Sample:
        """Encode a record.

        Raises:
            BadRecord: Kind "messages" (malformed, or as many images as don't fit the messages), "image" (unreadable),
                "unsupervised" (nothing to learn) or "too_long".
            ValueError: Longer than `max_length` with `on_long="error"`.
        """
        messages, ids, labels = self._fit(record)
        images = [part for message in messages for part in message["content"] if part["type"] == "image"]
        pixel_values = self._pixels(record, len(images)) if images else None
        return Sample(ids, labels, pixel_values, record.id, record.source)

    def tokenize(self, record: Record) -> tuple[Tensor, Tensor]:
        """`input_ids` and `labels` of a record, (L,) each, without reading its images. Raises as `__call__`."""
        return self._fit(record)[1:]

    def length(self, record: Record) -> int:
        """Number of tokens of the record's sample, without reading its images. Raises as `__call__`."""
        return len(self._fit(record)[1])

    def _fit(self, record: Record) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
        name = f"record {record.id!r} of {record.source!r}"
        messages = normalise_messages(record.messages, where=name)
        parts = sum(part["type"] == "image" for message in messages for part in message["content"])
        if parts != len(record.images):
            raise BadRecord(
                "messages", f"{name} has {parts} image parts in its messages but {len(record.images)} images"
            )
        ids, mask = self._encode(messages, name)
        while self.max_length is not None and len(ids) > self.max_length:
            text = f"{name} has {len(ids)} tokens, more than {self._limit}"
            if self.on_long == "error":
                raise ValueError(f"{text}. Shorten it, or set on_long to drop or truncate_turns")
            shorter = _without_last_turn(messages) if self.on_long == "truncate_turns" else None
            if shorter is None:
                raise BadRecord("too_long", text)
            messages = shorter
            ids, mask = self._encode(messages, name)
        labels = np.where(mask, ids, IGNORE)
        labels[:1] = IGNORE  # nothing comes before the first token, so it is never a target
        if not (labels != IGNORE).any():
            raise BadRecord("unsupervised", f"{name} has no assistant token to learn")
        return messages, torch.from_numpy(ids), torch.from_numpy(labels)

    def _encode(self, messages: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids with expanded image tokens and the assistant mask, (L,) each."""
        conversation = self.processor.sanitize(messages, self.template)
        try:
            with _render_lock:
                texts, spans = render_jinja_template(
                    conversations=[conversation],
                    chat_template=self.template,
                    return_assistant_tokens_mask=True,
                    **self._variables,
                )
        except jinja2.TemplateError as error:
            raise BadRecord("messages", f"{name}: the chat template refuses it: {error}") from error
        token_ids, offsets = self.processor.tokenize(texts[0])
        ids = np.asarray(token_ids, dtype=np.int64)
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in spans[0]:
            first = np.searchsorted(bounds[:, 1], start, side="right")
            last = np.searchsorted(bounds[:, 0], end, side="left")
            mask[first:last] = True
        repeats = np.where(ids == self.processor.image_token_id, self.processor.num_image_tokens(), 1)
        return np.repeat(ids, repeats), np.repeat(mask, repeats)

    def _pixels(self, record: Record, count: int) -> Tensor:
        images = []
        for index, source in enumerate(record.images[:count]):
            where = f"image {index} of record {record.id!r} of {record.source!r} ({image_name(source)})"
            try:
                images.append(open_image(source, name=where))
            except (OSError, ValueError) as error:
                raise BadRecord("image", str(error)) from error
        return self.processor.image_processor(images, return_tensors="pt")["pixel_values"]


def _without_last_turn(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages up to and with the last answer but one; None if there is none."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [dict(message) for message in messages[: answers[-2] + 1]] if len(answers) > 1 else None
