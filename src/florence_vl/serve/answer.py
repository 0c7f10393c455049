"""A request in the engine, and the pieces of its answer."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from florence_vl.serve.prompt import Prompt
from florence_vl.serve.sampling import GenerationOptions, Sampler, TextStream, TokenLogprob


@dataclass(frozen=True)
class Event:
    """A piece of an answer.

    Attributes:
        text: New text.
        logprobs: Log-probabilities of the tokens since the last event, if requested.
        finish: On the last event `stop` or `length`, `cancelled`, or `error`.
        error: The error.
    """

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    error: Exception | None = None


class Answer:
    """A request in the engine. Iterate over the pieces of text, or wait for `result()`.

    Attributes:
        prompt: Prompt of the request.
        options: Options of the request.
        ids: Tokens generated so far.
        cached_tokens: Number of cached prompt tokens.
        finish: Why it ended; None while it runs.
    """

    def __init__(
        self, prompt: Prompt, options: GenerationOptions, stream: TextStream, sink: Callable[[Event], None] | None
    ) -> None:
        self.prompt, self.options = prompt, options
        self.ids: list[int] = []
        self.cached_tokens = 0
        self.finish: str | None = None
        self._stream = stream
        self._cancelled = False
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._sink = sink or self._events.put
        self._held: list[TokenLogprob] = []
        self._sampler: Sampler | None = None

    def cancel(self) -> None:
        """Cancel the request; the engine frees the row before its next step."""
        self._cancelled = True

    def __iter__(self) -> Iterator[str]:
        """Pieces of text as they are generated.

        Raises:
            OutOfMemory: The device has too little memory for the request.
            RuntimeError: Generation failed, or the engine was closed.
        """
        while True:
            event = self._events.get()
            if event.text:
                yield event.text
            if event.error is not None:
                raise event.error
            if event.finish is not None:
                return

    def result(self) -> str:
        """The whole text; waits for it."""
        return "".join(self)

    def _emit(self, text: str, finish: str | None = None, error: Exception | None = None) -> None:
        if text or finish or error:
            logprobs, self._held = tuple(self._held), []
            self._sink(Event(text, logprobs, finish, error))

    def _end(self, finish: str, error: Exception | None = None) -> None:
        if self.finish is None:
            self.finish = finish
            text = self._stream.finish() if error is None and finish != "cancelled" else ""
            self._emit(text, finish, error)
