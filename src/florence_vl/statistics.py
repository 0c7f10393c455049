"""Confidence intervals, paired comparisons and power of scores.

| question | function |
|---|---|
| a fraction of independent trials | `wilson` |
| a mean of independent values between two bounds | `mean_interval` |
| scores of a benchmark with any units and categories | `intervals` |
| two runs on the same questions | `compare`, `sign_test` |
| few runs that differ only in the seed | `interval`, `paired` |
| two rows, several seeds, the same questions | `crossed`; `Components.detectable` for planning |

Resampling is the Bayesian bootstrap (Rubin, 1981) with a weak prior instead of Efron's bootstrap: a stratum of three
correct answers has no variance to resample, so Efron's interval is [100, 100] and has no coverage. Seeds are few and
are never resampled: their variance is estimated by a two-way random-effects model, with Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

# For one stratum: number of units, and the mean of the units' vectors (k,).
Strata = Mapping[str, tuple[int, np.ndarray]]
# Scores by name from the means of the strata.
Combine = Callable[[Strata], dict[str, float]]


@dataclass
class Units:
    """The independent units of a benchmark: questions, or groups of questions that are scored together.

    Attributes:
        vectors: Stratum -> (units, k), the values of each unit.
        keys: Stratum -> the key of each unit.
        extremes: Extreme vectors that a unit can have, (m, k): all its questions wrong, all correct. Together they have
            the weight of one unit, so that a sample in which every answer is correct still has an interval. If None,
            only the units themselves are resampled.
    """

    vectors: dict[str, np.ndarray]
    keys: dict[str, list[Hashable]]
    extremes: np.ndarray | None = None

    def means(self) -> dict[str, tuple[int, np.ndarray]]:
        """Number of units and mean vector of each stratum."""
        return {name: (len(matrix), matrix.mean(axis=0)) for name, matrix in self.vectors.items()}


# ---------------------------------------------------------------- fractions and means


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a fraction, 95 % by default (Wilson, 1927).

    Args:
        right: Number of hits.
        total: Number of trials, at least 1.
        z: Normal quantile.

    Returns:
        Lower and upper bound, in [0, 1].

    Raises:
        ValueError: The counts are inconsistent.
    """
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} correct of {total}: need 0 <= correct <= total and total >= 1")
    share = right / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = (center - spread) / scale, (center + spread) / scale
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # exact at 0 and 1 despite rounding


def mean_interval(
    values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0), draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of independent values.

    Args:
        values: At least one value.
        bounds: Lowest and highest possible value.
        draws: Number of resampled means.
        seed: Seed of the draws.

    Raises:
        ValueError: `values` is empty.
    """
    if not len(values):
        raise ValueError("an interval needs at least one value")
    matrix = np.asarray(values, dtype=np.float64)[:, None]
    units = Units({"": matrix}, {}, np.asarray(bounds, dtype=np.float64)[:, None])
    return intervals(units, lambda strata: {"mean": float(strata[""][1][0])}, draws=draws, seed=seed)["mean"]


# ---------------------------------------------------------------- benchmarks: units in strata


def intervals(
    units: Units, combine: Combine, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Interval of every score of a benchmark.

    Args:
        units: The units, by stratum.
        combine: Computes the scores from the means of the strata, for example `Metric.combine`.
        level: Probability that the interval contains the score on all questions of this kind.
        draws: Number of resampled scores.
        seed: Seed of the draws.

    Returns:
        Score -> lower and upper bound. The score itself is always between them.
    """
    tail = 100 * (1 - level) / 2
    found = _scores(_draw_means(units.vectors, units.extremes, draws, np.random.default_rng(seed)), combine, draws)
    given = combine(units.means())
    ends = {name: np.percentile(values, (tail, 100 - tail)) for name, values in found.items()}
    return {name: (min(float(a), given[name]), max(float(b), given[name])) for name, (a, b) in ends.items()}


