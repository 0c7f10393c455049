"""Controls: the same questions with another picture, without a picture, or with only some features.

A model can answer many questions without the picture: most answers are yes, and the bars of a chart have likely
heights. Each control removes some input and asks the questions again; the loss of score is the contribution of that
input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

from florence_vl.evaluate.benchmark import Benchmark
from florence_vl.evaluate.local import LocalAnswerer
from florence_vl.evaluate.metrics import stratify
from florence_vl.evaluate.metrics.base import Judged
from florence_vl.evaluate.question import IMAGE, Picture, Question
from florence_vl.statistics import PairedComparison, compare, intervals

if TYPE_CHECKING:
    from torch import Tensor

    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

MAJORITY = "commonest answer"


@dataclass(frozen=True)
class ControlScore:
    """A benchmark's headline score under one condition.

    Attributes:
        value: In percent.
        interval: 95 % bootstrap interval over questions.
        against: Paired comparison of this condition (first) with the full model (second); None for the full model.
    """

    value: float
    interval: tuple[float, float]
    against: PairedComparison | None


def without_images(questions: Sequence[Question]) -> list[Question]:
    """The same questions without pictures."""
    return [replace(q, parts=tuple(p for p in q.parts if p is not IMAGE), images=()) for q in questions]


def with_other_images(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions with the pictures of another question that has the same number; a single one keeps its own."""
    generator = Random(seed)
    by_number: dict[int, dict[str, Sequence[Picture]]] = {}
    for question in questions:
        by_number.setdefault(len(question.images), {})[question.picture_key] = question.images
    out = []
    for question in questions:
        others = [images for key, images in by_number[len(question.images)].items() if key != question.picture_key]
        out.append(replace(question, images=generator.choice(others)) if others else question)
    return out


def commonest_answers(questions: Sequence[Question], among: Sequence[Question] | None = None) -> list[str]:
    """The most common correct answer to the questions with the same skill and form, for each question.

    Args:
        questions: The questions to answer.
        among: Questions whose answers are counted, for example a whole benchmark, because a small sample overestimates
            this control; the questions themselves if None.
    """
    counts: dict[Any, dict[str, int]] = {}

    def form(question: Question) -> Any:
        reference = question.reference
        return reference.get("skill"), bool(reference.get("choices")), reference["answer"].lower() in ("yes", "no")

    for question in questions if among is None else among:
        answers = counts.setdefault(form(question), {})
        answers[question.reference["answer"]] = answers.get(question.reference["answer"], 0) + 1
    return [max(counts[form(q)].items(), key=lambda pair: (pair[1], pair[0]))[0] for q in questions]


@contextmanager
def only_features(
    model: FlorenceVLForConditionalGeneration, names: Sequence[str], means: dict[str, Tensor]
) -> Iterator[None]:
    """Context in which every other feature of the tower is replaced by its mean over pictures, without information.

    Args:
        model: A Florence-VL.
        names: Features to keep.
        means: The mean of every feature, (N, D), by name.

    Raises:
        ValueError: A name is not a feature of the model.
    """
    if unknown := set(names) - set(means):
        raise ValueError(f"{', '.join(sorted(unknown))}: the model's features are {', '.join(means)}")

    def silence(_: Any, __: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: value if n in names else means[n].to(value).expand_as(value) for n, value in features.items()}

    handle = model.model.vision_tower.register_forward_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def mean_features(
    model: FlorenceVLForConditionalGeneration, processor: FlorenceVLProcessor, questions: Sequence[Question]
) -> dict[str, Tensor]:
    """Mean of each feature over the questions' pictures, (N, D) by name."""
    from florence_vl.model.features import tower_features
    from florence_vl.model.pictures import open_image

    pictures = {image.key: image for question in questions for image in question.images}
    features = tower_features(model, processor, (open_image(p.read()) for p in pictures.values()))
    return {name: value.mean(0) for name, value in features.items()}


def score_controls(
    model: FlorenceVLForConditionalGeneration,
    processor: FlorenceVLProcessor,
    sample: Sequence[tuple[Benchmark, Sequence[Question]]],
    llm: Any = None,
    batch_size: int = 16,
    say: Callable[[str], None] = lambda _: None,
    whole: Mapping[str, Sequence[Question]] | None = None,
) -> dict[str, dict[str, ControlScore]]:
    """Score a model under every control.

    Args:
        model: A Florence-VL.
        processor: Its processor.
        sample: Benchmarks with questions whose references have `answer`, as in the mini suite.
        llm: A Florence-VL with the untrained LLM, asked without pictures; omitted if None.
        batch_size: Questions per batch.
        say: Called with a description of the next questions.
        whole: Benchmark name -> all its questions, for the most common answers; those of `sample` if None.

    Returns:
        Benchmark name -> condition -> score; the first condition is `full`.
    """
    everything = [question for _, questions in sample for question in questions]
    conditions: dict[str, Callable[[Benchmark, Sequence[Question]], list[Judged]]] = {}

    def asking(answerer: LocalAnswerer, change: Callable[[Sequence[Question]], Sequence[Question]]) -> Any:
        def judged(benchmark: Benchmark, questions: Sequence[Question]) -> list[Judged]:
            answers = answerer.answer_all(change(questions), benchmark.generation)
            return [
                (benchmark.scorer.judge(answer.text, question.reference, answer.finished), question.reference)
                for question, answer in zip(questions, answers, strict=True)
            ]

        return judged

    def guess(benchmark: Benchmark, questions: Sequence[Question]) -> list[Judged]:
        texts = commonest_answers(questions, whole[benchmark.name] if whole else None)
        pairs = zip(texts, questions, strict=True)
        return [(benchmark.scorer.judge(text, q.reference), q.reference) for text, q in pairs]

    answerer = LocalAnswerer(model, processor, batch_size)
    conditions["full"] = asking(answerer, list)
    conditions[MAJORITY] = guess
    conditions["no picture"] = asking(answerer, without_images)
    conditions["another picture"] = asking(answerer, with_other_images)
    if llm is not None:
        conditions["the LLM before training, no picture"] = asking(
            LocalAnswerer(llm, processor, batch_size), without_images
        )
    judged = {}
    for condition, judge in conditions.items():
        say(condition)
        judged[condition] = {benchmark.name: judge(benchmark, questions) for benchmark, questions in sample}
    if "davit" in (model.config.features or ()) and len(model.config.features or ()) > 1:
        answerer.close()
        with only_features(model, ["davit"], mean_features(model, processor, everything)):
            say("[V] alone")
            alone = asking(answerer, list)
            judged["[V] alone"] = {benchmark.name: alone(benchmark, questions) for benchmark, questions in sample}
        answerer.close()
    return {
        benchmark.name: {
            condition: _score(benchmark, found[benchmark.name], judged["full"][benchmark.name], condition == "full")
            for condition, found in judged.items()
        }
        for benchmark, _ in sample
    }


def _score(benchmark: Benchmark, judged: list[Judged], full: list[Judged], is_full: bool) -> ControlScore:
    metric = benchmark.scorer
    units, reference = stratify(metric, judged), stratify(metric, full)
    scores = [(a[0].score, b[0].score) for a, b in zip(judged, full, strict=True)]
    against = None if is_full else compare(units, reference, metric.combine, metric.headline, scores)
    return ControlScore(
        metric.combine(units.means())[metric.headline], intervals(units, metric.combine)[metric.headline], against
    )
