"""`FlorenceVLProcessor`: conversations and images to `input_ids` with expanded image tokens and `pixel_values`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs

from florence_vl.model.chat_template import BREAK, control_tokens
from florence_vl.model.geometry import backbone_prefix_tokens, convolved_size, davit_convolutions
from florence_vl.model.image_processing import FlorenceVLImageProcessor, FlorenceVLImagesKwargs
from florence_vl.model.tiles import Canvas

if TYPE_CHECKING:
    from florence_vl.model.configuration import FlorenceVLConfig

__all__ = ["BREAK", "FlorenceVLImageProcessor", "FlorenceVLProcessor", "ImageTokenRule"]

# Florence-2's patch convolutions: kernel, stride, padding of each stage. 32 px per image token.
_FLORENCE2_CONVOLUTIONS = ((7, 4, 3), (3, 2, 1), (3, 2, 1), (3, 2, 1))


@dataclass(frozen=True)
class ImageTokenRule:
    """Number of tokens of an image of a given size: `scale * (rows * columns / merge^2 + additional) + offset`.

    Args:
        convolutions: (kernel, stride, padding) of the tower's patch convolutions, px, which determine rows and columns.
        additional: Number of tokens outside the grid that are kept (mean, class or register tokens).
        scale: Tokens after fusion per token of one feature (the number of features for `token` fusion).
        offset: Tokens after fusion that do not depend on the image's size.
        merge: Side of the square of neighboring tokens that are merged into one before fusion.
    """

    convolutions: tuple[tuple[int, int, int], ...] = _FLORENCE2_CONVOLUTIONS
    additional: int = 0
    scale: int = 1
    offset: int = 0
    merge: int = 1

    @classmethod
    def from_config(cls, config: FlorenceVLConfig) -> ImageTokenRule:
        """The rule of a model.

        Raises:
            ValueError: The fusion's number of tokens does not grow linearly with the features'.
        """
        vision: Any = config.vision_config
        if config.tower == "florence2":
            vision = vision.vision_config
            convolutions = davit_convolutions(vision)
            additional = int(config.mean_token == "all")
        else:
            convolutions = ((vision.patch_size, vision.patch_size, 0),)
            additional = backbone_prefix_tokens(vision) if config.mean_token == "all" else 0
        fusion = _fusion(config)
        one, two, many = (fusion.num_tokens(n) for n in (1, 2, 577))
        scale, offset = two - one, 2 * one - two
        if many != scale * 577 + offset:
            raise ValueError(
                f"fusion {config.fusion!r} gives {one}, {two} and {many} tokens for features of 1, 2 and 577: an "
                "ImageTokenRule describes fusions with a linear number of tokens only"
            )
        return cls(convolutions, additional, scale, offset, config.merge)

    def num_tokens(self, height: int, width: int) -> int:
        """Number of tokens of an image of `height` x `width` pixels.

        Raises:
            ValueError: The image is smaller than one patch, or `merge` does not divide its rows and columns.
        """
        rows, columns = self.grid(height, width)
        return self.scale * (rows * columns + self.additional) + self.offset

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of one feature after merging. Raises as `num_tokens`."""
        rows, columns = convolved_size(height, width, self.convolutions)
        if rows < 1 or columns < 1:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than one patch of the vision tower")
        if rows % self.merge or columns % self.merge:
            raise ValueError(
                f"an image of {height}x{width} pixels gives {rows}x{columns} positions, which merge={self.merge} does "
                "not divide"
            )
        return rows // self.merge, columns // self.merge


def _fusion(config: FlorenceVLConfig) -> Any:
    """A model's fusion, for features of one channel."""
    from florence_vl.model.fusion import build_fusion

    return build_fusion(config.fusion, dict.fromkeys(config.features or (), 1), **config.fusion_options)


def pad_questions(rows: Sequence[Sequence[int]]) -> dict[str, list[list[int]]]:
    """`question_ids` and `question_mask` of questions as token ids, padded on the right."""
    length = max(map(len, rows), default=0) or 1
    return {
        "question_ids": [[*ids, *[0] * (length - len(ids))] for ids in rows],
        "question_mask": [[1] * len(ids) + [0] * (length - len(ids)) for ids in rows],
    }


