"""Conversations to inputs of the engine: tokens, the positions of images in them, and the images' keys."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.model.processing import FlorenceVLProcessor


Route = Callable[["Sequence[Image.Image]", Sequence[str]], Sequence[str]]
_MAX_VIEWS = 4096  # choices of the router that are kept


class ContextTooLong(ValueError):
    """The prompt, or the prompt and the longest answer, exceed the LLM's context."""


@dataclass
class PreparedImage:
    """A picture of a prompt: its key, the position of its tokens, and its cached features or the tower's inputs.

    The picture itself, which may be large, is not kept.

    Attributes:
        key: Hash of the decoded pixels, the settings of processor and tower, the adapter, the view, and the question
            where the fusion uses it: equal keys have equal features.
        features: (N, H) if they were cached when the prompt was built.
        inputs: Of the tower; empty if there are features.
        start: First position in the prompt.
        end: One past the last.
    """

    key: bytes
    question: list[int] | None
    features: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    start: int = 0
    end: int = 0


@dataclass
class Prompt:
    """A rendered and tokenized conversation.

    Attributes:
        ids: Token ids with one placeholder per image token.
        tokens: Tokens for the prefix cache: the ids, and the image's key at placeholders.
        images: Images in reading order.
        adapter: Name of the LoRA adapter; None for the base model.
    """

    ids: list[int]
    tokens: list[Hashable]
    images: list[PreparedImage]
    adapter: str | None = None

    @property
    def image_tokens(self) -> int:
        return sum(image.end - image.start for image in self.images)


class PromptBuilder:
    """Renders and tokenizes conversations; thread-safe.

    Args:
        processor: The model's processor.
        settings: What decides about an image's features beside its pixels, as JSON values; it may change.
        context: Context length of the LLM in tokens.
        uses_question: Whether the model's fusion depends on the question.
        adapters: Names of the LoRA adapters.
        cached: The cached features of an image's key, with which the image need not be processed.
        route: The view of each image for the question beside it; None takes the processor's own.
    """

    def __init__(
        self,
        processor: FlorenceVLProcessor,
        settings: Callable[[], Any],
        context: int,
        uses_question: bool,
        adapters: Sequence[str],
        cached: Callable[[bytes], Tensor | None],
        route: Route | None = None,
    ) -> None:
        self.processor, self.settings = processor, settings
        self.context, self.uses_question = context, uses_question
        self.adapters, self.cached, self.route = adapters, cached, route
        self._views: OrderedDict[bytes, str] = OrderedDict()

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image], adapter: str | None
    ) -> Prompt:
        """See `Engine.prepare`."""
        if adapter is not None and adapter not in self.adapters:
            raise ValueError(f"no adapter {adapter!r}; loaded: {', '.join(self.adapters) or 'none'}")
        processor = self.processor
        text = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        ids, _ = processor.tokenize(text)
        parts = ids.count(processor.image_token_id)
        if parts != len(images):
            raise ValueError(f"the conversation has {parts} image parts but {len(images)} images were given")
        questions: list[list[int] | None] = [None] * len(images)
        if images and self.uses_question:
            questions = [*processor.question_rows([messages])]
        settings = json.dumps(self.settings(), sort_keys=True, default=str).encode() if images else b""
        digests = [_digest(image, settings) for image in images]
        views: Sequence[str | None] = [None] * len(images)
        if self.route is not None:
            views = self._choose_views(self.route, images, digests, processor.question_texts([messages]))
        prepared = [
            PreparedImage(_key(digest, adapter, question, view), question)
            for digest, question, view in zip(digests, questions, views, strict=True)
        ]
        prompt = Prompt([], [], prepared, adapter)
        following = iter(zip(prepared, images, views, strict=True))
        for token in ids:
            if token != processor.image_token_id:
                prompt.ids.append(token)
                prompt.tokens.append(token)
                continue
            image, picture, view = next(following)
            count = processor.image_tokens(picture.height, picture.width, view=view)
            image.start, image.end = len(prompt.ids), len(prompt.ids) + count
            prompt.ids += [token] * count
            prompt.tokens += [image.key] * count
        if len(prompt.ids) >= self.context:
            raise ContextTooLong(
                f"the prompt has {len(prompt.ids)} tokens ({prompt.image_tokens} of images), but the context of this "
                f"model is {self.context} tokens: shorten it, or start a new conversation"
            )
        for image, picture, view in zip(prepared, images, views, strict=True):
            image.features = self.cached(image.key)
            if image.features is None:
                image.inputs = processor.image_processor([picture], view=view, return_tensors="pt")
        return prompt

    def _choose_views(
        self, route: Route, images: Sequence[Image.Image], digests: Sequence[bytes], questions: Sequence[str]
    ) -> list[str]:
        keys = [_key(digest, question) for digest, question in zip(digests, questions, strict=True)]
        known = {key: view for key in keys if (view := self._views.get(key)) is not None}
        missing = {key: i for i, key in enumerate(keys) if key not in known}
        if missing:
            found = route([images[i] for i in missing.values()], [questions[i] for i in missing.values()])
            fresh = dict(zip(missing, found, strict=True))
            known |= fresh
            self._views = OrderedDict([*self._views.items(), *fresh.items()][-_MAX_VIEWS:])  # other threads read it
        return [known[key] for key in keys]


def _digest(image: Image.Image, settings: bytes) -> bytes:
    """Hash of the decoded pixels and of the settings with which they are encoded."""
    digest = hashlib.sha256(settings + f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.digest()


def _key(digest: bytes, *settings: object) -> bytes:
    """Key of an image with what else decides about its features, or about its view."""
    return hashlib.sha256(digest + repr(settings).encode()).digest()
