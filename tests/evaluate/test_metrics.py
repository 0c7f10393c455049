"""Hand-checked cases and properties of the metrics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from florence_vl.evaluate.metrics import (
    METRICS,
    anls,
    parse_choice,
    parse_yes_no,
    relaxed_match,
    score_all,
    substring_match,
    vqa_accuracy,
)
from florence_vl.evaluate.metrics.reasoning import read_number
from florence_vl.evaluate.metrics.text import edit_distance, evalai_normalize, vqa_normalize

CHOICES = ["a cat", "a dog", "a pig"]

# One reference of each metric, with a right answer.
REFERENCES = {
    "vqa_accuracy": ({"answers": ["red"] * 10}, "Red"),
    "evalai_accuracy": ({"answers": ["two dogs"] * 10}, "2 dogs."),
    "exact_match": ({"answer": "left"}, "Left."),
    "anls": ({"answers": ["12 May 1999"]}, "12 may 1999"),
    "relaxed_accuracy": ({"answer": "100", "type": "human_test"}, "104"),
    "ocrbench": (
        {"answer": ["STOP"], "dataset": "IIIT5K", "question_type": "Regular Text Recognition"},
        "It says stop",
    ),
    "yes_no": ({"answer": "no"}, "No"),
    "pope": ({"answer": "yes"}, "Yes."),
    "mme": ({"answer": "Yes", "category": "count", "unit": "1.jpg"}, "yes"),
    "hallusion_bench": (
        {"answer": "1", "category": "VD", "subcategory": "x", "set_id": "0", "figure_id": "1", "question_id": "0"},
        "Yes, it is.",
    ),
    "multiple_choice": ({"answer": "B", "choices": CHOICES}, "B"),
    "choice_by_category": ({"answer": "B", "choices": CHOICES, "category": "x"}, "(B)"),
    "circular_choice": ({"answer": "B", "choices": CHOICES, "unit": 7}, "B."),
    "mmstar": ({"answer": "B", "choices": CHOICES, "category": "math", "l2_category": "geometry"}, "B: a dog"),
    "mmvp": ({"answer": "B", "choices": CHOICES[:2], "unit": 1}, "b"),
    "cv_bench": ({"answer": "B", "choices": CHOICES, "source": "COCO"}, "(B)"),
    "choice_or_text": ({"answer": "Downhill", "choices": []}, "downhill."),
    "mmmu": ({"answer": "B", "choices": CHOICES, "question_type": "multiple-choice", "subject": "Art"}, "B"),
    "short_answer": ({"answer": "red bus", "choices": [], "skill": "color"}, "the red bus."),
    "mathvista": ({"answer": "14", "question_type": "free_form", "answer_type": "integer", "choices": None}, "14"),
}


def test_every_metric_has_a_reference_here() -> None:
    assert set(REFERENCES) | {"mmvet", "llava_bench"} == set(METRICS.names())


@pytest.mark.parametrize("name", REFERENCES)
def test_right_empty_and_runaway(name: str) -> None:
    reference, right = REFERENCES[name]
    chosen = METRICS[name]
    assert chosen.judge(right, reference).score == 1
    assert chosen.judge(right, reference).kind == "right"
    for empty in ("", "  ", "\n\t"):
        found = chosen.judge(empty, reference)
        assert (found.score, found.kind, found.parsed) == (0, "empty", None)
    runaway = f"{right} assistant church piano " * 20
    found = chosen.judge(runaway, reference, finished=False)
    assert (found.score, found.kind) == (0, "runaway")


@pytest.mark.parametrize("answer", ["inf", "-INF.", "nan", "The answer is " + "9" * 400, "9" * 400])
def test_numbers_that_are_none(answer: str) -> None:
    reference, _ = REFERENCES["mathvista"]
    assert METRICS["mathvista"].judge(answer, reference).score == 0


@pytest.mark.parametrize("name", REFERENCES)
@given(answer=st.text(max_size=40), finished=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_verdict_is_bounded_and_consistent(name: str, answer: str, finished: bool) -> None:
    reference, _ = REFERENCES[name]
    found = METRICS[name].judge(answer, reference, finished)
    assert 0 <= found.score <= 1
    assert (found.kind == "right") == (found.score == 1)
    assert (found.kind == "empty") == (not answer.strip())
    if not finished:
        assert found.kind not in ("wrong", "unparsed")


@pytest.mark.parametrize(
    ("answer", "letter", "cut"),
    [
        ("B", "B", "B"),
        ("(b)", "B", "B"),
        ("**B.**", "B", "B"),
        ("B. a dog", "B", "B"),
        ("B. a d", "B", "B"),  # cut inside the option that it names
        ("(C) a pig", "C", "C"),
        ("B a dog", "B", "B"),
        ("B\nBecause it barks.", "B", "B"),  # the first line is whole
        ("The answer is (B).", "B", "B"),
        ("The correct option is: B", "B", "B"),
        ("I think that the answer is (B).", "B", None),
        ("答案是B", "B", None),
        ("a dog", "B", None),
        ("A church piano", None, None),  # an article, not a letter
        ("The answer is a cat", "A", None),  # by its words, not by the article
        ("The answer is a church", None, None),
        ("Cassistant churchpiano", None, None),  # what the released scripts counted as C
        ("A. a cat B. a dog", None, None),
        ("The answer is A. No, the answer is B.", "B", None),
        ("The answer is A. The answer is B.", None, None),
        ("D", None, None),  # no such option
        ("AB", None, None),
        ("dog cat", None, None),
    ],
)
def test_parse_choice(answer: str, letter: str | None, cut: str | None) -> None:
    assert parse_choice(answer, CHOICES) == letter
    assert parse_choice(answer, CHOICES, finished=False) == cut


def test_the_authors_rule_is_lenient() -> None:
    assert substring_match("", "B")
    assert substring_match("Brown bears", "B")
    assert not substring_match("A", "B")
    pair = [{"answer": letter, "choices": CHOICES[:2], "unit": unit} for unit, letter in ((1, "A"), (2, "B"))]
    chosen = METRICS["mmvp"]
    scores = score_all(chosen, [(chosen.judge("", reference), reference) for reference in pair])
    assert scores == {"pair": 0, "single": 0, "as_authors": 100}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("yes", "yes"), ("No.", "no"), ('"Yes"', "yes"), ("y", "yes"), ("Yes, there is no dog.", "yes"),
        ("No, it isn't", "no"), ("Yes or no", None), ("Yes. No.", None), ("yes no", None), ("Not sure", None),
        ("nope", "no"), ("It is. Yes", "yes"), ("1", None),
    ],
)  # fmt: skip
def test_parse_yes_no(answer: str, said: str | None) -> None:
    assert parse_yes_no(answer) == said


def test_vqa_accuracy_leaves_one_annotator_out() -> None:
    answers = ["red"] * 3 + ["blue"] * 7
    # "red": for the 7 others 3/3, for the 3 who said it 2/3.
    assert vqa_accuracy("Red.", answers) == pytest.approx((7 + 3 * 2 / 3) / 10)
    assert vqa_accuracy("blue", answers) == 1
    assert vqa_accuracy("green", answers) == 0
    assert vqa_accuracy("a", ["a"] * 10) == 0  # nothing is left of an article


def test_normalizations() -> None:
    assert vqa_normalize("The two men, aren't") == "2 men aren't"
    assert vqa_normalize("dont  know.") == "don't know"
    assert vqa_normalize("1,000") == "1000"
    assert evalai_normalize("The dog's ball?") == "dog 's ball"


def test_anls() -> None:
    assert anls("hello", ["hallo"]) == pytest.approx(0.8)
    assert anls("help", ["hallo"]) == 0  # 1 - 3/5 is below the threshold
    assert anls(" HELLO ", ["x", "hello"]) == 1
    assert anls("", [""]) == 0


@given(st.text(max_size=12), st.text(max_size=12), st.text(max_size=12))
@settings(max_examples=100, deadline=None)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert edit_distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [("104", "100", True), ("106", "100", False), ("5%", "0.05", True), ("Red", "red", True), ("0", "0.0", True),
     ("0.1", "0", False), ("nan", "nan", True), ("nan", "3", False), ("", "", False), ("-95", "-100", True)],
)  # fmt: skip
def test_relaxed_match(answer: str, wanted: str, right: bool) -> None:
    assert relaxed_match(answer, wanted) is right


def test_pope_counts() -> None:
    chosen = METRICS["pope"]
    pairs = [("yes", "yes"), ("no", "yes"), ("what?", "yes"), ("yes", "no"), ("no", "no")]
    judged = [(chosen.judge(said, {"answer": true}), {"answer": true}) for said, true in pairs]
    scores = score_all(chosen, judged)
    assert scores["accuracy"] == pytest.approx(40)
    assert scores["precision"] == pytest.approx(50)
    assert scores["recall"] == pytest.approx(100 / 3)
    assert scores["f1"] == pytest.approx(40)
    assert scores["yes_ratio"] == pytest.approx(40)


def test_mme_points() -> None:
    chosen = METRICS["mme"]
    answers = {("count", "1"): "yes no", ("count", "2"): "yes yes", ("code_reasoning", "3"): "yes no"}
    judged = []
    for (category, unit), said in answers.items():
        for word, true in zip(said.split(), ("Yes", "No"), strict=True):
            reference = {"answer": true, "category": category, "unit": unit}
            judged.append((chosen.judge(word, reference), reference))
    scores = score_all(chosen, judged)
    assert scores["perception"] == pytest.approx(75 + 50)
    assert scores["cognition"] == pytest.approx(200)
    assert scores["accuracy_plus"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match="two questions of each image, found 1"):
        score_all(chosen, judged[:1])


def test_cv_bench_averages_parts_not_questions() -> None:
    chosen = METRICS["cv_bench"]
    said = {"ADE20K": "ABBB", "COCO": "AA", "Omni3D": "A"}
    references = {s: {"answer": "A", "choices": CHOICES, "source": s} for s in said}
    judged = [(chosen.judge(letter, references[s]), references[s]) for s, letters in said.items() for letter in letters]
    scores = score_all(chosen, judged)
    assert scores["2D"] == pytest.approx(62.5)
    assert scores["3D"] == pytest.approx(100)
    assert scores["mean"] == pytest.approx(81.25)


def test_hallusion_bench_groups() -> None:
    chosen = METRICS["hallusion_bench"]
    judged = []
    for question, figure, said in (("0", "0", "yes"), ("0", "1", "no"), ("1", "0", "yes"), ("1", "1", "yes")):
        reference = {
            "answer": "1",
            "category": "VD",
            "subcategory": "a",
            "set_id": 3,
            "question_id": question,
            "figure_id": figure,
        }
        judged.append((chosen.judge(said, reference), reference))
    assert score_all(chosen, judged) == pytest.approx({"aAcc": 75, "qAcc": 50, "fAcc": 50})


def test_circular_needs_every_rotation() -> None:
    chosen = METRICS["circular_choice"]
    rows = [(1, "B", "B"), (1_000_001, "A", "A"), (2, "C", "C"), (1_000_002, "A", "B")]
    judged = []
    for unit, answer, said in rows:
        reference = {"answer": answer, "choices": CHOICES, "unit": unit}
        judged.append((chosen.judge(said, reference), reference))
    assert score_all(chosen, judged) == pytest.approx({"circular": 50, "single": 75})


@pytest.mark.parametrize(
    ("answer", "number"),
    [("14", 14), ("$1.45", 1.45), ("The answer is 14.", 14), ("So 2 + 2 = 4.\nThe final answer is \\boxed{4}", 4),
     ("1,000", 1000), ("There are 3 cats and 4 dogs.", None), ("It has 7 legs. There are 12 of them.", 12),
     ("none", None),
     ("2 and 5 make 7", None), ("5 + 9 = 14.", 14), ("14%", 14), ("-3", -3), ("The value is 3.5", 3.5)],
)  # fmt: skip
def test_read_number(answer: str, number: float | None) -> None:
    assert read_number(answer) == number


def test_mathvista_types() -> None:
    chosen = METRICS["mathvista"]
    free = {"question_type": "free_form", "choices": None}
    assert chosen.judge("0.58", free | {"answer": "0.6", "answer_type": "float", "precision": 1.0}).score == 1
    assert chosen.judge("14.7", free | {"answer": "14", "answer_type": "integer"}).score == 0
    assert chosen.judge("The list is [1, 2]", free | {"answer": "[1, 2]", "answer_type": "list"}).score == 1
    options = {"question_type": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11"], "answer": "8/11"}
    assert chosen.judge("The correct answer is (B) 8/11.", options).score == 1
    assert chosen.judge("8/1", options).score == 0  # lmms-eval takes the option nearest in spelling


def test_mmmu_open_answers() -> None:
    chosen = METRICS["mmmu"]
    reference = {"question_type": "open", "answer": "['1/2', '0.5']", "choices": []}
    assert chosen.judge("So the result is 0.5", reference).score == 1
    assert chosen.judge("Thus the answer is 1/2.", reference).score == 1
    assert chosen.judge("0.25", reference).score == 0


def test_judged_metrics_refuse_to_guess() -> None:
    with pytest.raises(ValueError, match="needs a judge"):
        METRICS["mmvet"].judge("anything", {"answer": "x"})


def test_combine_of_llava_bench_is_a_ratio() -> None:
    strata = {"conv": (2, np.array([4.0, 8.0])), "detail": (2, np.array([6.0, 8.0]))}
    assert METRICS["llava_bench"].combine(strata) == pytest.approx({"all": 62.5, "conv": 50, "detail": 75})
