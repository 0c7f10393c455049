"""The engine: one thread answers all requests, with continuous batching and cached image features and prefixes.

A request passes through `prepare` (caller's thread: tokens, hashes of images, their pixels), the queue, the prefill of
tokens that are not cached, and one decoding step per token together with the other rows; events go to the caller. In
float32 the answer equals that of transformers' `generate`, for any concurrent requests and cache state.
Shape letters: B rows, S new tokens of a prefill, L columns, H width of the LLM, X vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from florence_vl.model.processing import pad_questions
from florence_vl.model.repetition import RepetitionStop
from florence_vl.model.resolution import resolution_settings
from florence_vl.serve.answer import Answer, Event
from florence_vl.serve.cache import ByteLRU, PrefixCache, RowBatch, Segment, common_length
from florence_vl.serve.prompt import ContextTooLong, PreparedImage, Prompt, PromptBuilder
from florence_vl.serve.sampling import GenerationOptions, Grammars, Sampler, TextStream, stop_ids

if TYPE_CHECKING:
    from PIL import Image

    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor
    from florence_vl.model.router import Routing

logger = logging.getLogger(__name__)

_REPETITION = RepetitionStop()
SHARED_TOKENS = 16  # a request waits for another one's prefill if it shares this number of tokens with it


class QueueFull(RuntimeError):
    """The queue is full."""


class EngineClosed(RuntimeError):
    """The engine is closed."""

    def __init__(self) -> None:
        super().__init__("the engine is closed")


class OutOfMemory(RuntimeError):
    """The device has too little memory for this request; the engine continues."""

    def __init__(self) -> None:
        super().__init__("no memory for this request: try again later, or with fewer images")


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        max_batch: Maximum number of rows that are answered at the same time.
        max_queue: Maximum number of waiting requests.
        feature_bytes: Limit of the cache of image features.
        prefix_bytes: Limit of the cache of prefixes' keys and values.
        max_prefill: Maximum number of new tokens in one prefill (a longer prompt is processed alone).
    """

    max_batch: int = 16
    max_queue: int = 64
    feature_bytes: int = 1 << 28
    prefix_bytes: int = 1 << 30
    max_prefill: int = 8192

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_prefill"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_queue", "feature_bytes", "prefix_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")


@dataclass
class EngineStats:
    """Counters since the start."""

    requests: int = field(default=0, metadata={"help": "Requests taken."})
    prompt_tokens: int = field(default=0, metadata={"help": "Tokens of prompts."})
    cached_tokens: int = field(default=0, metadata={"help": "Prompt tokens that were cached."})
    generated_tokens: int = field(default=0, metadata={"help": "Tokens of answers."})
    images_encoded: int = field(default=0, metadata={"help": "Images that went through the vision tower."})
    feature_hits: int = field(default=0, metadata={"help": "Images with cached features."})
    steps: int = field(default=0, metadata={"help": "Steps of the engine."})
    out_of_memory: int = field(default=0, metadata={"help": "Number of out-of-memory errors."})
    cancelled: int = field(default=0, metadata={"help": "Answers that clients cancelled."})


@dataclass
class _Running:
    batch: RowBatch
    rows: list[Answer] = field(default_factory=list)