def pad_left(tokenizer: Any) -> None:
    """Set a tokenizer to pad on the left, as generation requires, whatever its files contain."""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"


class FlorenceVLProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template of one Florence-VL.

    User text is plain text: `<image>` or `<|im_end|>` inside a message is never a placeholder or a control token.
    Padding is on the left, as generation requires, unless the tokenizer was saved or loaded with another
    `padding_side`; training uses its own padding (`florence_vl.data.collate`).

    Args:
        image_processor: A `FlorenceVLImageProcessor`.
        tokenizer: The LLM's fast tokenizer, whose vocabulary has `image_token` as one token.
        chat_template: Jinja text from `florence_vl.model.chat_template.CHAT_TEMPLATES[name].build(tokenizer)`.
        image_token: The placeholder, repeated once per image token.
        image_token_rule: Number of tokens of an image; an `ImageTokenRule` or its dict. Florence-2's 576 at 768 px by
            default.
        question_context: Also return `question_ids` and `question_mask`, for a fusion that depends on the question.
        context_length: Context length of the LLM in tokens; longer prompts are errors. None means no limit.

    Raises:
        ValueError: The tokenizer does not have the image token or is not a fast one.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict[str, str] | None = None,
        image_token: str = "<image>",
        image_token_rule: ImageTokenRule | Mapping[str, Any] | None = None,
        question_context: bool = False,
        context_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        if tokenizer is None or image_processor is None:
            raise ValueError("FlorenceVLProcessor needs an image_processor and a tokenizer")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; masks and offsets need a fast one")
        self.image_token = image_token
        self.image_token_id = tokenizer.get_vocab().get(image_token)
        if self.image_token_id is None or tokenizer.encode(image_token, add_special_tokens=False) != [
            self.image_token_id
        ]:
            raise ValueError(
                f"the tokenizer has no single token {image_token!r} for images. Name an unused reserved token "
                "(image_token=...), or add one: tokenizer.add_special_tokens({'additional_special_tokens': "
                f"[{image_token!r}]}})"
            )
        if context_length is not None and (not isinstance(context_length, int) or context_length < 1):
            raise ValueError(f"context_length must be a number of tokens, found {context_length!r}")
        rule = image_token_rule or ImageTokenRule()
        if isinstance(rule, Mapping):
            rule = ImageTokenRule(**{**rule, "convolutions": tuple(tuple(c) for c in rule["convolutions"])})
        self._set_rule(rule)
        self.question_context = question_context
        self.context_length = context_length
        self._control_patterns: dict[str, re.Pattern[str]] = {}
        tokenizer.padding_side = tokenizer.init_kwargs.get("padding_side", "left")
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_control_patterns": {}}  # use must not change the pickle, and so not its hash

    def _set_rule(self, rule: ImageTokenRule) -> None:
        self._rule, self.image_token_rule = rule, asdict(rule)

    def fit(self, config: FlorenceVLConfig) -> FlorenceVLProcessor:
        """Set what follows from a model's config: number of image tokens, stride, views, tiles, question, context.

        Needed after fields of a saved model were changed (`from_pretrained(folder, fusion="gated")`).

        Args:
            config: Of the model. The size of its tiles is set to this processor's.

        Returns:
            This processor. Its `context_length` is kept if it is set.
        """
        self._set_rule(ImageTokenRule.from_config(config))
        self.question_context = _fusion(config).uses_context
        if self.context_length is None:
            self.context_length = config.context_length
        images: Any = self.image_processor
        images.stride = math.prod(stride for _, stride, _ in self._rule.convolutions) * self._rule.merge
        images.views, images.features, images.tiles = config.views, config.features, None
        if config.tiles is not None:
            config.tiles = {**config.tiles, "size": images.size["height"]}
            images.tiles = dict(config.tiles)
        return self

    # ------------------------------------------------------------ image tokens

    def num_image_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """Tokens of an image after processing to `height` x `width` pixels; by default the processor's own size."""
        size = self.image_processor.size
        canvas = Canvas.of(self.image_processor.tiles, height or size["height"], width or size["width"])
        tile = canvas.height, canvas.width
        return canvas.num_tokens(self._rule.num_tokens(*tile), self._rule.grid(*tile)[1])

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The placeholder of one processed image, repeated once per token."""
        if "image_sizes" in image_inputs:
            height, width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        else:
            height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self.num_image_tokens(height, width)

    def image_tokens(self, height: int, width: int, **settings: Any) -> int:
        """Number of tokens of an image file of `height` x `width` pixels, at the size at which it is encoded.

        Args:
            height: Height of the image file, px.
            width: Width of the image file, px.
            **settings: As in `FlorenceVLImageProcessor.output_size`.
        """
        return self.num_image_tokens(*self.image_processor.output_size(height, width, **settings))

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        given = {**kwargs.get("images_kwargs", {}), **kwargs}
        settings = {key: given[key] for key in FlorenceVLImagesKwargs.__annotations__ if key in given}
        if given.get("size"):
            settings["size"] = given["size"]
        counts = [self.image_tokens(height, width, **settings) for height, width in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """Check that the numbers of placeholders and images of the prompts are equal.

        Raises:
            ValueError: They differ; the message gives both counts.
        """
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if not texts or not all(isinstance(item, str) for item in texts):
                raise ValueError("text must be a string or a list of strings")
            placeholders = [item.count(self.image_token) for item in texts]
            nested = isinstance(images, (list, tuple)) and bool(images)
            nested = nested and all(isinstance(item, (list, tuple)) for item in images)
            if nested and len(images) == len(texts):
                for index, (count, group) in enumerate(zip(placeholders, images, strict=True)):
                    if count != len(group):
                        raise ValueError(self._count_message(count, len(group), f"prompt {index} has"))
            total = _count_images(images)
            if sum(placeholders) != total:
                raise ValueError(self._count_message(sum(placeholders), total, "the prompts have"))
        super().validate_inputs(images=images, text=text, **kwargs)

    def _count_message(self, placeholders: int, images: int, who: str) -> str:
        return (
            f"{who} {placeholders} image placeholders ({self.image_token}) but {images} images were given. Give one "
            "image per placeholder; in a chat use {'type': 'image', 'image': ...} parts"
        )

    # ------------------------------------------------------------ text

    def control_pattern(self, chat_template: str) -> re.Pattern[str]:
        """Pattern of the tokens that only a template may write; see `control_tokens`."""
        pattern = self._control_patterns.get(chat_template)
        if pattern is None:
            tokens = control_tokens(self.tokenizer, chat_template, self.image_token)
            pattern = re.compile("|".join(map(re.escape, tokens)))
            self._control_patterns[chat_template] = pattern
        return pattern

    def sanitize(self, conversation: Sequence[Mapping[str, Any]], chat_template: str) -> list[dict[str, Any]]:
        """A copy of the messages in which text cannot be mistaken for a control token or an image.

        Inserts `BREAK` into each control token that a message contains, and before an answer that starts with white
        space (so that it does not merge with the template's). `__call__` and `tokenize` drop it again.

        Raises:
            ValueError: A message has no role or content, a text part has no text, or the type of a part is unknown.
        """
        pattern = self.control_pattern(chat_template)
        result = []
        if not conversation:
            raise ValueError("the conversation has no messages")
        for index, message in enumerate(conversation):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"message {index} must be a dict with 'role' and 'content', found {message!r:.80}")
            content = message.get("content")
            calls = message.get("tool_calls")
            if calls and "tool_calls" not in chat_template:
                raise ValueError(
                    f"message {index} ({message['role']}) has tool_calls, which this chat template does not render"
                )
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            if calls and not content:
                result.append({**message, "content": []})
                continue
            if not isinstance(content, (list, tuple)) or not content:
                raise ValueError(
                    f"message {index} ({message['role']}) has no content: give text, or a list of text and image parts"
                )
            parts: list[dict[str, Any]] = []
            for part in content:
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind == "text":
                    if not isinstance(part.get("text"), str):
                        raise ValueError(f"message {index} ({message['role']}) has a text part without text")
                    if parts and parts[-1]["type"] == "text":  # a control token may be split over two parts
                        parts[-1]["text"] += part["text"]
                    else:
                        parts.append(dict(part))
                elif kind in ("image", "image_url"):
                    parts.append(dict(part))
                    if "base64" in part:
                        parts[-1]["image"] = "data:;base64," + parts[-1].pop("base64").rpartition(",")[2]
                else:
                    raise ValueError(
                        f"message {index} ({message['role']}) has a part of unknown type {kind!r}; known: text, image"
                    )
            for part in parts:
                if part["type"] == "text":
                    part["text"] = _break_tokens(part["text"], pattern)
            first = parts[0]
            if message["role"] == "assistant" and first["type"] == "text" and first["text"][:1].isspace():
                first["text"] = BREAK + first["text"]
            result.append({**message, "content": parts})
        return result

    @staticmethod
    def question_texts(conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
        """The question that belongs to each image: the text of the message that holds it, and nothing else."""
        texts: list[str] = []
        for message in (message for conversation in conversations for message in conversation):
            parts = message.get("content")
            parts = parts if isinstance(parts, (list, tuple)) else []
            images = sum(part.get("type") in ("image", "image_url") for part in parts)
            texts += ["\n".join(part["text"] for part in parts if part.get("type") == "text")] * images
        return texts

    def question_inputs(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], chat_template: str | None = None
    ) -> dict[str, list[list[int]]]:
        """The question of each image as token ids; see `question_texts`.

        Args:
            conversations: Chats of messages, whose images are in reading order.
            chat_template: Whose control tokens are text here; the processor's own by default.

        Returns:
            `question_ids` and `question_mask`, one row per image, padded on the right; both empty without images. The
            mask is all zero if a message has no text.
        """
        return pad_questions(self.question_rows(conversations, chat_template))

    def question_rows(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], chat_template: str | None = None
    ) -> list[list[int]]:
        """The question of each image as token ids, without padding; arguments as in `question_inputs`."""
        pattern = self.control_pattern(self.template_text(chat_template))
        texts = self.question_texts(conversations)
        return [self.tokenize(_break_tokens(text, pattern))[0] if text else [] for text in texts]

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a rendered text and the characters [start, end) that each covers.

        No special tokens are added, image placeholders are not expanded, and the tokens of `BREAK` are dropped.
        """
        encoding = self.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
        if BREAK not in text:
            return ids, offsets
        keep = _without_breaks(offsets, _break_positions(text))
        return [ids[i] for i in keep], [offsets[i] for i in keep]

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render conversations; with `tokenize=True`, also tokenize them and process their images.

        Like transformers' `ProcessorMixin.apply_chat_template`, with two differences. Text in messages is sanitized,
        also with `return_assistant_tokens_mask` (the rendered text then contains `BREAK` characters, which this
        processor drops). The tokenizer adds no special tokens, because the template writes all of them.

        Raises:
            ValueError: The conversation is malformed, or the template raises an error for it.
        """
        template = self.template_text(chat_template)
        return_tensors = kwargs.get("return_tensors") or (processor_kwargs or {}).get("return_tensors")
        batched = isinstance(conversation, (list, tuple)) and bool(conversation)
        batched = batched and isinstance(conversation[0], (list, tuple))
        chats = [getattr(c, "messages", c) for c in (conversation if batched else [conversation])]
        cleaned = [self.sanitize(chat, template) for chat in chats]
        conversation = cleaned if batched else cleaned[0]
        for name in ("tools", "documents"):
            if kwargs.get(name) and name not in template:
                raise ValueError(f"{name} were given, but this chat template does not render them")
        moved = {key: kwargs.pop(key) for key in list(kwargs) if key in _CALL_KWARGS}
        processor_kwargs = {"add_special_tokens": False, **moved, **(processor_kwargs or {})}
        try:
            out = super().apply_chat_template(
                conversation, template, tokenize=tokenize, processor_kwargs=processor_kwargs, **kwargs
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template rejects this conversation: {error}") from error
        if self.question_context and isinstance(out, BatchFeature) and "pixel_values" in out:
            out.update(BatchFeature(self.question_inputs(chats, template), tensor_type=return_tensors))
        return out

    def template_text(self, chat_template: str | None = None) -> str:
        """The Jinja text of a named template of this processor, of a given text, or of the default template.

        Raises:
            ValueError: The processor has no chat template.
        """
        own = self.chat_template
        if chat_template is None:
            template = own.get("default") if isinstance(own, dict) else own
        else:
            template = own[chat_template] if isinstance(own, dict) and chat_template in own else chat_template
        if not template:
            raise ValueError(
                "this processor has no chat template. Set processor.chat_template, e.g. to "
                "florence_vl.model.chat_template.CHAT_TEMPLATES['chatml'].build(processor)"
            )
        return template

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Tokenize prompts, with one placeholder per image, and process the images.

        Args:
            images: Images of all prompts in reading order (or a list of images per prompt): PIL images, paths, URLs,
                bytes or uint8 arrays.
            text: Rendered prompt or prompts. The chat template writes the begin token, so the tokenizer adds none
                unless `add_special_tokens=True` is given: ids in inference equal those in training.
            **kwargs: Keyword arguments of transformers for text and images (`padding`, `max_length`, `return_tensors`,
                ...).

        Returns:
            `input_ids`, `attention_mask` and, with images, `pixel_values` (n, 3, H, W).

        Raises:
            ValueError: The numbers of placeholders and images differ, truncation would split an image, or a prompt is
                longer than the LLM's context.
        """
        if "add_special_tokens" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("add_special_tokens", False)
        texts = [text] if isinstance(text, str) else text
        if texts and any(isinstance(item, str) and BREAK in item for item in texts):
            out = self._call_without_breaks(images, list(texts), kwargs)
        else:
            out = super().__call__(images=images, text=text, **kwargs)
        self._check_context(out)
        return out

    def _check_context(self, out: BatchFeature) -> None:
        if self.context_length is None or "input_ids" not in out:
            return
        mask = out.get("attention_mask")
        lengths = map(len, out["input_ids"]) if mask is None else (int(sum(row)) for row in mask)
        for index, length in enumerate(lengths):
            if length > self.context_length:
                images = sum(int(token) == self.image_token_id for token in out["input_ids"][index])
                raise ValueError(
                    f"prompt {index} has {length} tokens ({images} of images), but the context of this model is "
                    f"{self.context_length} tokens: shorten it, or give fewer images"
                )

    def _call_without_breaks(self, images: Any, texts: list[str], kwargs: dict[str, Any]) -> BatchFeature:
        # The tokenizer sees the breaks, so padding, truncation and conversion to tensors happen after they are dropped.
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        options = merged["text_kwargs"]
        names = ("padding", "truncation", "max_length", "pad_to_multiple_of")
        rules = {name: options[name] for name in names if name in options}
        padding, truncation, length, _ = self.tokenizer._get_padding_truncation_strategies(**rules)
        return_tensors = options.get("return_tensors")
        now = {"padding": False, "truncation": False, "return_tensors": None, "return_offsets_mapping": True}
        now["return_text_replacement_offsets"] = True
        later = {*now, "max_length", "padding_side", "pad_to_multiple_of"}
        passed = {key: value for key, value in kwargs.items() if key not in later}
        if "text_kwargs" in passed:
            passed["text_kwargs"] = {k: v for k, v in passed["text_kwargs"].items() if k not in later}
        if "common_kwargs" in passed:
            passed["common_kwargs"] = {k: v for k, v in passed["common_kwargs"].items() if k not in later}
        out = super().__call__(images=images, text=texts, **passed, **now)

        columns = [key for key in _TOKEN_COLUMNS if key in out]
        limit = None if truncation == "do_not_truncate" else length
        for row, original in enumerate(texts):
            positions = _shifted(_break_positions(original), out["text_replacement_offsets"][row])
            keep = _without_breaks(out["offset_mapping"][row], positions)
            if limit is not None and len(keep) > limit:
                cut = keep[:limit] if self.tokenizer.truncation_side == "right" else keep[-limit:]
                lost = set(keep) - set(cut)
                if any(out["input_ids"][row][index] == self.image_token_id for index in lost):
                    raise ValueError(
                        f"max_length={limit} would split an image: prompt {row} has {len(keep)} tokens. Raise "
                        "max_length or give fewer images"
                    )
                keep = cut
            for key in columns:
                values = out[key][row]
                out[key][row] = [values[index] for index in keep]
        if padding != "do_not_pad":
            least = length if padding == "max_length" else 0
            self._pad(out, columns, least, options.get("pad_to_multiple_of"), options.get("padding_side"))
        if "length" in out:
            out["length"] = [len(ids) for ids in out["input_ids"]]
        if not (options.get("return_offsets_mapping") or kwargs.get("return_offsets_mapping")):
            out.pop("offset_mapping")
        if not (options.get("return_text_replacement_offsets") or kwargs.get("return_text_replacement_offsets")):
            out.pop("text_replacement_offsets")
        return BatchFeature(
            dict(out), tensor_type=return_tensors, skip_tensor_conversion=["text_replacement_offsets", "offset_mapping"]
        )

    def _pad(self, out: BatchFeature, columns: list[str], least: int, multiple: int | None, side: str | None) -> None:
        length = max(least, *(len(ids) for ids in out["input_ids"]))
        length = math.ceil(length / (multiple or 1)) * (multiple or 1)
        fill = {"input_ids": self.tokenizer.pad_token_id, "offset_mapping": (0, 0), "special_tokens_mask": 1}
        fill["token_type_ids"] = self.tokenizer.pad_token_type_id
        right = (side or self.tokenizer.padding_side) == "right"
        for key in columns:
            rows = []
            for values in out[key]:
                padding = [fill.get(key, 0)] * (length - len(values))
                rows.append(list(values) + padding if right else padding + list(values))
            out[key] = rows


# Outputs with one entry per token.
_TOKEN_COLUMNS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "special_tokens_mask",
    "mm_token_type_ids",
    "offset_mapping",
)
_CALL_KWARGS = frozenset({*TextKwargs.__annotations__, *FlorenceVLImagesKwargs.__annotations__}) - {"return_tensors"}