def _draw_means(
    vectors: Mapping[str, np.ndarray], extremes: np.ndarray | None, draws: int, generator: np.random.Generator
) -> dict[str, tuple[int, np.ndarray]]:
    """Means of each stratum, (draws, k), under random weights of its units.

    Each unit has weight 1. If extremes are given, unseen units have weight too: the extremes share the weight of one
    unit over all strata (Jeffreys' prior for a single stratum), and with several strata each borrows up to two units
    from all of them. Weights are scaled so that a stratum of n units has a variance of about s^2 / n.
    """
    everything = np.concatenate(list(vectors.values()))
    share = 1 / len(vectors)
    found = {}
    for name, matrix in vectors.items():
        distinct, inverse = np.unique(matrix, axis=0, return_inverse=True)
        shapes = np.bincount(inverse.ravel(), minlength=len(distinct)).astype(np.float64)
        units = len(matrix)
        scale = 1.0 if extremes is None else max(units - 1, 0.5) / (units + 2 - share)
        sums = np.zeros((draws, matrix.shape[1] + 1))
        for start in range(0, len(distinct), 4096):  # limits memory
            rows = slice(start, start + 4096)
            sums += _weigh(distinct[rows], scale * shapes[rows], draws, generator)
        if extremes is not None:
            sums += _weigh(extremes, np.full(len(extremes), scale * share / len(extremes)), draws, generator)
            if share < 1:
                weight = generator.standard_gamma(2 * scale * (1 - share), (draws, 1))
                others = everything[generator.integers(0, len(everything), draws)]
                sums += weight * np.hstack([others, np.ones((draws, 1))])
        found[name] = (units, sums[:, :-1] / sums[:, -1:])
    return found


def _weigh(vectors: np.ndarray, shapes: np.ndarray, draws: int, generator: np.random.Generator) -> np.ndarray:
    """Sums of the vectors with gamma weights; the last column is the sum of the weights."""
    weights = generator.standard_gamma(np.broadcast_to(shapes, (draws, len(shapes))))
    return weights @ np.hstack([vectors, np.ones((len(vectors), 1))])


def _scores(means: Mapping[str, tuple[int, np.ndarray]], combine: Combine, draws: int) -> dict[str, np.ndarray]:
    rows = [combine({name: (count, values[i]) for name, (count, values) in means.items()}) for i in range(draws)]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


@dataclass(frozen=True)
class PairedComparison:
    """Comparison of two runs on the questions that both answered.

    Attributes:
        first: Score of the first run on the common questions.
        second: Score of the second.
        difference: Score of the second minus the first.
        interval: 95 % interval of the difference, both runs resampled with the same units.
        p_value: Two-sided: twice the fraction of resampled differences with the opposite sign.
        won: Units (questions, or questions that are scored together) on which the second scored higher.
        lost: Units on which it scored lower.
        tied: All other units.
        sign_test: Exact two-sided binomial test that won and lost are equally likely (McNemar's test for correctness).
        questions: Number of common units.
    """

    first: float
    second: float
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
        """Whether the interval of the difference excludes 0."""
        return not self.interval[0] <= 0 <= self.interval[1]


def compare(
    first: Units,
    second: Units,
    combine: Combine,
    key: str,
    scores: Sequence[tuple[float, float]],
    draws: int = 1000,
    seed: int = 0,
) -> PairedComparison:
    """Compare two runs of one benchmark, paired by unit.

    Args:
        first: Units of the first run.
        second: Units of the second run, with the same keys in the same order.
        combine: Computes the scores from the means of the strata.
        key: The score to compare.
        scores: Score of each unit in the two runs, for the counts.
        draws: Number of resampled differences.
        seed: Seed of the draws.

    Raises:
        ValueError: The two runs have different units.
    """
    if first.keys != second.keys:
        raise ValueError("the two runs answered different questions; compare their common ones")
    joined = {name: np.hstack([first.vectors[name], second.vectors[name]]) for name in first.vectors}
    extremes = None
    if first.extremes is not None:  # each outcome of the first run paired with each of the second
        extremes = np.array([np.hstack([a, b]) for a in first.extremes for b in first.extremes])
    means = _draw_means(joined, extremes, draws, np.random.default_rng(seed))
    halves = []
    for side in (0, 1):
        half = {name: (count, np.split(values, 2, axis=1)[side]) for name, (count, values) in means.items()}
        halves.append(_scores(half, combine, draws)[key])
    drawn = halves[1] - halves[0]
    before, after = (float(combine(units.means())[key]) for units in (first, second))
    difference = after - before
    other = min(float(np.mean(drawn <= 0)), float(np.mean(drawn >= 0)))
    low, high = np.percentile(drawn, (2.5, 97.5))
    won = sum(b > a for a, b in scores)
    lost = sum(b < a for a, b in scores)
    return PairedComparison(
        first=before,
        second=after,
        difference=difference,
        interval=(min(float(low), difference), max(float(high), difference)),
        p_value=min(1.0, 2 * max(other, 1 / (draws + 1))) if won or lost else 1.0,
        won=won,
        lost=lost,
        tied=len(scores) - won - lost,
        sign_test=sign_test(won, lost),
        questions=len(scores),
    )


