"""A small evaluation on a fixed sample during training: the recipe's `evaluate.suite`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from florence_vl.evaluate.benchmark import Benchmark, select
from florence_vl.evaluate.local import LocalAnswerer
from florence_vl.evaluate.metrics import score_all
from florence_vl.evaluate.question import Question
from florence_vl.evaluate.suites import choose, data_folder

# Benchmarks with their sampled questions.
Sample = Sequence[tuple[Benchmark, Sequence[Question]]]


def choose_scorable(suite: str) -> list[Benchmark]:
    """The benchmarks of a suite.

    Raises:
        ValueError: A name is unknown, or a benchmark needs a judge.
    """
    chosen = choose(suite)
    if needing := [b.name for b in chosen if b.judge == "required"]:
        raise ValueError(f"{', '.join(needing)} can't be scored during training: they need a judge")
    return chosen


def read_sample(suite: str = "mini", limit: int = 32, seed: int = 0, data: Path | None = None) -> Sample:
    """The questions of a fixed sample of a suite; arguments and errors as in `evaluate_sample`."""
    return [(benchmark, _cached(benchmark.name, limit, seed, data)) for benchmark in choose_scorable(suite)]


def evaluate_sample(
    model: Any,
    processor: Any,
    suite: str = "mini",
    limit: int = 32,
    seed: int = 0,
    data: Path | None = None,
    batch_size: int = 16,
) -> dict[str, float]:
    """Score a model in memory on a fixed sample of a suite.

    The model's mode (train or eval) and torch's random state are restored, so training is not affected.

    Args:
        model: A Florence-VL, on its device.
        processor: Its processor.
        suite: Suites or benchmarks; those that need a judge are errors.
        limit: Approximate number of questions per benchmark.
        seed: Seed of the sample: the same seed selects the same questions.
        data: Folder with the benchmarks' files; not needed for the mini suite.
        batch_size: Questions per batch.

    Returns:
        The benchmarks' headline scores as `eval/<benchmark>`, their mean as `eval/mean` if there are several, and
        `eval/unfinished`, the fraction of answers that reached the token limit.

    Raises:
        FileNotFoundError: A benchmark's file does not exist.
        ValueError: A name is unknown, or a benchmark needs a judge.
    """
    return score_sample(model, processor, read_sample(suite, limit, seed, data), batch_size)


def score_sample(model: Any, processor: Any, sample: Sample, batch_size: int = 16) -> dict[str, float]:
    """Score a model in memory on the result of `read_sample`; see `evaluate_sample`."""
    import torch

    device = torch.device(model.device)
    answerer = LocalAnswerer(model, processor, batch_size, identity={"model": "in training"})
    found: dict[str, float] = {}
    unfinished = asked = 0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            for benchmark, questions in sample:
                answers = answerer.answer_all(questions, benchmark.generation)
                judged = [
                    (benchmark.scorer.judge(answer.text, question.reference, answer.finished), question.reference)
                    for question, answer in zip(questions, answers, strict=True)
                ]
                unfinished += sum(not answer.finished for answer in answers)
                asked += len(questions)
                found[f"eval/{benchmark.name}"] = score_all(benchmark.scorer, judged)[benchmark.scorer.headline]
        finally:
            answerer.close()
    if len(found) > 1:
        found["eval/mean"] = sum(found.values()) / len(found)
    found["eval/unfinished"] = unfinished / asked
    return found


def suite_scorer(suite: str, limit: int, data: Path | None, batch_size: int) -> Callable[[Any, Any], dict[str, float]]:
    """The `suite_reader` of `florence_vl.train.train`: reads a sample now, and scores models on it later.

    Args:
        suite: As in `evaluate_sample`.
        limit: Approximate number of questions per benchmark.
        data: Folder with the benchmarks' files.
        batch_size: Questions per batch.

    Returns:
        A function of a model and its processor that returns scores by name, as `evaluate_sample`.
    """
    sample = read_sample(suite, limit, data=data)
    return lambda model, processor: score_sample(model, processor, sample, batch_size)


@lru_cache(maxsize=64)
def _cached(name: str, limit: int, seed: int, data: Path | None) -> tuple[Question, ...]:
    (benchmark,) = choose(name)
    return tuple(select(benchmark.questions(data_folder(benchmark, data)), benchmark.scorer, limit, seed))