def _count_images(images: Any) -> int:
    if images is None:
        return 0
    if isinstance(images, (list, tuple)):
        return sum(_count_images(item) for item in images)
    if getattr(images, "ndim", 3) == 4:
        return len(images)
    return 1


def _break_tokens(text: str, pattern: re.Pattern[str]) -> str:
    text = text.replace(BREAK, "")
    while match := pattern.search(text):
        cut = match.start() + 1
        text = text[:cut] + BREAK + text[cut:]
    return text


def _break_positions(text: str) -> set[int]:
    return {match.start() for match in re.finditer(BREAK, text)}


def _shifted(positions: set[int], replacements: Sequence[Mapping[str, Any]]) -> set[int]:
    """Positions in the text after placeholder expansion."""
    shifted = set()
    for position in positions:
        gain = [r["new_span"][1] - r["span"][1] for r in replacements if r["span"][1] <= position]
        shifted.add(position + (gain[-1] if gain else 0))
    return shifted


def _without_breaks(offsets: Sequence[tuple[int, int]], positions: set[int]) -> list[int]:
    keep = []
    for index, (start, end) in enumerate(offsets):
        covered = sum(position in positions for position in range(start, end))
        if not covered:
            keep.append(index)
        elif covered != end - start:
            raise ValueError("this tokenizer merges the private-use character U+10FFFD with text; cannot sanitize")
    return keep