def sign_test(won: int, lost: int) -> float:
    """Exact two-sided p-value of the hypothesis that wins and losses are equally likely."""
    total, few = won + lost, min(won, lost)
    if total == 0:
        return 1.0
    logs = [_log_choose(total, i) - total * math.log(2) for i in range(few + 1)]
    top = max(logs)
    return min(1.0, 2 * math.exp(top) * sum(math.exp(value - top) for value in logs))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


# ---------------------------------------------------------------- seeds


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95 % interval.

    Attributes:
        mean: The mean.
        half: Half of the interval's width; None for a single run, which has no interval.
        runs: Number of runs.
    """

    mean: float
    half: float | None
    runs: int

    @property
    def low(self) -> float:
        """Lower end; minus infinity for a single run."""
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end; plus infinity for a single run."""
        return math.inf if self.half is None else self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval; False for a single run."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """`mean ± half`, or the mean alone for a single run."""
        mean = f"{round(self.mean * scale, digits) + 0.0:.{digits}f}"  # no -0.0
        return mean if self.half is None else f"{mean} ± {self.half * scale:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval (Student's t) of runs that differ only in the seed.

    Raises:
        ValueError: `values` is empty.
    """
    runs = len(values)
    if runs == 0:
        raise ValueError("an interval needs at least one value")
    mean = math.fsum(values) / runs
    if runs == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (runs - 1)
    return Interval(mean, t_quantile(0.975, runs - 1) * math.sqrt(variance / runs), runs)


