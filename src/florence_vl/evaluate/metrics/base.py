"""Base class of metrics: a verdict on one answer, and a score over units of dependent questions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from florence_vl.evaluate.metrics.final import without_reasoning
from florence_vl.registry import Registry
from florence_vl.statistics import Strata, Units

METRICS: Registry[Metric] = Registry("metric")

# Kinds of outcome, in the order in which reports list failures.
KINDS = ("right", "partly", "wrong", "unparsed", "empty", "runaway")


@dataclass(frozen=True)
class Verdict:
    """Result of one answer.

    Attributes:
        parsed: The parsed answer; None if it could not be parsed.
        score: Between 0 (wrong) and 1 (correct).
        kind: One of `KINDS`.
        details: Further scores of the same answer by name, e.g. `as_authors`.
    """

    parsed: Any
    score: float
    kind: str
    details: Mapping[str, float] | None = None


Reference = Mapping[str, Any]
Judged = tuple[Verdict, Reference]


def verdict(
    answer: str, parsed: Any, score: float, finished: bool, details: Mapping[str, float] | None = None
) -> Verdict:
    """A verdict with its kind: an empty answer never scores; a wrong one cut at the token limit is runaway."""
    if not answer.strip():
        return Verdict(None, 0.0, "empty", details)
    if score >= 1:
        kind = "right"
    elif score > 0:
        kind = "partly"
    elif not finished:
        kind = "runaway"
    else:
        kind = "unparsed" if parsed is None else "wrong"
    return Verdict(parsed, float(score), kind, details)


class Metric(ABC):
    """Scores the answers of a benchmark.

    A metric first judges single answers (`judge`), then units: the questions that are one sample in the statistical
    sense, for example the two images of an MMVP pair. Every score is a function of the strata's mean unit vectors
    (`combine`), so confidence intervals can be computed by resampling units, for any benchmark.

    Attributes:
        name: Name in the registry.
        headline: The key of `combine` that represents the benchmark in a table.
    """

    name: str = ""
    headline: str = "accuracy"

    def judge(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        """Verdict on one raw answer, without its reasoning blocks.

        Args:
            answer: The generated text.
            reference: What is known about the question (`answer` or `answers`, `choices`, categories ...).
            finished: False if generation reached its token limit: such an answer is runaway text unless it already is a
                complete answer of the expected form.
        """
        found = self.read(without_reasoning(answer), reference, finished)
        if found.kind == "empty" and answer.strip():  # reasoning without an answer
            return replace(found, kind="unparsed" if finished else "runaway")
        return found

    @abstractmethod
    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        """Verdict on an answer without reasoning blocks; arguments as in `judge`."""

    def unit(self, reference: Reference) -> Hashable | None:
        """Key of the unit of a question; None if each question is a unit."""
        return None

    def stratum(self, reference: Reference) -> str:
        """The category within which units are averaged."""
        return ""

    def target(self, reference: Reference) -> str | None:
        """The correct answer as the model should say it: `answer`, or the most common of `answers`; None if unknown."""
        if isinstance(reference.get("answer"), str):
            return reference["answer"]
        answers = [answer for answer in reference.get("answers") or () if isinstance(answer, str)]
        return Counter(answers).most_common(1)[0][0] if answers else None

    def counts_for(self, key: str, reference: Reference) -> bool:
        """Whether a question is part of the score `key`; all questions by default."""
        return True

    def complete(self, judged: Sequence[Judged]) -> bool:
        """Whether all questions of a unit are present, as far as the benchmark's rules determine it."""
        return True

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        """The values of one unit; by default the score of its only question."""
        return (judged[0][0].score,)

    def extremes(self, judged: Sequence[Judged]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Vectors of this unit with every question wrong, and with every question correct."""
        wrong = [(Verdict(None, 0.0, "wrong", dict.fromkeys(v.details or {}, 0.0)), ref) for v, ref in judged]
        right = [
            (Verdict(ref.get("answer"), 1.0, "right", dict.fromkeys(v.details or {}, 1.0)), ref) for v, ref in judged
        ]
        return self.vector(wrong), self.vector(right)

    def combine(self, strata: Strata) -> dict[str, float]:
        """Scores from the means of the strata; by default the mean over all units as `accuracy`, in percent."""
        return {self.headline: 100 * pooled(strata)[0]}


def pooled(strata: Strata) -> np.ndarray:
    """Mean vector over the units of all strata."""
    total = sum(count for count, _ in strata.values())
    return np.sum([count * mean for count, mean in strata.values()], axis=0) / total


def metric(name: str) -> Callable[[type[Metric]], type[Metric]]:
    """Class decorator that registers one instance of a metric under `name`."""

    def decorate(cls: type[Metric]) -> type[Metric]:
        cls.name = name
        METRICS.register(name)(cls())
        return cls

    return decorate


def score_all(chosen: Metric, judged: Sequence[Judged]) -> dict[str, float]:
    """Scores of a benchmark from all its verdicts.

    Raises:
        ValueError: There are no verdicts.
    """
    return chosen.combine(stratify(chosen, judged).means())


def group_units(
    chosen: Metric, judged: Sequence[Judged], ids: Sequence[str] | None = None
) -> dict[tuple[str, Hashable], list[Judged]]:
    """The verdicts of each unit, by stratum and key; arguments as in `stratify`."""
    members: dict[tuple[str, Hashable], list[Judged]] = {}
    for position, (found, reference) in enumerate(judged):
        unit = chosen.unit(reference)
        key = ("question", ids[position] if ids else position) if unit is None else unit
        members.setdefault((chosen.stratum(reference), key), []).append((found, reference))
    return members


def stratify(
    chosen: Metric, judged: Sequence[Judged], ids: Sequence[str] | None = None, drop_incomplete: bool = False
) -> Units:
    """Group verdicts into units and strata.

    Args:
        chosen: The metric.
        judged: One verdict and reference per question.
        ids: Ids of the questions, used as keys of units that are single questions.
        drop_incomplete: Drop units with a missing question.

    Raises:
        ValueError: There are no verdicts.
    """
    if not judged:
        raise ValueError(f"no answer to score with the metric {chosen.name!r}")
    rows: dict[str, list[tuple[float, ...]]] = {}
    keys: dict[str, list[Hashable]] = {}
    extremes: list[list[tuple[float, ...]]] = [[], []]
    for (stratum, key), group in group_units(chosen, judged, ids).items():
        if drop_incomplete and not chosen.complete(group):
            continue
        rows.setdefault(stratum, []).append(chosen.vector(group))
        keys.setdefault(stratum, []).append(key)
        for side, vector in zip(extremes, chosen.extremes(group), strict=True):
            side.append(vector)
    vectors = {name: np.asarray(values, dtype=np.float64) for name, values in rows.items()}
    return Units(vectors, keys, np.asarray(extremes).mean(axis=1) if vectors else None)
