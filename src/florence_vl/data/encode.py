"""Encode records as samples: token ids, labels from the chat template's generation marks, and pixel values."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from florence_vl.data.records import BadRecord, Record
from florence_vl.data.sampler import mix
from florence_vl.model.chat_template import CHAT_TEMPLATES, has_generation_marks
from florence_vl.model.pictures import image_name, image_size, open_image
from florence_vl.model.processing import FlorenceVLProcessor
from florence_vl.model.views import FULL_VIEW, feature_mask
from florence_vl.registry import did_you_mean

IGNORE = -100
"""Label of an unsupervised position (default `ignore_index` of `torch.nn.CrossEntropyLoss`)."""

ON_LONG = ("error", "drop", "truncate_turns")

_render_lock = threading.Lock()  # transformers' generation tracker is part of the compiled template, which is shared


@dataclass
class Sample:
    """One conversation, ready for a collator.

    Args:
        input_ids: (L,) int64, with one placeholder per image token.
        labels: (L,) int64: the id for tokens of the assistant, -100 elsewhere and at position 0.
        pixel_values: (images, 3, H, W) float32 in reading order, each in the top left corner; None without images.
        id: Id of the record.
        source: Data set of the record.
        image_tokens: Number of tokens of each image.
        image_inputs: Further inputs of the model, one row per image, by argument: `image_sizes` (images, 2) if they
            differ in size, `question_ids` and `question_mask` (images, Q) for a fusion that depends on the question,
            `feature_mask` (images, F) for views.
        full: The same conversation with all features at the processor's own size, for distillation.
        branches: Of a message tree, where each branch begins (`florence_vl.data.trees`); empty for a single
            conversation.
    """

    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None = None
    id: str = ""
    source: str = ""
    image_tokens: tuple[int, ...] = ()
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    full: Sample | None = None
    branches: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return 0 if self.pixel_values is None else len(self.pixel_values)

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels != IGNORE).sum())

    @property
    def row_tokens(self) -> int:
        """Tokens that it needs in a row: its own, or those of `full` if they are more."""
        return max(len(self), len(self.full) if self.full is not None else 0)


@dataclass(frozen=True)
class ViewDraws:
    """Draws the view of each record, and the features of its images, from a seed and the record's position.

    Args:
        weights: Name of a view -> relative frequency; `full` means all features at the processor's own size.
        feature_dropout: Probability that a feature other than the first is dropped.
        seed: Seed of the draws.

    Raises:
        ValueError: There is no view, a weight is negative, all weights are zero, or a probability is outside [0, 1).
    """

    weights: Mapping[str, float]
    feature_dropout: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()) > 0:
            raise ValueError(f"views need weights of 0 or more that are not all 0, found {dict(self.weights)}")
        if not 0 <= self.feature_dropout < 1:
            raise ValueError(f"feature_dropout must be in [0, 1), found {self.feature_dropout}")

    def view(self, position: int) -> str:
        """The view of the record at a position."""
        place = mix(self.seed, position, 5) / 2**64 * sum(self.weights.values())
        for name, weight in self.weights.items():
            place -= weight
            if place < 0:
                return name
        return max(self.weights, key=self.weights.__getitem__)  # rounding

    def mask(self, position: int, features: Sequence[str], chosen: Sequence[str]) -> list[int]:
        """1 for each of `features` that is `chosen` and kept, otherwise 0; the first is always kept."""
        kept = [
            index == 0 or mix(self.seed, position, 6, index) / 2**64 >= self.feature_dropout
            for index in range(len(features))
        ]
        return [int(keep and one) for keep, one in zip(kept, feature_mask(features, chosen), strict=True)]


class RecordEncoder:
    """Converts records to samples, deterministically and without padding.

    Labels follow from the template's generation marks: each answer and its end token. The text is tokenized only once.

    Args:
        processor: The model's processor.
        template: Name in `CHAT_TEMPLATES`; None uses the processor's own chat template.
        max_length: Maximum number of tokens of a sample, including image tokens; None for no limit except the LLM's
            context length, which the processor knows.
        on_long: Treatment of longer samples. `error`: ValueError. `drop`: BadRecord of kind "too_long", for the caller
            to count. `truncate_turns`: the last turns are dropped, with their images, until it fits; BadRecord if the
            first turn alone is too long. An image is never truncated.
        template_options: Options of `ChatTemplate.build`, only together with `template`.
        views: Draws the view of each record with a position; by default the processor's own view.
        distill: Also create `Sample.full`, for the distillation loss.

    Raises:
        ValueError: A template, option, view or `on_long` is unknown; a template does not fit the tokenizer or has no
            generation marks; or views or distillation are used with a model without views.
    """

    def __init__(
        self,
        processor: FlorenceVLProcessor,
        template: str | None = None,
        max_length: int | None = None,
        on_long: str = "error",
        template_options: Mapping[str, Any] | None = None,
        views: ViewDraws | None = None,
        distill: bool = False,
    ) -> None:
        if on_long not in ON_LONG:
            raise ValueError(f"unknown on_long {on_long!r}. {did_you_mean(on_long, ON_LONG)}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; it must be at least 2 tokens")
        self.processor = processor
        context = processor.context_length
        self.max_length = max_length
        self._longest, self._limit = max_length, f"max_length={max_length}"
        if context is not None and (max_length is None or context < max_length):
            self._longest, self._limit = context, f"the context of the LLM, {context} tokens"
        self.on_long = on_long
        self.views, self.distill = views, distill
        if views is not None or distill:
            _check_views(processor, views)
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
                "the processor's chat template has no {% generation %} marks, so the supervised tokens are unknown. "
                f"Use a template of this package: template={' | '.join(CHAT_TEMPLATES.names())}"
            )
        self._variables = {"add_generation_prompt": False, **processor.tokenizer.special_tokens_map}

    def __call__(self, record: Record, position: int | None = None) -> Sample:
        """Encode a record.

        Args:
            record: The record.
            position: Its position in the mixture, for the draw of its view; None uses the processor's own view.

        Raises:
            BadRecord: Kind "messages" (malformed, or the number of images does not fit the messages), "image"
                (unreadable), "unsupervised" (no supervised token) or "too_long".
            ValueError: The sample is longer than `max_length` with `on_long="error"`.
        """
        messages, sample = self._fit(record, position)
        if sample.image_tokens:
            images = self._open(record, len(sample.image_tokens))
            questions: dict[str, Tensor] = {}
            if self.processor.question_context:
                found = self.processor.question_inputs([messages], self.template)
                questions = {name: torch.tensor(rows) for name, rows in found.items()}
            self._show(record, sample, images, questions, self._view(position))
            if self.views is not None and position is not None:
                features, settings = self._features(self._view(position))
                mask_F = torch.tensor(self.views.mask(position, features, settings))
                sample.image_inputs["feature_mask"] = mask_F.expand(len(images), -1)
            if sample.full is not None:
                self._show(record, sample.full, images, questions, FULL_VIEW)
        return sample

    def outline(self, record: Record, position: int | None = None) -> Sample:
        """The sample without its pixels; reads at most the headers of images. Raises as `__call__`."""
        return self._fit(record, position)[1]

    def tokenize(self, record: Record) -> tuple[Tensor, Tensor]:
        """`input_ids` and `labels` of a record, (L,) each, from `outline`. Raises as `__call__`."""
        sample = self.outline(record)
        return sample.input_ids, sample.labels

    def length(self, record: Record) -> int:
        """Number of tokens of the record's sample, from `outline`. Raises as `__call__`."""
        return len(self.outline(record))

    def _view(self, position: int | None) -> str | None:
        return None if self.views is None or position is None else self.views.view(position)

    def _features(self, view: str | None) -> tuple[list[str], list[str]]:
        """All features of the model, and those of a view."""
        images: Any = self.processor.image_processor
        return images.features, images.view_settings(view)["features"]

    def _fit(self, record: Record, position: int | None) -> tuple[list[dict[str, Any]], Sample]:
        """The messages that fit, and their sample without pixels."""
        messages, name = record.checked_messages(), f"record {record.id!r} of {record.source!r}"
        views = [self._view(position), FULL_VIEW] if self.distill else [self._view(position)]
        counts = [self._image_tokens(record, view) for view in views]
        samples = self._encode(messages, record, counts)
        while self._longest is not None and (longest := max(map(len, samples))) > self._longest:
            text = f"{name} has {longest} tokens, more than {self._limit}"
            if self.on_long == "error":
                raise ValueError(f"{text}. Shorten it, or set on_long to drop or truncate_turns")
            shorter = _without_last_turn(messages) if self.on_long == "truncate_turns" else None
            if shorter is None:
                raise BadRecord("too_long", text)
            messages = shorter
            samples = self._encode(messages, record, counts)
        sample, *others = samples
        if not sample.num_supervised:
            raise BadRecord("unsupervised", f"{name} has no assistant token to supervise")
        sample.full = others[0] if others else None
        return messages, sample

    def _image_tokens(self, record: Record, view: str | None) -> list[int]:
        """Tokens of each image in a view. Reads the file only if the size depends on the image."""
        varies = self.processor.image_processor.varies
        counts = []
        for index, source in enumerate(record.images):
            try:
                height, width = image_size(source) if varies else (1, 1)
            except (OSError, ValueError) as error:
                raise BadRecord("image", f"{_where(record, index)}: {error}") from error
            counts.append(self.processor.image_tokens(height, width, view=view))
        return counts

    def _encode(
        self, messages: Sequence[Mapping[str, Any]], record: Record, counts: Sequence[Sequence[int]]
    ) -> list[Sample]:
        """A sample without pixels for each list of image tokens."""
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
            raise BadRecord(
                "messages", f"record {record.id!r} of {record.source!r}: the chat template refuses it: {error}"
            ) from error
        token_ids, offsets = self.processor.tokenize(texts[0])
        ids = np.asarray(token_ids, dtype=np.int64)
        bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        mask = np.zeros(len(ids), dtype=bool)
        for start, end in spans[0]:
            first = np.searchsorted(bounds[:, 1], start, side="right")
            last = np.searchsorted(bounds[:, 0], end, side="left")
            mask[first:last] = True
        labels = np.where(mask, ids, IGNORE)
        labels[:1] = IGNORE  # the first token has no predecessor, so it is never a target
        images = ids == self.processor.image_token_id
        samples = []
        for tokens in counts:
            repeats = np.ones(len(ids), dtype=np.int64)
            shown = tuple(tokens[: int(images.sum())])
            repeats[images] = shown
            both = [torch.from_numpy(np.repeat(values, repeats)) for values in (ids, labels)]
            samples.append(Sample(both[0], both[1], id=record.id, source=record.source, image_tokens=shown))
        return samples

    def _open(self, record: Record, count: int) -> list[Any]:
        images = []
        for index, source in enumerate(record.images[:count]):
            try:
                images.append(open_image(source, name=f"{_where(record, index)} ({image_name(source)})"))
            except (OSError, ValueError) as error:
                raise BadRecord("image", str(error)) from error
        return images

    def _show(
        self, record: Record, sample: Sample, images: list[Any], questions: Mapping[str, Tensor], view: str | None
    ) -> None:
        """Add the images to a sample."""
        inputs = self.processor.image_processor(images, view=view, return_tensors="pt")
        sample.pixel_values = inputs.pop("pixel_values")
        sample.image_inputs = {**inputs, **questions}
        for index, size in enumerate(inputs.get("image_sizes", [])):
            tokens = self.processor.num_image_tokens(*size.tolist())
            if tokens != sample.image_tokens[index]:
                raise BadRecord(
                    "image",
                    f"{_where(record, index)} decodes to {images[index].height}x{images[index].width} pixels, not the "
                    f"size in its header: {tokens} tokens instead of {sample.image_tokens[index]}",
                )


def _where(record: Record, index: int) -> str:
    return f"image {index} of record {record.id!r} of {record.source!r}"


def _check_views(processor: FlorenceVLProcessor, views: ViewDraws | None) -> None:
    images: Any = processor.image_processor
    if images.views is None:
        raise ValueError(
            "views and distillation need a model with views, and this one has none: set `model.build.views`, or load "
            "it with from_pretrained(folder, views={...}); an empty mapping allows feature_dropout only"
        )
    for name in views.weights if views is not None else ():
        images.view_settings(name)


def _without_last_turn(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages up to the second to last answer; None if there is none."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [dict(message) for message in messages[: answers[-2] + 1]] if len(answers) > 1 else None