class Engine:
    """Answers conversations about images, many at a time, in its own thread.

    Args:
        model: A model in eval mode, on its device. Nothing else may run it meanwhile, except functions passed to
            `call`.
        processor: The model's processor.
        config: Limits.
        adapters: Names of LoRA adapters that `model.load_adapter` loaded.
        routing: Chooses the view of each image by the question beside it, with the base model's weights.

    Raises:
        ValueError: The LLM has other layers than attention layers, no end token, or no context length.
    """

    def __init__(
        self,
        model: FlorenceVLForConditionalGeneration,
        processor: FlorenceVLProcessor,
        config: EngineConfig | None = None,
        adapters: Sequence[str] = (),
        routing: Routing | None = None,
    ) -> None:
        self.model, self.processor, self.routing = model, processor, routing
        self.config = config or EngineConfig()
        self.adapters = tuple(adapters)
        text: Any = model.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())
        if not kinds <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"the engine needs an LLM of attention layers; this one has {', '.join(sorted(kinds))}")
        context = model.config.context_length
        if context is None:
            raise ValueError(
                "the LLM's config has no max_position_embeddings, so the engine does not know how long an answer may "
                "be: set model.config.text_config.max_position_embeddings"
            )
        self.context: int = context
        self.stats = EngineStats()
        self.features = ByteLRU(self.config.feature_bytes)
        self.prefixes = PrefixCache(self.config.prefix_bytes)
        self._num_layers: int = text.num_hidden_layers
        self.ends = set(stop_ids(model, processor.tokenizer))
        self._suppressed = [*(model.generation_config.suppress_tokens or [])]
        self._grammars = Grammars(processor.tokenizer, text.vocab_size)
        question = model.model.fusion.uses_context
        cached = self.features.peek
        route = None if routing is None else self._route
        self._prompts = PromptBuilder(processor, self._settings, self.context, question, self.adapters, cached, route)
        self._wake = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: dict[str | None, _Running] = {}
        self._adapter: str | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ callers' threads

    def _settings(self) -> list[Any]:
        """See `PromptBuilder`: `set_resolution` may change them while the engine exists."""
        return [self.processor.image_processor.to_dict(), resolution_settings(self.model, self.processor)]

    def _route(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        routing = self.routing
        assert routing is not None
        return self.call(lambda: routing.views(self.model, self.processor, images, questions)).result()

    def prepare(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image] = (),
        adapter: str | None = None,
    ) -> Prompt:
        """Render and tokenize a conversation, hash its images and process those without cached features.

        Args:
            messages: Messages whose `content` is text, or a list of text and image parts.
            images: Decoded RGB images, one per image part in reading order.
            adapter: Name of a LoRA adapter; None for the base model.

        Raises:
            ContextTooLong: The prompt leaves no room for an answer.
            ValueError: Messages are malformed, the numbers of image parts and images differ, or the adapter is unknown.
        """
        return self._prompts(messages, images, adapter)

    def compile_schema(self, json_schema: str) -> None:
        """Compile a JSON schema, which takes time the first time; `submit` then finds it compiled.

        Raises:
            ValueError: The schema is invalid.
        """
        self._grammars.matcher(json_schema)

    def submit(self, prompt: Prompt, options: GenerationOptions, sink: Callable[[Event], None] | None = None) -> Answer:
        """Queue a request.

        Args:
            prompt: From `prepare`.
            options: Generation options.
            sink: Called on the engine's thread with each event, instead of the answer's own queue; must not block.

        Raises:
            QueueFull: `max_queue` requests are already waiting.
            ContextTooLong: The prompt and the longest answer exceed the context.
            ValueError: The JSON schema is invalid.
            EngineClosed: It was closed.
        """
        room = self.context - len(prompt.ids)
        if options.max_new_tokens is not None and options.max_new_tokens > room:
            raise ContextTooLong(
                f"the prompt has {len(prompt.ids)} tokens and the answer may have {options.max_new_tokens}, but the "
                f"context of this model is {self.context} tokens: at most {room} are left for the answer"
            )
        options = dataclasses.replace(options, max_new_tokens=options.max_new_tokens or room)
        matcher = self._grammars.matcher(options.json_schema) if options.json_schema is not None else None
        answer = Answer(prompt, options, TextStream(self.processor.tokenizer, options.stop), sink)
        answer._sampler = Sampler(options, self._suppressed, matcher, self.model.device)
        with self._wake:
            if self._closing:
                raise EngineClosed
            self.check_room(1)
            self._waiting.append(answer)
            self.stats.requests += 1
            self._start()
        return answer

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function on the engine's thread between two steps, one per step, with the base model's weights.

        The result is the function's, or its error; `OutOfMemory` if the device has too little memory for it. A future
        that is cancelled before its turn is not run.

        Raises:
            EngineClosed: It was closed.
        """
        future: Future[Any] = Future()
        with self._wake:
            if self._closing:
                raise EngineClosed
            self._calls.append((function, future))
            self._start()
        return future

    @property
    def capacity(self) -> int:
        """Maximum number of running and waiting requests."""
        return self.config.max_batch + self.config.max_queue

    @property
    def load(self) -> int:
        """Number of running and waiting requests."""
        return len(self._waiting) + self.running

    def check_room(self, more: int) -> None:
        """Check that the engine can take so many more requests.

        Raises:
            QueueFull: It cannot.
        """
        if self.load + more > self.capacity:
            raise QueueFull(f"{self.load} requests are running or waiting; the limit is {self.capacity}")

    @property
    def running(self) -> int:
        """Number of rows that are being answered."""
        return sum(len(running.rows) for running in list(self._running.values()))

    def close(self) -> None:
        """End all answers with an error, and stop the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="florence-vl-engine", daemon=True)
            self._thread.start()
        self._wake.notify()

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closing or self._waiting or self._calls or self._running)
                    if self._closing:
                        break
                try:
                    self.step()
                except Exception as error:  # an engine failure must not leave callers waiting
                    logger.exception("the engine's step failed")
                    self._fail_all(error)
        self._fail_all(EngineClosed())

    def step(self) -> None:
        """Make the first waiting call, admit waiting requests, then generate one token for every row."""
        if self._calls:
            self._make(*self._calls.popleft())
        self._drop_cancelled()
        self._admit()
        for adapter in list(self._running):
            self._use(adapter)
            self._decode(self._running[adapter])
            if not self._running[adapter].rows:
                del self._running[adapter]
        self.stats.steps += 1

    def _make(self, function: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._use(None)
            future.set_result(function())
        except Exception as error:
            if is_out_of_memory(error):
                self._forget_caches()
            future.set_exception(OutOfMemory() if is_out_of_memory(error) else error)

    def _fail_all(self, error: Exception) -> None:
        with self._wake:
            waiting, running, calls = list(self._waiting), list(self._running.values()), list(self._calls)
            self._waiting.clear()
            self._running.clear()
            self._calls.clear()
        for answer in [*waiting, *(row for batch in running for row in batch.rows)]:
            answer._end("error", error)
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        for answer in [answer for answer in list(self._waiting) if answer._cancelled]:  # others append to it
            self._waiting.remove(answer)
            self._finish(answer, "cancelled")
        for running in self._running.values():
            for index in reversed(range(len(running.rows))):
                if running.rows[index]._cancelled:
                    self._remove(running, index, "cancelled")
        for adapter in [adapter for adapter, running in self._running.items() if not running.rows]:
            del self._running[adapter]

    def _finish(self, answer: Answer, reason: str, error: Exception | None = None) -> None:
        self.stats.cancelled += reason == "cancelled"
        answer._end(reason, error)

    def _remove(self, running: _Running, index: int, reason: str, error: Exception | None = None) -> None:
        answer = running.rows[index]
        if error is None:
            self._keep(running.batch, index, answer)
        running.batch.remove(index)
        last = running.rows.pop()
        if index < len(running.rows):
            running.rows[index] = last
        self._finish(answer, reason, error)

    def _keep(self, batch: RowBatch, index: int, answer: Answer) -> None:
        start, end = batch.spans[index]
        tokens = [*answer.prompt.tokens, *answer.ids][: end - start]
        try:
            self.prefixes.insert(tokens, lambda a, b: batch.segment(index, a, b), answer.prompt.adapter)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._forget_caches()  # which no answer needs

    def _use(self, adapter: str | None) -> None:
        if not self.adapters or (adapter == self._adapter and adapter is not None):
            return
        if adapter is None:
            self.model.disable_adapters()
        else:
            self.model.enable_adapters()
            self.model.set_adapter(adapter)
        self._adapter = adapter

    # ------------------------------------------------------------ prefill

    def _admit(self) -> None:
        fresh: list[tuple[RowBatch, int, Answer]] = []
        while self._waiting and self.running + len(fresh) < self.config.max_batch:
            group = self._choose(self.config.max_batch - self.running - len(fresh))
            fresh += self._prefill_or_fail(group)
        for adapter in {answer.prompt.adapter for _, _, answer in fresh}:
            rows = [(batch, row, answer) for batch, row, answer in fresh if answer.prompt.adapter == adapter]
            running = self._running.get(adapter)
            sources = [(running.batch, i) for i in range(len(running.rows))] if running else []
            try:
                batch = RowBatch.gather([*sources, *((batch, row) for batch, row, _ in rows)])
            except Exception as error:
                if is_out_of_memory(error):
                    self._forget_caches()
                for _, _, answer in rows:
                    self._finish(answer, "error", _failure(error))
                continue
            kept = running.rows if running else []
            self._running[adapter] = _Running(batch, [*kept, *(answer for _, _, answer in rows)])

    def _choose(self, free: int) -> list[tuple[Answer, int]]:
        """Requests for the next prefill and the length of their cached prefixes: the first waiting one, and those of
        similar length that do not share what it is about to compute."""
        chosen: list[tuple[Answer, int]] = []
        total = 0
        for answer in list(self._waiting):
            tokens = answer.prompt.tokens
            known = self._match(answer)[0]
            new = len(tokens) - known
            if chosen:
                first, first_known = chosen[0]
                size = len(first.prompt.tokens) - first_known
                if answer.prompt.adapter != first.prompt.adapter or not size / 2 <= new <= size * 2:
                    continue
                if total + max(new, size) > self.config.max_prefill:
                    continue
                if self.config.prefix_bytes and any(
                    common_length(tokens, other.prompt.tokens) >= known + SHARED_TOKENS for other, _ in chosen
                ):
                    continue
            chosen.append((answer, known))
            total += new
            if len(chosen) == free:
                break
        for answer, _ in chosen:
            self._waiting.remove(answer)
        return chosen

    def _prefill_or_fail(self, group: list[tuple[Answer, int]]) -> list[tuple[RowBatch, int, Answer]]:
        answers = [answer for answer, _ in group]
        try:
            return self._prefill(answers)
        except Exception as error:
            if not is_out_of_memory(error):
                for answer in answers:
                    self._finish(answer, "error", _failure(error))
                return []
        self._forget_caches()
        done: list[tuple[RowBatch, int, Answer]] = []
        for answer in answers:  # one by one, with the caches' memory freed
            try:
                done += self._prefill([answer])
            except Exception as error:
                self._finish(answer, "error", _failure(error))
        return done

    def _prefill(self, answers: list[Answer]) -> list[tuple[RowBatch, int, Answer]]:
        self._use(answers[0].prompt.adapter)
        matches = [self._match(answer) for answer in answers]
        known = [length for length, _ in matches]
        features = self._encode(answers, known)
        batch = RowBatch.of_prefixes([parts for _, parts in matches], self._num_layers)
        past = batch.length
        tails = [answer.prompt.ids[n:] for answer, n in zip(answers, known, strict=True)]
        longest = max(map(len, tails))
        device = self.model.device
        ids_BS = torch.zeros(len(tails), longest, dtype=torch.long)
        mask_BL = torch.zeros(len(tails), past + longest, dtype=torch.long)
        positions_BS = torch.zeros_like(ids_BS)
        for row, (tail, n) in enumerate(zip(tails, known, strict=True)):
            ids_BS[row, : len(tail)] = torch.tensor(tail)
            mask_BL[row, past - n : past + len(tail)] = 1
            positions_BS[row] = torch.arange(n, n + longest).clamp(max=self.context - 1)
        embeds_BSH = self.model.get_input_embeddings()(ids_BS.to(device))
        for row, (answer, n) in enumerate(zip(answers, known, strict=True)):
            for image in answer.prompt.images:
                if image.end > n:
                    skip = max(n - image.start, 0)
                    embeds_BSH[row, image.start + skip - n : image.end - n] = features[image.key][skip:].to(
                        embeds_BSH.dtype
                    )
        last_B = torch.tensor([len(tail) - 1 for tail in tails], device=device)
        keep, index_B = torch.unique(last_B, return_inverse=True)
        output = self.model(
            inputs_embeds=embeds_BSH,
            attention_mask=mask_BL.to(device),
            position_ids=positions_BS.to(device),
            past_key_values=batch.cache(),
            use_cache=True,
            logits_to_keep=keep,
        )
        logits_BX = output.logits[torch.arange(len(tails), device=device), index_B].float()
        batch.spans = [(past - n, past + len(tail)) for n, tail in zip(known, tails, strict=True)]
        going = []
        for row, answer in enumerate(answers):
            answer.cached_tokens = known[row]
            self.stats.prompt_tokens += len(answer.prompt.ids)
            self.stats.cached_tokens += known[row]
            self._keep(batch, row, answer)
            if end := self._advance(answer, logits_BX[row]):
                self._finish(answer, *end)
            else:
                going.append((batch, row, answer))
        return going

    def _match(self, answer: Answer) -> tuple[int, list[Segment]]:
        # At least one token is computed, because its logits determine the first token of the answer.
        return self.prefixes.match(answer.prompt.tokens[:-1], answer.prompt.adapter)

    def _encode(self, answers: Sequence[Answer], known: Sequence[int]) -> dict[bytes, Tensor]:
        """Image tokens (N, H) by key, for images that are not completely in the cached prefixes."""
        found: dict[bytes, Tensor] = {}
        missing: dict[bytes, PreparedImage] = {}
        for answer, n in zip(answers, known, strict=True):
            for image in answer.prompt.images:
                if image.end <= n or image.key in found or image.key in missing:
                    continue
                cached = self.features.get(image.key)
                cached = image.features if cached is None else cached
                if cached is None:
                    missing[image.key] = image
                else:
                    found[image.key] = cached
                    self.stats.feature_hits += 1
        groups: dict[tuple[int, ...], list[PreparedImage]] = {}
        for image in missing.values():
            groups.setdefault(tuple(image.inputs["pixel_values"].shape), []).append(image)
        for images in groups.values():
            inputs = {name: torch.cat([image.inputs[name] for image in images]) for name in images[0].inputs}
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            if images[0].question is not None:
                questions = pad_questions([image.question or [] for image in images])
                inputs |= {name: torch.tensor(rows) for name, rows in questions.items()}
            moved = {name: value.to(self.model.device) for name, value in inputs.items()}
            tokens = self.model.get_image_features(**moved).pooler_output
            self.stats.images_encoded += len(images)
            for image, tokens_NH in zip(images, tokens, strict=True):
                assert len(tokens_NH) == image.end - image.start, "processor and tower count image tokens differently"
                found[image.key] = tokens_NH.clone()  # a view would keep the whole batch in memory
                self.features.put(image.key, found[image.key])
        return found

    # ------------------------------------------------------------ decode

    def _decode(self, running: _Running) -> None:
        length = running.batch.length
        while running.rows:
            try:
                logits_BX = self._forward_one(running)
                break
            except Exception as error:
                running.batch.rewind(length)
                if not is_out_of_memory(error):
                    failure = _failure(error)
                    for index in reversed(range(len(running.rows))):
                        self._remove(running, index, "error", failure)
                    return
                if self.prefixes.bytes or self.features.bytes:
                    self._forget_caches()
                else:  # the youngest row is removed
                    self.stats.out_of_memory += 1
                    self._remove(running, len(running.rows) - 1, "error", _failure(error))
        else:
            return
        running.batch.spans = [(start, length + 1) for start, _ in running.batch.spans]
        ends = [self._advance(answer, logits_X) for answer, logits_X in zip(running.rows, logits_BX, strict=True)]
        for index in reversed(range(len(ends))):
            if end := ends[index]:
                self._remove(running, index, *end)

    def _forward_one(self, running: _Running) -> Tensor:
        batch, device = running.batch, self.model.device
        starts_B1 = torch.tensor([[start] for start, _ in batch.spans], device=device)
        mask_BL = (torch.arange(batch.length + 1, device=device) >= starts_B1).long()
        output = self.model(
            input_ids=torch.tensor([[answer.ids[-1]] for answer in running.rows], device=device),
            attention_mask=mask_BL,
            position_ids=batch.length - starts_B1,
            past_key_values=batch.cache(),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _advance(self, answer: Answer, logits_X: Tensor) -> tuple[str, Exception | None] | None:
        """Choose the next token of a row and send it to its caller; why the answer ends, and the error, if it does."""
        try:
            reason = self._choose_token(answer, logits_X)
        except Exception as error:  # ends this answer only; those beside it go on
            return "error", _failure(error)
        return None if reason is None else (reason, None)

    def _choose_token(self, answer: Answer, logits_X: Tensor) -> str | None:
        sampler = answer._sampler
        assert sampler is not None
        token, logprob = sampler(logits_X, [*answer.prompt.ids, *answer.ids] if sampler.reads_ids else ())
        answer.ids.append(token)
        self.stats.generated_tokens += 1
        if token in self.ends:
            return "stop"
        if logprob is not None:
            answer._held.append(logprob)
        answer._emit(answer._stream.push(token))
        if answer._stream.stopped or sampler.ended:
            return "stop"
        if answer.options.stop_repetition and bool(_REPETITION.repeating(torch.tensor([answer.ids]))):
            return "stop"
        return "length" if len(answer.ids) >= (answer.options.max_new_tokens or 0) else None

    def _forget_caches(self) -> None:
        self.stats.out_of_memory += 1
        self.prefixes.clear()
        self.features.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _failure(error: Exception) -> Exception:
    """What the caller of a failed answer is told; errors other than too little memory are logged."""
    if is_out_of_memory(error):
        return OutOfMemory()
    logger.error("an answer failed", exc_info=error)
    return error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception reports too little memory, on any device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("can't allocate memory", "out of memory", "not enough memory", "_ALLOC_FAILED")
    )
