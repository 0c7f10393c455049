"""Intervals, paired comparison, and the paper's averages."""

from __future__ import annotations

import math

import numpy as np
import pytest

from florence_vl.evaluate.metrics import METRICS, Units, stratify
from florence_vl.evaluate.scoring import averages, reported_results, reported_row, reported_rows
from florence_vl.statistics import compare, intervals, paper_average, sign_test

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
    low, high = intervals(units(right), METRICS["multiple_choice"], draws=2000)["accuracy"]
    width = 2 * 1.96 * 100 * math.sqrt(0.75 * 0.25 / 400)
    assert low < 75 < high
    assert high - low == pytest.approx(width, rel=0.1)
    assert intervals(units(right), METRICS["multiple_choice"]) == intervals(units(right), METRICS["multiple_choice"])


def test_pairs_are_resampled_as_pairs() -> None:
    """Two answers that always agree carry the information of one: the interval must not shrink."""
    right = [ok for i in range(200) for ok in [i % 2 == 0] * 2]
    low, high = intervals(units(right, "mmvp"), METRICS["mmvp"], draws=2000)["single"]
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.25 / 200), rel=0.1)


def test_many_distinct_units_are_drawn_one_by_one() -> None:
    chosen = METRICS["anls"]
    generator = np.random.default_rng(0)
    found = stratify(chosen, [(chosen.judge("a", {"answers": ["a"]}), {"answers": ["a"]})] * 6000)
    found.vectors[""] = generator.random((6000, 1))
    low, high = intervals(found, chosen, draws=200)["anls"]
    assert high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(1 / 12 / 6000), rel=0.25)


def test_paired_comparison_sees_what_unpaired_intervals_hide() -> None:
    first = [i % 2 == 0 for i in range(300)]
    second = [ok or i % 30 == 1 for i, ok in enumerate(first)]  # 10 questions won, none lost
    result = compare(units(first), units(second), METRICS["multiple_choice"], "accuracy",
                     [(float(a), float(b)) for a, b in zip(first, second, strict=True)])  # fmt: skip
    assert (result.won, result.lost, result.tied, result.questions) == (10, 0, 290, 300)
    assert result.difference == pytest.approx(100 * 10 / 300)
    assert result.significant
    assert result.p_value < 0.01
    assert result.sign_test == pytest.approx(2 / 2**10)
    same = compare(units(first), units(first), METRICS["multiple_choice"], "accuracy", [(1.0, 1.0)] * 300)
    assert not same.significant
    assert same.p_value == same.sign_test == 1


def test_comparison_refuses_other_questions() -> None:
    with pytest.raises(ValueError, match="different questions"):
        compare(units([True]), units([True, False]), METRICS["multiple_choice"], "accuracy", [])


@pytest.mark.parametrize(("won", "lost", "p"), [(0, 0, 1), (5, 5, 1), (3, 0, 0.25), (8, 2, 0.109375)])
def test_sign_test(won: int, lost: int, p: float) -> None:
    assert sign_test(won, lost) == pytest.approx(p)
    assert sign_test(lost, won) == pytest.approx(p)
