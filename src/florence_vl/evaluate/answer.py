"""The interface of models that answer questions, local or served, and batching of questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.question import Question


@dataclass(frozen=True)
class Answer:
    """A raw answer.

    Attributes:
        text: Generated text without control tokens.
        finished: False if generation reached the token limit.
        tokens: Number of generated tokens, if known.
        error: Why there is no answer; None otherwise.
    """

    text: str
    finished: bool = True
    tokens: int | None = None
    error: str | None = None


class Answerer(ABC):
    """Answers batches of questions.

    Attributes:
        identity: Values that identify the model: name, fingerprint of the weights, precision.
        batch_size: Number of questions per batch.
    """

    identity: dict[str, Any]
    batch_size: int

    @abstractmethod
    def answer(self, questions: Sequence[Question], generation: Generation) -> list[Answer]:
        """One answer for each question of a batch, in order."""

    def answer_all(self, questions: Sequence[Question], generation: Generation) -> list[Answer]:
        """One answer for each of any number of questions, in order; computed in `batches` of `batch_size`.

        Raises:
            ValueError: `batch_size` is not positive, or a question is invalid (see `answer`).
        """
        found: dict[int, list[Answer]] = {}  # by identity, because ids are unique only within a benchmark
        for batch in batches(questions, self.batch_size):
            for question, answer in zip(batch, self.answer(batch, generation), strict=True):
                found.setdefault(id(question), []).append(answer)
        return [found[id(question)].pop(0) for question in questions]

    @abstractmethod
    def close(self) -> None:
        """Free memory held between batches."""


def batches(questions: Iterable[Question], batch_size: int) -> list[list[Question]]:
    """Batches in which questions about the same images are adjacent, ordered by length.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, found {batch_size}")
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.picture_key, []).append(question)
    for group in groups.values():
        group.sort(key=lambda question: len(question.text))
    ordered = sorted(groups.values(), key=lambda group: (len(group[0].images), len(group[-1].text)))
    found: list[list[Question]] = []
    for group in ordered:
        # An image's questions share a batch, so that their common prefix is computed once, unless this leaves the last
        # batch less than half full.
        space = batch_size - len(found[-1]) if found else 0
        if len(group) <= space or 2 * space > batch_size:
            found[-1] += group[:space]
            group = group[space:]
        found += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    return found
