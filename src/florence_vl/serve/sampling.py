"""Sampling of an answer: settings, the next token, text from tokens, stop strings, grammars.

Shape letter: X vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SCHEMAS = 32  # compiled JSON schemas that are kept
_LEAST_TEMPERATURE = 1e-5  # logits divided by less overflow


@dataclass(frozen=True)
class GenerationOptions:
    """Settings of an answer.

    Attributes:
        max_new_tokens: Maximum number of tokens; None for the rest of the context.
        temperature: 0 is greedy, regardless of `top_p`, `top_k` and `seed`; above 0 samples. Below 1e-5, where only the
            most likely token has a probability, is greedy too.
        top_p: Sample from the most likely tokens with this cumulative probability; None for all.
        top_k: Sample from this number of most likely tokens; None for all.
        repetition_penalty: Above 1 makes repeated tokens less likely (arXiv 1909.05858); 0.01 to 100.
        seed: Makes sampling reproducible, regardless of concurrent requests; None draws one.
        stop: Texts that end the answer; the answer does not contain them.
        logprobs: Report each token's log-probability, and those of this number of most likely tokens; None disables it.
        stop_repetition: End an answer that repeats a block of tokens.
        json_schema: The answer is a JSON value with this schema (JSON text); needs llguidance.

    Raises:
        ValueError: A value is out of range.
    """

    max_new_tokens: int | None = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    json_schema: str | None = None
    stop_repetition: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature <= 10:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) to 10")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be 0.01 to 100")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs is {self.logprobs}; it must be 0 or more")
        if any(not text for text in self.stop):
            raise ValueError("a stop text is empty")


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token and the most likely ones, each with the natural log of its probability before temperature."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Grammars:
    """Compiles JSON schemas for one tokenizer (llguidance; its tables are built once), and keeps the last ones.

    Args:
        tokenizer: A fast tokenizer.
        vocab_size: Columns of the logits.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._tables: Any = None
        self._compiled = lru_cache(maxsize=SCHEMAS)(self._compile)

    def matcher(self, json_schema: str) -> Any:
        """A matcher at the start of an answer; the first one of a schema takes time.

        Raises:
            ValueError: llguidance is missing, or does not support the schema.
        """
        return self._compiled(json_schema).deep_copy()

    def _compile(self, json_schema: str) -> Any:
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise ValueError('structured output needs llguidance: pip install "florence-vl[serve]"') from None
        try:
            # Compact, because a small model that may write white space writes nothing else.
            compact: Any = {"whitespace_flexible": False}
            grammar = LLMatcher.grammar_from_json_schema(json.loads(json_schema), overrides=compact)
        except ValueError as error:
            raise ValueError(f"the JSON schema cannot be used: {error}") from None
        if self._tables is None:
            self._tables = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size)
        return _checked(LLMatcher(self._tables, grammar))


def _checked(matcher: Any) -> Any:
    if matcher.is_error():
        raise ValueError(f"the JSON schema cannot be used: {matcher.get_error().partition(chr(10))[0]}")
    return matcher


class Sampler:
    """Chooses the tokens of one answer, as transformers' `generate` does.

    Args:
        options: The settings.
        suppressed: Ids that are never chosen.
        matcher: A matcher from `Grammars`.
        device: Device of the logits.
    """

    def __init__(
        self, options: GenerationOptions, suppressed: Sequence[int], matcher: Any, device: torch.device
    ) -> None:
        self.options, self.matcher = options, matcher
        self.reads_ids = options.repetition_penalty != 1.0
        self._processors = LogitsProcessorList()
        if self.reads_ids:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
        # Not transformers' processor, which would search the whole vocabulary for these ids at every token.
        self._suppressed = torch.tensor(list(suppressed), dtype=torch.long, device=device)
        self._warpers = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if options.temperature >= _LEAST_TEMPERATURE:
            if options.temperature != 1.0:
                self._warpers.append(TemperatureLogitsWarper(float(options.temperature)))
            if options.top_k is not None:
                self._warpers.append(TopKLogitsWarper(options.top_k))
            if options.top_p is not None and options.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(options.top_p))
            self._generator = torch.Generator(device)
            if options.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(options.seed)

    def __call__(self, logits_X: Tensor, ids: Sequence[int]) -> tuple[int, TokenLogprob | None]:
        """Choose the next token.

        Args:
            logits_X: Logits in float32.
            ids: The row so far, including the prompt.

        Raises:
            ValueError: The JSON schema takes too long or too much memory to follow.
        """
        scores_1X = logits_X[None]
        ids_1L = torch.tensor([ids] if self.reads_ids else [[]], dtype=torch.long, device=logits_X.device)
        scores_1X = self._processors(ids_1L, scores_1X).index_fill(-1, self._suppressed, float("-inf"))
        if self.matcher is not None:
            allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
            _checked(self.matcher)  # after an error it allows only the end
            allowed_X = torch.zeros(scores_1X.shape[-1], dtype=torch.bool)
            allowed_X[: len(allowed)] = allowed[: scores_1X.shape[-1]] > 0
            scores_1X = scores_1X.masked_fill(~allowed_X.to(scores_1X.device), float("-inf"))
        if self._generator is None:
            token = int(scores_1X.argmax(-1))
        else:
            probabilities_1X = torch.softmax(self._warpers(ids_1L, scores_1X), dim=-1)
            token = int(torch.multinomial(probabilities_1X, 1, generator=self._generator))
        if self.matcher is not None:
            self.matcher.consume_token(token)
            _checked(self.matcher)
        if self.options.logprobs is None:
            return token, None
        logprobs_X = logits_X.log_softmax(-1)
        top = logprobs_X.topk(min(self.options.logprobs, len(logprobs_X)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return token, TokenLogprob(token, float(logprobs_X[token]), pairs)

    @property
    def ended(self) -> bool:
        """Whether the grammar allows no further token."""
        return self.matcher is not None and bool(self.matcher.is_stopped())


class TextStream:
    """Text of a growing list of tokens, in pieces, that ends before the first stop text.

    The joined pieces equal `tokenizer.decode` of all tokens, cut at the stop text. Text that may still change (part of
    a character, the beginning of a stop text) is held back.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text completed by a token; `stopped` is set if a stop text was found."""
        self._ids.append(token)
        whole = self._decode(self._start)
        if whole.endswith("\ufffd"):
            return ""
        return self._release(whole)

    def finish(self) -> str:
        """The text that was held back."""
        piece = "" if self.stopped else self._release(self._decode(self._start))
        rest, self._held = self._held, ""
        return piece + ("" if self.stopped else rest)

    def _decode(self, start: int, end: int | None = None) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _release(self, whole: str) -> str:
        text = self._held + whole[len(self._decode(self._start, self._read)) :]
        self._start, self._read = self._read, len(self._ids)
        found = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """UTF-8 bytes of a token, which may be part of a character.

    Args:
        tokenizer: A byte-level tokenizer, or one with sentencepiece's `\u2581` and byte tokens `<0xE2>`.
        token: The id.
    """
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if all(character in _BYTES for character in piece):
        raw = bytes(_BYTES[character] for character in piece)
        if raw.decode(errors="replace") == text:
            return raw
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return (piece.replace("\u2581", " ") if piece.startswith("\u2581") else text).encode()


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the generation config, and the tokenizer's end token.

    Raises:
        ValueError: There are none, so answers would never end.
    """
    stop = model.generation_config.eos_token_id
    found = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    own = tokenizer.eos_token_id
    found += [own] if own is not None and own not in found else []
    if not found:
        raise ValueError("the model has no end-of-text token, so its answers would never end: set eos_token_id")
    return found
