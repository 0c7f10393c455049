"""Intervals, paired comparison, and the paper's averages."""

from __future__ import annotations

import math

import numpy as np
import pytest

from florence_vl.evaluate.metrics import METRICS, Verdict, stratify
from florence_vl.evaluate.scoring import averages, reported_results, reported_row, reported_rows
from florence_vl.statistics import (
    Components,
    Strata,
    Units,
    compare,
    crossed,
    interval,
    intervals,
    mean_interval,
    paper_average,
    sign_test,
    t_quantile,
    wilson,
)

CHOICES = ["x", "y"]


def units(right: list[bool], metric: str = "multiple_choice") -> Units:
    chosen = METRICS[metric]
    judged = []
    for i, ok in enumerate(right):
        reference = {"answer": "A", "choices": CHOICES, "unit": i + 1}
        judged.append((chosen.judge("A" if ok else "B", reference), reference))
    return stratify(chosen, judged, [str(i) for i in range(len(right))])


@pytest.mark.parametrize("table", ["table_1", "table_5", "table_6a", "table_6b"])
def test_the_papers_own_averages_come_out(table: str) -> None:
    rows = [row for row in reported_results()[table]["rows"] if "Avg" in row["scores"]]
    assert rows
    for row in rows:
        scores = {k: v for k, v in row["scores"].items() if k != "Avg"}
        assert paper_average(scores) == pytest.approx(row["scores"]["Avg"], abs=0.11), row["name"]


def test_paper_average_names_what_is_missing() -> None:
    assert paper_average({"MME-P": 1500.0, "MME-C": 400.0, "POPE": 80.0}) == pytest.approx((75 + 50 + 80) / 3)
    with pytest.raises(ValueError, match="no score for GQA"):
        paper_average({"POPE": 80.0}, ["POPE", "GQA"])
    with pytest.raises(ValueError, match="no score to average"):
        paper_average({})


def test_reported_rows() -> None:
    row = reported_row("Florence-VL 3B")
    assert row["VQAv2"] == 82.1
    assert row["DocVQA"] == 82.1
    assert len(row) == 25
    assert reported_row("table 3: Florence-VL 7B")["MMVP"] == 12.3
    with pytest.raises(ValueError, match="Did you mean 'Florence-VL 3B'"):
        reported_row("Florence-VL-3B")
    shared = averages({"POPE": 90.0, "Zoo": 50.0}, row)
    assert (shared["ours"], shared["ours_shared"], shared["paper_shared"]) == (70.0, 90.0, 88.3)
    assert len(reported_rows()) > 10


def test_interval_has_the_binomial_width() -> None:
    right = [i % 4 != 0 for i in range(400)]
    low, high = intervals(units(right), METRICS["multiple_choice"].combine, draws=2000)["accuracy"]
    width = 2 * 1.96 * 100 * math.sqrt(0.75 * 0.25 / 400)
    assert low < 75 < high
    assert high - low == pytest.approx(width, rel=0.1)
    assert intervals(units(right), METRICS["multiple_choice"].combine) == intervals(
        units(right), METRICS["multiple_choice"].combine
    )


def test_pairs_are_resampled_as_pairs() -> None:
    """Two answers that always agree carry the information of one: the interval must not shrink."""
    right = [ok for i in range(200) for ok in [i % 2 == 0] * 2]
    low, high = intervals(units(right, "mmvp"), METRICS["mmvp"].combine, draws=2000)["single"]
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.25 / 200), rel=0.1)


def test_many_distinct_units_are_drawn_one_by_one() -> None:
    chosen = METRICS["anls"]
    generator = np.random.default_rng(0)
    found = stratify(chosen, [(chosen.judge("a", {"answers": ["a"]}), {"answers": ["a"]})] * 6000)
    found.vectors[""] = generator.random((6000, 1))
    low, high = intervals(found, chosen.combine, draws=200)["anls"]
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(1 / 12 / 6000), rel=0.25)


def test_paired_comparison_sees_what_unpaired_intervals_hide() -> None:
    first = [i % 2 == 0 for i in range(300)]
    second = [ok or i % 30 == 1 for i, ok in enumerate(first)]  # 10 questions won, none lost
    result = compare(units(first), units(second), METRICS["multiple_choice"].combine, "accuracy",
                     [(float(a), float(b)) for a, b in zip(first, second, strict=True)])  # fmt: skip
    assert (result.won, result.lost, result.tied, result.questions) == (10, 0, 290, 300)
    assert result.difference == pytest.approx(100 * 10 / 300)
    assert result.significant
    assert result.p_value < 0.01
    assert result.sign_test == pytest.approx(2 / 2**10)
    same = compare(units(first), units(first), METRICS["multiple_choice"].combine, "accuracy", [(1.0, 1.0)] * 300)
    assert not same.significant
    assert same.p_value == same.sign_test == 1


def test_comparison_refuses_other_questions() -> None:
    with pytest.raises(ValueError, match="different questions"):
        compare(units([True]), units([True, False]), METRICS["multiple_choice"].combine, "accuracy", [])


@pytest.mark.parametrize(("won", "lost", "p"), [(0, 0, 1), (5, 5, 1), (3, 0, 0.25), (8, 2, 0.109375)])
def test_sign_test(won: int, lost: int, p: float) -> None:
    assert sign_test(won, lost) == pytest.approx(p)
    assert sign_test(lost, won) == pytest.approx(p)


def test_wilson_interval_against_published_values() -> None:
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for right, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
    for right, total in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="need 0 <= correct <= total"):
            wilson(right, total)