def paired(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Interval of the differences `values - reference`, run by run (same seed, same split).

    Raises:
        ValueError: The numbers of runs differ.
    """
    if len(values) != len(reference):
        raise ValueError(
            f"a paired difference needs the same number of runs on both sides, got {len(values)} and {len(reference)}"
        )
    return interval([v - r for v, r in zip(values, reference, strict=True)])


# ---------------------------------------------------------------- seeds and questions together


@dataclass(frozen=True)
class Components:
    """Components of the variance of a difference (two-way random effects: seeds and questions).

    Attributes:
        seed: Variance of the difference between seeds, over all questions.
        question: Variance between questions, over all seeds.
        rest: Residual variance of one question and seed.
    """

    seed: float
    question: float
    rest: float

    def detectable(self, seeds: int, questions: int, power: float = 0.8) -> float:
        """Smallest true difference whose 95 % interval excludes 0 in a fraction `power` of experiments.

        Args:
            seeds: Training runs per row, at least 2.
            questions: Number of questions, the same for every training run.
            power: The fraction.

        Raises:
            ValueError: Fewer than two seeds or questions.
        """
        if seeds < 2 or questions < 2:
            raise ValueError(f"a difference needs at least 2 seeds and 2 questions, got {seeds} and {questions}")
        rest = self.rest / (seeds * questions)
        parts = (self.seed / seeds + rest, self.question / questions + rest, rest)
        return _detectable(parts, (seeds - 1, questions - 1, (seeds - 1) * (questions - 1)), power)


@dataclass(frozen=True)
class Difference:
    """Difference of two rows over seeds and questions.

    Attributes:
        interval: Mean difference with its 95 % interval; `runs` is the number of seeds.
        detectable: Smallest true difference that such an experiment detects in 80 % of cases.
        components: Variance components, for planning the next experiment.
        questions: Number of questions.
    """

    interval: Interval
    detectable: float
    components: Components
    questions: int


def crossed(differences_SQ: Any, strata: Sequence[Hashable] | None = None) -> Difference:
    """Difference of two rows that were trained with the same seeds and evaluated on the same questions.

    Seeds and questions are random samples: seeds of all training runs, questions of all questions of their kind. The
    variance of the mean is V_seed + V_question - V_rest, each estimated from its mean square, with Satterthwaite's
    degrees of freedom. A hierarchical bootstrap of three to eight seeds has less than 95 % coverage (resampling S seeds
    loses a factor (S - 1) / S of the variance and Student's wider tails). Student's t over the means of the seeds
    treats the questions as the whole population.

    Args:
        differences_SQ: Score of the row minus the score of the reference, for each seed and question.
        strata: Benchmark of each question, (Q,): the mean over benchmarks of their means is compared. If None, all
            questions are from one benchmark.

    Raises:
        ValueError: Fewer than two seeds, fewer than two questions of a benchmark, or missing values.
    """
    values_SQ = np.asarray(differences_SQ, dtype=np.float64)
    if values_SQ.ndim != 2 or len(values_SQ) < 2 or not np.isfinite(values_SQ).all():
        raise ValueError(
            f"expected finite differences of at least 2 seeds x questions, found an array {values_SQ.shape}"
        )
    seeds, questions = values_SQ.shape
    names = np.unique(np.array(["all"] * questions if strata is None else strata), return_inverse=True)[1]
    if len(names) != questions:
        raise ValueError(f"{questions} questions but {len(names)} benchmarks of questions")
    counts = np.bincount(names)
    if counts.min(initial=2) < 2 or questions < 2:
        raise ValueError("each benchmark needs at least 2 questions")
    by_seed_S = np.zeros(seeds)
    question = rest = 0.0
    for number, count in enumerate(counts):
        part_SQ = values_SQ[:, names == number]
        by_seed_S += part_SQ.mean(axis=1) / len(counts)
        left_SQ = part_SQ - part_SQ.mean(axis=0) - part_SQ.mean(axis=1, keepdims=True) + part_SQ.mean()
        question += part_SQ.mean(axis=0).var(ddof=1) / count / len(counts) ** 2
        rest += (left_SQ**2).sum() / ((seeds - 1) * (count - 1)) / (seeds * count) / len(counts) ** 2
    parts = (float(by_seed_S.var(ddof=1)) / seeds, float(question), float(rest))
    freedom = (seeds - 1, questions - len(counts), (seeds - 1) * (questions - len(counts)))
    error, degrees = _error(parts, freedom)
    components = Components(
        seed=max(0.0, parts[0] - parts[2]) * seeds,
        question=max(0.0, parts[1] - parts[2]) * questions,
        rest=parts[2] * seeds * questions,
    )
    found = Interval(float(by_seed_S.mean()), t_quantile(0.975, degrees) * error, seeds)
    return Difference(found, _detectable(parts, freedom, 0.8), components, questions)


def _error(parts: Sequence[float], freedom: Sequence[int]) -> tuple[float, float]:
    """Standard error and Satterthwaite's degrees of freedom from the three variance components of a mean."""
    seed, question, rest = parts
    variance = max(seed + question - rest, seed, question)  # an estimate below one of its components is noise
    spread = sum(part**2 / degrees for part, degrees in zip(parts, freedom, strict=True))
    return math.sqrt(variance), max(1.0, variance**2 / spread) if spread else float(max(freedom))


def _detectable(parts: Sequence[float], freedom: Sequence[int], power: float) -> float:
    error, degrees = _error(parts, freedom)
    return (t_quantile(0.975, degrees) + t_quantile(power, degrees)) * error


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t above the median (Hill, 1970: Algorithm 396).

    Args:
        probability: Between 0.5 and 1.
        freedom: Degrees of freedom, at least 1; between 1 and 2 those of 1 are used, which is conservative.
    """
    p, n = 2 * (1 - probability), freedom
    if n < 2:
        return 1 / math.tan(p * math.pi / 2)
    if n == 2:
        return math.sqrt(2 / (p * (2 - p)) - 2)
    a = 1 / (n - 0.5)
    b = 48 / (a * a)
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * n
    y = (d * p) ** (2 / n)
    if y > a + 0.05:
        x = NormalDist().inv_cdf(p / 2)
        y = x * x
        if n < 5:
            c += 0.3 * (n - 4.5) * (x + 0.6)
        c += (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = math.expm1(a * y * y)
    else:
        y = ((1 / (((n + 6) / (n * y) - 0.089 * d - 0.822) * (n + 2) * 3) + 0.5 / (n + 4)) * y - 1) * (n + 1) / (
            n + 2
        ) + 1 / y
    return math.sqrt(n * y)


def paper_average(scores: Mapping[str, Any], columns: Sequence[str] | None = None) -> float:
    """Mean of a table row as the paper computes it: MME-P divided by 20, MME-C by 8, all others unchanged.

    Raises:
        ValueError: There are no scores, or one of `columns` is missing.
    """
    columns = list(scores) if columns is None else list(columns)
    if missing := [column for column in columns if column not in scores]:
        raise ValueError(f"no score for {', '.join(missing)}")
    if not columns:
        raise ValueError("no score to average")
    return sum(scores[column] / {"MME-P": 20, "MME-C": 8}.get(column, 1) for column in columns) / len(columns)
