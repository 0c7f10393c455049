"""Conversations about images with streamed answers, as a client of the engine."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from florence_vl.data.records import ImageSource, image_part, text_part
from florence_vl.model.pictures import open_image
from florence_vl.serve.engine import Engine, EngineConfig
from florence_vl.serve.sampling import GenerationOptions

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor
    from florence_vl.model.router import Routing

__all__ = ["ChatSession", "GenerationOptions"]


@dataclass(eq=False)
class ChatSession:
    """A conversation with a model.

    Each turn computes only what is new: images are encoded once, and earlier turns keep their keys and values. An
    answer that only repeats itself is stopped.

    Example:
        >>> session = ChatSession(model, processor)
        >>> session.show("photo.jpg")
        >>> "".join(session.stream("What is shown?"))
        'A cat on a sofa.'

    Attributes:
        model: A model in eval mode.
        processor: Its processor.
        options: Generation options. The longest answer is limited by the rest of the context.
        system: A system message at the start of every conversation.
        messages: The turns so far.
        images: The images of these turns, in order.
        cached_tokens: Tokens of the last prompt that were not computed again.
        routing: Chooses the view of each image by the question beside it.
    """

    model: FlorenceVLForConditionalGeneration
    processor: FlorenceVLProcessor
    options: GenerationOptions = field(default_factory=GenerationOptions)
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    cached_tokens: int = 0
    routing: Routing | None = None
    _pending: list[Image.Image] = field(default_factory=list, repr=False)
    _engine: Engine | None = field(default=None, repr=False)

    def show(self, source: ImageSource) -> tuple[int, int]:
        """Add an image before the next question.

        Returns:
            Width and height in pixels.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not a readable image.
        """
        image = open_image(source)
        self._pending.append(image)
        return image.size

    def reset(self, keep_images: bool = False) -> None:
        """Clear the conversation; with `keep_images` its images are added before the next question again."""
        self._pending = [*self.images, *self._pending] if keep_images else []
        self.messages, self.images = [], []

    def stream(self, question: str) -> Iterator[str]:
        """Ask a question and stream the answer, which is added to the conversation at its end.

        If the caller interrupts an answer, its received part is kept. After an error, or an interruption before the
        first piece, the question is removed.

        Raises:
            ValueError: The question is empty, or the conversation is longer than the model's context.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        asked = list(self._pending)
        content = [*(image_part() for _ in asked), text_part(question)]
        messages = [*self.messages, {"role": "user", "content": content}]
        images = [*self.images, *asked]
        opening = [{"role": "system", "content": [text_part(self.system)]}] if self.system else []
        engine = self._open()
        prompt = engine.prepare([*opening, *messages], images)
        room = engine.context - len(prompt.ids)
        longest = min(self.options.max_new_tokens or room, room)
        answer = engine.submit(prompt, dataclasses.replace(self.options, max_new_tokens=longest, stop_repetition=True))
        pieces: list[str] = []
        keep = False
        try:
            for piece in answer:
                pieces.append(piece)
                yield piece
            keep = True
        except (GeneratorExit, KeyboardInterrupt):
            keep = bool(pieces)
            raise
        finally:
            answer.cancel()
            self.cached_tokens = answer.cached_tokens
            if keep:
                said = {"role": "assistant", "content": [text_part("".join(pieces).strip())]}
                self.messages, self.images = [*messages, said], images
                self._pending = self._pending[len(asked) :]

    def ask(self, question: str) -> str:
        """`stream`, joined."""
        return "".join(self.stream(question)).strip()

    def _open(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(self.model, self.processor, EngineConfig(max_batch=1), routing=self.routing)
            weakref.finalize(self, self._engine.close)
        return self._engine