def test_a_perfect_sample_still_has_an_interval() -> None:
    low, high = intervals(units([True] * 20), METRICS["multiple_choice"].combine)["accuracy"]
    assert high == 100
    assert 100 * wilson(20, 20)[0] - 5 < low < 95
    low, high = mean_interval([0.0] * 20)
    assert low == 0
    assert 0.05 < high < wilson(0, 20)[1] + 0.05
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def test_extremes_of_a_unit_are_all_wrong_and_all_right() -> None:
    assert units([True, False], "mmvp").extremes.tolist() == [[0, 0, 0], [1, 1, 1]]
    metric = METRICS["llava_bench"]
    judged = [(Verdict(None, 0.5, "partly", {"model_points": 4.0, "reference_points": 8.0}), {"category": "conv"})]
    assert stratify(metric, judged).extremes.tolist() == [[1, 10], [10, 10]]


@pytest.mark.parametrize("sizes", [(1, 3), (2, 5), (8, 12)], ids=str)
def test_intervals_of_samples_cover_the_truth_also_with_few_questions_a_stratum(sizes: tuple[int, int]) -> None:
    """Fourteen categories of unlike difficulty, a few pairs of each, scored as MME: the sum of accuracy and both right.

    200 samples: with a true coverage of 95 % fewer than 181 would be seen once in a hundred times.
    """
    generator = np.random.default_rng(7)
    truth = np.clip(generator.beta(5, 2, 14), 0.05, 0.98)
    expected = {"sum": 100 * float(np.sum(truth + truth**2)), "first": 100 * float(truth[0] + truth[0] ** 2)}

    def combine(strata: Strata) -> dict[str, float]:
        points = [100 * float(mean.sum()) for _, mean in strata.values()]
        return {"sum": sum(points), "first": points[0]}

    covered = dict.fromkeys(expected, 0)
    for sample in range(200):
        vectors = {}
        for number, share in enumerate(truth):
            right = generator.random((generator.integers(sizes[0], sizes[1] + 1), 2)) < share
            vectors[str(number)] = np.stack([right.mean(axis=1), right.all(axis=1)], axis=1)
        found = intervals(Units(vectors, {}, np.array([[0.0, 0.0], [1.0, 1.0]])), combine, draws=200, seed=sample)
        for key, (low, high) in found.items():
            covered[key] += low <= expected[key] <= high
    assert covered["sum"] >= 181
    assert covered["first"] >= 181


def test_student_quantiles() -> None:
    for freedom, quantile in {1: 12.7062, 2: 4.3027, 3: 3.1824, 7: 2.3646, 30: 2.0423, 1e6: 1.95997}.items():
        assert t_quantile(0.975, freedom) == pytest.approx(quantile, abs=2e-4)
    assert t_quantile(0.8, 5) == pytest.approx(0.9195, abs=1e-4)
    assert t_quantile(0.975, 1.5) == pytest.approx(12.7062, abs=1e-4)
    assert interval([1.0, 2.0, 3.0]).half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)


@pytest.mark.parametrize("seeds", [3, 8])
def test_differences_over_seeds_and_questions_cover_and_see_what_they_promise(seeds: int) -> None:
    """Two benchmarks of 60 questions; the true difference is 0, then the smallest that 80 % should see."""
    generator = np.random.default_rng(seeds)
    spreads = (0.03, 0.1, 0.3)
    names = ["a", "b"] * 60
    planned = Components(*(spread**2 for spread in spreads)).detectable(seeds, 120)

    def experiment(true: float) -> np.ndarray:
        shapes = ((seeds, 1), (1, 120), (seeds, 120))
        return true + sum(s * generator.normal(size=shape) for s, shape in zip(spreads, shapes, strict=True))

    found = [crossed(experiment(0.0), names) for _ in range(400)]
    assert np.mean([f.interval.low <= 0 <= f.interval.high for f in found]) >= 0.92
    seen = np.mean([crossed(experiment(planned), names).interval.excludes_zero for _ in range(400)])
    assert 0.70 < seen < 0.92
    assert np.mean([f.components.rest for f in found]) == pytest.approx(0.09, rel=0.05)
    assert np.median([f.detectable for f in found]) == pytest.approx(planned, rel=0.3)
    assert Components(0.0, 0.01, 0.09).detectable(8, 4000) < Components(0.0, 0.01, 0.09).detectable(3, 30) / 8


def test_a_difference_of_rows_counts_benchmarks_alike() -> None:
    values = np.array([[1.0, 1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0, 0.0]])
    assert crossed(values, ["a", "a", "a", "b", "b"]).interval.mean == 0.5
    assert crossed(values).interval.mean == pytest.approx(0.6)
    assert crossed(np.zeros((2, 4))).interval.half == 0
    for wrong, names, message in (
        (values[:1], None, "at least 2 seeds"),
        (values * np.nan, None, "finite"),
        (values, ["a", "a", "a", "a", "b"], "at least 2 questions"),
        (values, ["a"], "5 questions but 1 benchmarks"),
    ):
        with pytest.raises(ValueError, match=message):
            crossed(wrong, names)
    with pytest.raises(ValueError, match="at least 2 seeds and 2 questions"):
        Components(1.0, 1.0, 1.0).detectable(1, 10)


def test_a_mean_that_rounds_to_zero_has_no_sign():
    assert interval([-0.01, -0.02]).text(1) == "0.0 ± 0.1"
    assert interval([-0.2]).text(1) == "-0.2"
