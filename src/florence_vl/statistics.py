"""How far a score can be trusted: bootstrap intervals over units, and paired comparison of two runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from florence_vl.evaluate.metrics import Metric, Units


def resample(units: Units, metric: Metric, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Scores of bootstrap samples: units are drawn with replacement within each stratum (Efron, 1979).

    Returns:
        Each score's values, (draws,).
    """
    generator = np.random.default_rng(seed)
    means = {name: (len(matrix), _draw_means(matrix, draws, generator)) for name, matrix in units.vectors.items()}
    return _combine(means, metric, draws)


def _draw_means(matrix: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    count = len(matrix)
    distinct, inverse = np.unique(matrix, axis=0, return_inverse=True)
    shares = np.bincount(inverse.ravel(), minlength=len(distinct)) / count
    if (
        len(distinct) <= 4096
    ):  # how often each distinct vector is drawn is multinomial: no need to draw units one by one
        return generator.multinomial(count, shares, size=draws) @ distinct / count
    return np.stack([matrix[generator.integers(0, count, count)].mean(axis=0) for _ in range(draws)])


def _combine(means: Mapping[str, tuple[int, np.ndarray]], metric: Metric, draws: int) -> dict[str, np.ndarray]:
    rows = [metric.combine({name: (count, values[i]) for name, (count, values) in means.items()}) for i in range(draws)]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def intervals(
    units: Units, metric: Metric, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap interval of every score."""
    tail = 100 * (1 - level) / 2
    found = resample(units, metric, draws, seed)
    return {k: (float(np.percentile(v, tail)), float(np.percentile(v, 100 - tail))) for k, v in found.items()}


@dataclass(frozen=True)
class Comparison:
    """Two runs on the questions that both answered.

    Attributes:
        difference: Score of the second minus the first.
        interval: Bootstrap interval of the difference, both runs resampled with the same units.
        p_value: Two-sided: how often a resampled difference has the other sign, doubled.
        won: Questions on which the second scored higher.
        lost: Questions on which it scored lower.
        tied: The rest.
        sign_test: Exact two-sided binomial test that won and lost are equally likely (McNemar's, for right and wrong).
        questions: Number of common questions.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    won: int
    lost: int
    tied: int
    sign_test: float
    questions: int

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return not self.interval[0] <= 0 <= self.interval[1]


def compare(
    first: Units,
    second: Units,
    metric: Metric,
    key: str,
    scores: Sequence[tuple[float, float]],
    draws: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare two runs of one benchmark, paired by unit.

    Args:
        first: Units of the first run.
        second: Units of the second, with the same keys in the same order.
        metric: The benchmark's.
        key: The score to compare.
        scores: Each question's score in the two runs, for the counts.
        draws: Bootstrap samples.
        seed: Of the bootstrap.

    Raises:
        ValueError: The two runs have different units.
    """
    if first.keys != second.keys:
        raise ValueError("the two runs answered different questions; compare their common ones")
    joined = {name: np.hstack([first.vectors[name], second.vectors[name]]) for name in first.vectors}
    generator = np.random.default_rng(seed)
    means = {name: (len(matrix), _draw_means(matrix, draws, generator)) for name, matrix in joined.items()}
    halves = []
    for side in (0, 1):
        half = {name: (count, np.split(values, 2, axis=1)[side]) for name, (count, values) in means.items()}
        halves.append(_combine(half, metric, draws)[key])
    drawn = halves[1] - halves[0]
    difference = metric.combine(second.means())[key] - metric.combine(first.means())[key]
    other = min(float(np.mean(drawn <= 0)), float(np.mean(drawn >= 0)))
    won = sum(b > a for a, b in scores)
    lost = sum(b < a for a, b in scores)
    return Comparison(
        difference=float(difference),
        interval=(float(np.percentile(drawn, 2.5)), float(np.percentile(drawn, 97.5))),
        p_value=min(1.0, 2 * max(other, 1 / (draws + 1))) if won or lost else 1.0,
        won=won,
        lost=lost,
        tied=len(scores) - won - lost,
        sign_test=sign_test(won, lost),
        questions=len(scores),
    )


def sign_test(won: int, lost: int) -> float:
    """Exact two-sided p-value that wins and losses are equally likely."""
    total, few = won + lost, min(won, lost)
    if total == 0:
        return 1.0
    logs = [_log_choose(total, i) - total * math.log(2) for i in range(few + 1)]
    top = max(logs)
    return min(1.0, 2 * math.exp(top) * sum(math.exp(value - top) for value in logs))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def paper_average(scores: Mapping[str, Any], columns: Sequence[str] | None = None) -> float:
    """Mean of a table row as the paper computes it: MME-P divided by 20, MME-C by 8, the rest as they are.

    Raises:
        ValueError: There is no score, or one of `columns` is missing.
    """
    columns = list(scores) if columns is None else list(columns)
    if missing := [column for column in columns if column not in scores]:
        raise ValueError(f"no score for {', '.join(missing)}")
    if not columns:
        raise ValueError("no score to average")
    return sum(scores[column] / {"MME-P": 20, "MME-C": 8}.get(column, 1) for column in columns) / len(columns)
