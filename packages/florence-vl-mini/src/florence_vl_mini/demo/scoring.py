"""Answers of a model to held-out pictures and to the mini suite, and their accuracy with an interval."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from florence_vl.evaluate.benchmark import Generation, select
from florence_vl.evaluate.controls import commonest_answers
from florence_vl.evaluate.local import LocalAnswerer
from florence_vl.evaluate.question import IMAGE, BytesPicture, Question
from florence_vl.evaluate.sample import Sample, score_sample
from florence_vl.evaluate.suites import choose
from florence_vl.statistics import wilson
from florence_vl_mini.demo.data import KEYS, PROMPT, Answer, Example
from florence_vl_mini.suite import mini_folder

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

VALID, WHOLE = "valid JSON", "all four"
ROWS = (VALID, *KEYS, WHOLE)  # the scores of an answer
BATCH_SIZE = 16
MAX_NEW_TOKENS = 64  # correct answers take about half of it

Score = dict[str, float]  # `right`, `total`, `share`, and `low` and `high` of the 95 % interval


def score(right: int, total: int) -> Score:
    """A fraction with its interval."""
    low, high = wilson(right, total)
    return {"right": right, "total": total, "share": right / total, "low": low, "high": high}


def parse(text: str) -> Answer | None:
    """The JSON object of an answer; None unless the whole answer is JSON with exactly the four keys."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and sorted(value) == sorted(KEYS) else None


def judge(text: str, expected: Answer) -> dict[str, bool]:
    """Which parts of an answer are correct, by the names of `ROWS`; without valid JSON, none.

    Values must be of the expected type; case is ignored in texts.
    """
    found = parse(text)
    right = {key: found is not None and _same(found[key], expected[key]) for key in KEYS}
    return {VALID: found is not None, **right, WHOLE: all(right.values())}


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, str) and isinstance(expected, str):
        return found.casefold() == expected.casefold()
    return type(found) is type(expected) and found == expected


def scores(texts: Sequence[str], expected: Sequence[Answer]) -> dict[str, Score]:
    """Fraction correct per name of `ROWS` over answers."""
    judged = [judge(text, right) for text, right in zip(texts, expected, strict=True)]
    return {name: score(sum(one[name] for one in judged), len(judged)) for name in ROWS}


def ask(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, images: Sequence[bytes | None]
) -> list[str]:
    """Greedy answers to the task's prompt, each with its picture (an encoded file), or without one for None."""
    answerer = LocalAnswerer(model, processor, BATCH_SIZE, identity={"model": "demo"}, cached_images=BATCH_SIZE)
    questions = [
        Question(str(index), "demo", (PROMPT,) if image is None else (IMAGE, PROMPT), _pictures(image))
        for index, image in enumerate(images)
    ]
    answers = answerer.answer_all(questions, Generation(max_new_tokens=MAX_NEW_TOKENS))
    return [answer.text.strip() for answer in answers]


def _pictures(image: bytes | None) -> tuple[BytesPicture, ...]:
    return () if image is None else (BytesPicture(image),)


def derangement(examples: Sequence[Example], seed: int = 0) -> list[bytes]:
    """The pictures in another order in which each one changes its position (Sattolo's shuffle).

    Raises:
        ValueError: There is only one picture.
    """
    if len(examples) < 2:
        raise ValueError("another picture needs at least 2 held-out pictures")
    generator = random.Random(seed)
    images = [example.image for example in examples]
    for index in range(len(images) - 1, 0, -1):
        other = generator.randrange(index)
        images[index], images[other] = images[other], images[index]
    return images


def suite_sample(limit: int) -> tuple[Sample, dict[str, Score]]:
    """A fixed sample of the mini suite, about `limit` questions per group, and the accuracy of guessing.

    Returns:
        The sample, and per group title the score of the whole suite's `commonest_answers`.
    """
    folder = mini_folder()
    sample = []
    guesses = {}
    for benchmark in choose("mini"):
        questions = benchmark.questions(folder)
        chosen = select(questions, benchmark.scorer, limit)
        sample.append((benchmark, chosen))
        commonest = zip(commonest_answers(chosen, questions), chosen, strict=True)
        right = sum(benchmark.scorer.judge(text, question.reference).score for text, question in commonest)
        guesses[benchmark.group] = score(round(right), len(chosen))
    return sample, guesses | {"all": pooled(guesses)}


def suite_scores(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, sample: Sample
) -> dict[str, Score]:
    """A model's scores on a sample of the mini suite, per group title and overall."""
    found = score_sample(model, processor, sample, BATCH_SIZE)
    groups = {
        benchmark.group: score(round(found[f"eval/{benchmark.name}"] / 100 * len(questions)), len(questions))
        for benchmark, questions in sample
    }
    return groups | {"all": pooled(groups)}


def pooled(groups: dict[str, Score]) -> Score:
    """The score over the questions of all groups."""
    return score(int(sum(g["right"] for g in groups.values())), int(sum(g["total"] for g in groups.values())))
