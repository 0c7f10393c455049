"""Conversations about images: history, images encoded once, answers streamed. The terminal and servers stand on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from florence_vl.data.records import ImageSource, image_part, normalise_messages, text_part
from florence_vl.model.features import encode_images
from florence_vl.model.modeling import FlorenceVLForConditionalGeneration, FlorenceVLImageFeatures
from florence_vl.model.pictures import open_image
from florence_vl.model.repetition import RepetitionStop

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.model.processing import FlorenceVLProcessor

POLL_SECONDS = 0.2  # how often a waiting reader looks whether generation died


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is chosen.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 takes the likeliest token each time; above 0 samples.
        top_p: Sample from the likeliest tokens that hold this share of the probability; None for all.
        top_k: Sample from that many likeliest tokens; None for all.
        repetition_penalty: Above 1 makes tokens that were said less likely (arXiv 1909.05858).
        seed: Makes sampling repeatable; None leaves torch's generator as it is.

    Raises:
        ValueError: A value is out of range, or a sampling setting is given without a temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) to 10")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        if self.temperature == 0:
            for name in ("top_p", "top_k", "seed"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for sampling: give a temperature above 0 too, for example 0.7")

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of transformers' `generate`."""
        kwargs: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature == 0:
            return kwargs | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        sampling = {"temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": self.top_k or 0}
        return kwargs | {"do_sample": True, **sampling}


class _Stopped(StoppingCriteria):
    """Ends generation when the reader has gone."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_answer(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Image.Image],
    options: GenerationOptions,
    image_tokens: Sequence[torch.Tensor] | None = None,
) -> Iterator[str]:
    """Answer the last message of a conversation, piece by piece.

    Closing the iterator ends the generation.

    Args:
        model: In eval mode.
        processor: The model's.
        messages: As in `florence_vl.data.records.Record`, ending with the user's.
        images: One for each image part, in reading order.
        options: How the answer is chosen.
        image_tokens: `encode_images` of the same images, when they are at hand.

    Yields:
        Pieces of text that joined are the answer.

    Raises:
        ValueError: Messages are malformed, or images and image parts differ in number.
    """
    messages = normalise_messages(messages)
    parts = sum(part["type"] == "image" for message in messages for part in message["content"])
    if parts != len(images):
        raise ValueError(f"the conversation has {parts} image parts but {len(images)} images were given")
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[list(images)] if images else None, return_tensors="pt").to(model.device)
    inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    if images and image_tokens is not None:
        del inputs["pixel_values"]
        inputs["mm_encoder_outputs"] = {"image": FlorenceVLImageFeatures(pooler_output=list(image_tokens))}
    elif images:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if options.seed is not None:
        torch.manual_seed(options.seed)

    streamer = TextIteratorStreamer(
        processor.tokenizer, skip_prompt=True, timeout=POLL_SECONDS, skip_special_tokens=True
    )
    gone = threading.Event()
    failure: list[BaseException] = []

    def generate() -> None:
        try:
            stopping = StoppingCriteriaList([_Stopped(gone), RepetitionStop()])
            model.generate(**inputs, **options.kwargs(), streamer=streamer, stopping_criteria=stopping)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        while True:
            try:
                piece = next(streamer)
            except Empty:  # nothing yet
                continue
            except StopIteration:
                break
            if piece:
                yield piece
    finally:
        gone.set()
        thread.join()
    if failure:
        raise failure[0]


@dataclass
class ChatSession:
    """A conversation with a model.

    Example:
        >>> session = ChatSession(model, processor)
        >>> session.show("photo.jpg")
        >>> "".join(session.stream("What is shown?"))
        'A cat on a sofa.'

    Attributes:
        model: In eval mode.
        processor: The model's.
        options: How answers are chosen.
        system: A system message that every conversation starts with.
        messages: The turns so far.
        images: The images of these turns, in order.
    """

    model: FlorenceVLForConditionalGeneration
    processor: FlorenceVLProcessor
    options: GenerationOptions = field(default_factory=GenerationOptions)
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    _tokens: list[torch.Tensor] = field(default_factory=list, repr=False)
    _pending: list[Image.Image] = field(default_factory=list, repr=False)

    def show(self, source: ImageSource) -> tuple[int, int]:
        """Put an image before the next question.

        Returns:
            Width and height in pixels.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It is not a readable image.
        """
        image = open_image(source)
        self._pending.append(image)
        return image.size

    def reset(self, keep_images: bool = False) -> None:
        """Forget the conversation; with `keep_images` its images stand before the next question again."""
        self._pending = [*self.images, *self._pending] if keep_images else []
        if not keep_images:
            self._tokens.clear()
        self.messages, self.images = [], []

    def stream(self, question: str) -> Iterator[str]:
        """Ask, and get the answer piece by piece; it joins the conversation when it ends.

        An answer that the caller breaks off stays as far as it got. After an error, or a break before the first
        piece, the question is taken back.

        Raises:
            ValueError: The question is empty.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        asked = list(self._pending)
        content = [*(image_part() for _ in asked), text_part(question)]
        messages = [*self.messages, {"role": "user", "content": content}]
        images = [*self.images, *asked]
        if len(self._tokens) < len(images):
            self._tokens += encode_images(self.model, self.processor, images[len(self._tokens) :])
        opening = [{"role": "system", "content": [text_part(self.system)]}] if self.system else []
        pieces: list[str] = []
        keep = False
        try:
            for piece in stream_answer(
                self.model, self.processor, [*opening, *messages], images, self.options, self._tokens
            ):
                pieces.append(piece)
                yield piece
            keep = True
        except (GeneratorExit, KeyboardInterrupt):
            keep = bool(pieces)
            raise
        finally:
            if keep:
                answer = {"role": "assistant", "content": [text_part("".join(pieces).strip())]}
                self.messages, self.images = [*messages, answer], images
                self._pending = self._pending[len(asked) :]

    def ask(self, question: str) -> str:
        """`stream`, joined."""
        return "".join(self.stream(question)).strip()
