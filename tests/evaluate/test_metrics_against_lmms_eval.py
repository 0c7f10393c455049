"""Our metrics against lmms-eval's functions on thousands of generated answers.

Each comparison names the rules by which we are allowed to differ. A disagreement that no rule explains fails the test,
and so does a rule that explains nothing.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from florence_vl.evaluate.metrics import METRICS, anls, parse_choice, relaxed_match, score_all, vqa_accuracy
from florence_vl.evaluate.metrics.text import evalai_normalize, vqa_normalize

pytest.importorskip("lmms_eval")
os.environ.setdefault("OPENAI_API_KEY", "none")  # some task modules want one at import

WORDS = [
    "a",
    "the",
    "red",
    "two",
    "dog's",
    "1,000",
    "isnt",
    "yes",
    "no",
    "B",
    "50%",
    "3.5",
    "none",
    "can't",
    "T-shirt",
    "U.S.",
]
MARKS = ["", "", "", ".", ",", "?", "!", " - ", "\n", ";"]
CHOICES = ["a cat", "a dog", "a pig", "none of them"]

Rule = Callable[[Any], bool]


def texts(count: int, seed: int = 0, words: list[str] | None = None) -> list[str]:
    draw = random.Random(seed)
    words = words or WORDS
    return [
        "".join(draw.choice(words) + draw.choice(MARKS) + " " for _ in range(draw.randint(0, 4))) for _ in range(count)
    ]


def choice_texts(count: int) -> list[str]:
    draw = random.Random(1)
    forms = ["{}", "({})", "{}.", "{}. {}", "{}) {}", "{} {}", "The answer is {}.", "The answer is ({})", "{}: {}"]
    forms += ["Answer: {}", "{1}", "{1}.", "I think {1}", "", "{}\n{}", "Option {}", "**{}**", "A {}"]
    forms += ["the correct answer is {} because it is {}", "{}assistant piano"]
    out = []
    for _ in range(count):
        position = draw.randrange(5)
        letter = "ABCDE"[position]
        out.append(draw.choice(forms).format(letter, [*CHOICES, "a cow"][position]))
    return out


def explain(cases: list[Any], agree: Callable[[Any], bool], rules: dict[str, Rule]) -> dict[str, int]:
    """Sort disagreements by the rule that explains them; fail on an unexplained one or on an idle rule."""
    found = dict.fromkeys(rules, 0)
    for case in cases:
        if agree(case):
            continue
        reason = next((name for name, rule in rules.items() if rule(case)), None)
        assert reason is not None, f"unexplained disagreement on {case!r}"
        found[reason] += 1
    idle = [name for name, count in found.items() if not count]
    assert not idle, f"no answer needed the rule {idle}"
    return found


def test_vqa_normalization_is_identical() -> None:
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    theirs = EvalAIAnswerProcessor()
    for text in texts(3000):
        assert evalai_normalize(text) == theirs(text)
        cleaned = text.replace("\n", " ").replace("\t", " ").strip()
        assert vqa_normalize(text) == theirs.process_digit_article(theirs.process_punctuation(cleaned))


def test_vqa_accuracy() -> None:
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results_val

    draw = random.Random(2)
    pool = texts(40, seed=3, words=["a", "red", "two", "2", "dogs"])
    cases = [(draw.choice(pool), [draw.choice(pool) for _ in range(10)]) for _ in range(1500)]
    vanishes = {"an answer of which normalization leaves nothing is wrong": lambda c: not vqa_normalize(c[0])}

    def vqav2(case: Any) -> bool:
        said, answers = case
        doc = {"answers": [{"answer": a, "answer_id": i} for i, a in enumerate(answers)], "question_id": 0}
        return math.isclose(vqa_accuracy(said, answers), vqav2_process_results_val(doc, [said])["exact_match"])

    def textvqa(case: Any) -> bool:
        said, answers = case
        theirs = textvqa_process_results({"answers": list(answers), "question_id": 0}, [said])["exact_match"]
        return math.isclose(vqa_accuracy(said, answers, evalai_normalize), theirs)

    explain(cases, vqav2, vanishes)
    explain(cases, textvqa, vanishes)


def test_anls() -> None:
    from lmms_eval.api.metrics import anls as theirs

    draw = random.Random(4)
    pool = texts(60, seed=5)
    cases = [(draw.choice(pool), [draw.choice(pool), draw.choice(pool)]) for _ in range(1500)]

    def spaced(case: Any) -> bool:
        return any(t != " ".join(t.split()) for t in (case[0], *case[1]))

    explain(
        cases,
        lambda c: math.isclose(anls(*c), theirs(references=c[1], predictions=[c[0]])["anls"], abs_tol=1e-9),
        {
            "an empty answer is wrong": lambda c: not c[0].strip(),
            "they divide by the length before spaces are collapsed, we after": spaced,
        },
    )
    clean = [(" ".join(said.split()) or "x", [" ".join(a.split()) or "y" for a in answers]) for said, answers in cases]
    for said, answers in clean:
        assert math.isclose(anls(said, answers), theirs(references=answers, predictions=[said])["anls"], abs_tol=1e-9)


def test_relaxed_accuracy() -> None:
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness

    draw = random.Random(6)
    pool = [
        "0",
        "0.0",
        "5",
        "5.1",
        "5.3",
        "5%",
        "0.05",
        "-5",
        "red",
        "Red",
        " 5",
        "",
        "nan",
        "inf",
        "1,000",
        "1000",
        "five",
    ]
    cases = [(draw.choice(pool), draw.choice(pool)) for _ in range(2000)]
    explain(
        cases,
        lambda c: relaxed_match(*c) == relaxed_correctness(*c),
        {
            "an empty answer is wrong": lambda c: not c[0].strip(),
            "a target of zero is a number too": lambda c: c[1].strip() in ("0", "0.0"),
            "nan and inf are words, not numbers": lambda c: bool({"nan", "inf"} & {c[0].strip(), c[1].strip()}),
        },
    )


def test_pope() -> None:
    from lmms_eval.tasks.pope import utils as theirs

    chosen = METRICS["pope"]
    pool = ["yes", "no", "Yes", " no ", "Yes.", "No, there is none", "maybe", "", "yes and no", "nothing"]
    draw = random.Random(7)
    cases = [(draw.choice(pool), draw.choice(["yes", "no"])) for _ in range(1000)]

    def agree(case: Any) -> bool:
        doc = {"answer": case[1], "question_id": 0}
        return (
            chosen.judge(case[0], {"answer": case[1]}).score
            == theirs.pope_process_results(doc, [case[0]])["pope_accuracy"]["score"]
        )

    explain(
        cases,
        agree,
        {
            "we read yes or no with punctuation or more words after it": lambda c: (
                re.match(r"yes\W|no\W", c[0].lower()) is not None
            )
        },
    )

    plain = [c for c in cases if c[0].strip().lower() in ("yes", "no")]
    ours = score_all(chosen, [(chosen.judge(said, {"answer": true}), {"answer": true}) for said, true in plain])
    rows = [
        theirs.pope_process_results({"answer": true, "question_id": 0}, [said])["pope_accuracy"] for said, true in plain
    ]
    assert ours["accuracy"] == pytest.approx(100 * theirs.pope_aggregate_accuracy(rows))
    assert ours["precision"] == pytest.approx(100 * theirs.pope_aggregate_precision(rows))
    assert ours["recall"] == pytest.approx(100 * theirs.pope_aggregate_recall(rows))
    assert ours["f1"] == pytest.approx(100 * theirs.pope_aggregate_f1_score(rows))
    # theirs is the share of questions whose *answer is* yes; the benchmark means the share of yes said
    assert 100 * theirs.pope_aggregate_yes_ratio(rows) == pytest.approx(
        100 * sum(true == "yes" for _, true in plain) / len(plain)
    )
    assert ours["yes_ratio"] == pytest.approx(
        100 * sum(said.strip().lower() == "yes" for said, _ in plain) / len(plain)
    )


def test_mme() -> None:
    from lmms_eval.tasks.mme import utils as theirs

    chosen = METRICS["mme"]
    draw = random.Random(8)
    pool = ["Yes", "No.", "yes, it is", "no", "N", "a yes", "", "unknown", "nothing", "not at all", "Yes or no"]
    said = [draw.choice(pool) for _ in range(800)]
    docs = [
        {
            "question_id": f"{i // 2}.jpg",
            "answer": ("Yes", "No")[i % 2],
            "category": ("count", "code_reasoning")[i // 400],
        }
        for i in range(800)
    ]
    references = [{"answer": d["answer"], "category": d["category"], "unit": d["question_id"]} for d in docs]

    def agree(i: int) -> bool:
        (row,) = theirs.mme_process_results(docs[i], [said[i]]).values()
        return row["score"] == chosen.judge(said[i], references[i]).score

    explain(
        list(range(800)),
        agree,
        {
            "they search the first four letters, so 'nothing' and 'unknown' are no": lambda i: (
                said[i] in ("unknown", "nothing", "not at all", "a yes")
            ),
            "they take the first of 'yes or no'": lambda i: said[i] == "Yes or no",
        },
    )
    plain = [random.Random(i).choice(["yes", "no"]) for i in range(800)]
    rows = [next(iter(theirs.mme_process_results(d, [s]).items())) for d, s in zip(docs, plain, strict=True)]
    ours = score_all(chosen, [(chosen.judge(s, r), r) for s, r in zip(plain, references, strict=True)])
    for key, name in (("mme_perception_score", "perception"), ("mme_cognition_score", "cognition")):
        assert ours[name] == pytest.approx(theirs.mme_aggregate_results([row for k, row in rows if k == key]))


CHOICE_RULES: dict[str, Rule] = {
    "they take any letter in the text: an article, a word's initial, a runaway 'Bassistant'": lambda t: (
        parse_choice(t, CHOICES) is None
    ),
    "we read the option itself, they a letter inside it": lambda t: any(choice in t.lower() for choice in CHOICES),
}


def test_multiple_choice_against_the_shared_extractor() -> None:
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

    found = explain(
        choice_texts(3000),
        lambda t: (parse_choice(t, CHOICES) or "") == extract_mcq_answer(t, choices=list("ABCD")),
        CHOICE_RULES,
    )
    assert sum(found.values()) < 3000 * 0.4


def test_multiple_choice_never_contradicts_benchmark_parsers() -> None:
    """Where SEED, ScienceQA, AI2D, MMVP, CV-Bench and MMMU read another letter than we, the reason is stated."""
    from lmms_eval.tasks._task_utils.mmmu_mcq_utils import parse_mmmu_multi_choice_response
    from lmms_eval.tasks.cv_bench.utils import _extract_answer_letter as cv_bench
    from lmms_eval.tasks.mmvp.utils import _extract_answer_letter as mmvp
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results
    from lmms_eval.tasks.seedbench.utils import seed_process_result

    def sqa(text: str) -> str:
        for position, letter in enumerate("ABCD"):
            if sqa_process_results({"choices": CHOICES, "answer": position}, [text])["exact_match"]:
                return letter
        return ""

    def seed(text: str) -> str:
        doc = {"answer": "A", "data_type": "image", "question_id": 0}
        return seed_process_result(doc, [text])["seed_all"]["pred"].upper()

    def ours(text: str) -> str:
        return parse_choice(text, CHOICES) or ""

    cases = choice_texts(2000)
    first = "they look at the first letter of the text only, whatever it begins"
    longer = "we read longer forms of an answer, they don't"
    explain(cases, lambda t: ours(t) == cv_bench(t), {first: lambda t: cv_bench(t) in ("", t.strip(" (").upper()[:1])})
    explain(cases, lambda t: ours(t) == seed(t), {first: lambda t: seed(t) == t.strip()[:1].upper()})
    explain(cases, lambda t: ours(t) == sqa(t), {longer: lambda t: sqa(t) == "" or ours(t) == ""})
    two = [t for t in cases if not re.search(r"\b[CDE]\b|pig|none|cow", t)]

    def ours_two(text: str) -> str:
        return parse_choice(text, CHOICES[:2]) or ""

    guesses = "they accept any standing a or b, articles included"
    explain(
        two,
        lambda t: ours_two(t) == mmvp(t),
        {guesses: lambda t: re.search(r"\b[ab]", t, re.I) is not None or not ours_two(t)},
    )

    def mmmu(text: str) -> set[str]:
        options = dict(zip("ABCD", CHOICES, strict=True))
        read = set()
        for seed in range(8):
            random.seed(seed)
            read.add(parse_mmmu_multi_choice_response(text, list("ABCD"), options))
        return read

    explain(
        cases,
        lambda t: mmmu(t) == {ours(t)},
        {
            "they draw a letter at random where they read none": lambda t: len(mmmu(t)) > 1,
            "they take any letter in the text": lambda t: ours(t) == "",
        },
    )


def test_mmmu_open() -> None:
    from lmms_eval.tasks.mmmu import utils as theirs

    from florence_vl.evaluate.metrics.reasoning import mmmu_open_candidates, mmmu_open_match

    draw = random.Random(9)
    words = ["so", "the", "answer", "is", "14", "3.5", "1,000", "=", "red", "x", "therefore", "-2", "1e5"]
    cases = [t for t in texts(2500, seed=10, words=words) if t.strip()]
    for text in cases:
        assert set(mmmu_open_candidates(text)) == set(theirs.parse_open_response(text)), text
        gold = draw.choice(["14", "red", "x", "3.50", "1000"])
        assert mmmu_open_match(mmmu_open_candidates(text), [gold]) == theirs.eval_open(
            gold, theirs.parse_open_response(text)
        )


def test_ocrbench() -> None:
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    draw = random.Random(11)
    pool = ["STOP", "stop", "It says Stop.", "ＳＴＯＰ", "", "x ^ 2", "x^2", "s top"]
    cases = [
        (draw.choice(pool), draw.choice(["STOP", "x^2", ["go", "stop"]]), draw.choice(["IIIT5K", "HME100k"]))
        for _ in range(800)
    ]

    def agree(case: Any) -> bool:
        doc = {"answer": case[1], "dataset": case[2], "question_type": "Regular Text Recognition"}
        return (
            METRICS["ocrbench"].judge(case[0], doc).score
            == ocrbench_process_results(doc, [case[0]])["ocrbench_accuracy"]["score"]
        )

    assert all(agree(case) for case in cases)


def test_mathvista() -> None:
    pytest.importorskip("Levenshtein")
    from lmms_eval.tasks.mathvista.mathvista_evals import MathVistaEvaluator

    theirs = MathVistaEvaluator()
    chosen = METRICS["mathvista"]
    draw = random.Random(12)
    problems = [
        {"question_type": "free_form", "answer_type": "integer", "choices": None, "precision": None, "answer": "14"},
        {"question_type": "free_form", "answer_type": "float", "choices": None, "precision": 1, "answer": "0.6"},
        {
            "question_type": "multi_choice",
            "answer_type": "text",
            "choices": CHOICES,
            "precision": None,
            "answer": "a dog",
        },
    ]
    pool = ["14", "14.0", "14.7", "0.6", "0.58", "B", "(B)", "a dog", "a dgo", "Q", "fourteen"]
    cases = [(draw.choice(pool), draw.choice(problems)) for _ in range(1500)]

    def agree(case: Any) -> bool:
        said, p = case
        read = theirs.normalize_extracted_answer(
            said, p["choices"], p["question_type"], p["answer_type"], p["precision"]
        )
        return bool(chosen.judge(said, p).score) == theirs.safe_equal(read, p["answer"])

    explain(
        cases,
        agree,
        {
            "they cut 14.7 to the integer 14": lambda c: c[1]["answer_type"] == "integer" and c[0] == "14.7",
            "they take the option nearest in spelling": lambda c: (
                c[1]["question_type"] == "multi_choice" and chosen.judge(*c).parsed is None
            ),
        },
    )


def test_cv_bench_and_mmstar_aggregates() -> None:
    from lmms_eval.tasks.cv_bench.utils import cv_bench_default_aggregate_results
    from lmms_eval.tasks.mmstar.utils import mmstar_aggregate_results

    draw = random.Random(13)
    cv, star = METRICS["cv_bench"], METRICS["mmstar"]
    rows, judged, star_rows, star_judged = [], [], [], []
    for _ in range(300):
        letter = draw.choice("AB")
        reference = {"answer": "A", "choices": CHOICES, "source": draw.choice(["ADE20K", "COCO", "Omni3D"])}
        rows.append({"source": reference["source"], "is_correct": letter == "A"})
        judged.append((cv.judge(letter, reference), reference))
        kind = draw.choice(["geometry", "counting", "physics"])
        reference = {"answer": "A", "choices": CHOICES, "category": "all", "l2_category": kind}
        star_rows.append({"l2_category": kind, "score": float(letter == "A")})
        star_judged.append((star.judge(letter, reference), reference))
    assert score_all(cv, judged)["mean"] == pytest.approx(100 * cv_bench_default_aggregate_results(rows))
    assert score_all(star, star_judged)["average"] == pytest.approx(100 * mmstar_aggregate_results(star_rows))


def test_hallusion_bench_groups() -> None:
    from lmms_eval.tasks.hallusion_bench import utils as theirs

    draw = random.Random(14)
    chosen = METRICS["hallusion_bench"]
    rows, judged = [], []
    for number in range(240):
        category = ("VD", "VS")[number % 2]
        row = {
            "category": category, "subcategory": "s", "set_id": str(number // 12), "figure_id": str(number // 2 % 3),
            "visual_input": "1", "question_id": str(number // 6 % 2),
        }  # fmt: skip
        said = draw.choice(["yes", "no"])
        rows.append(row | {"correct": int(said == "yes"), "check": str(int(said == "yes"))})
        reference = row | {"answer": "1"}
        judged.append((chosen.judge(said, reference), reference))
    scores = score_all(chosen, judged)
    everything, figures, pairs = (
        theirs.get_eval_all(rows, "check"),
        theirs.get_eval_fig(rows),
        theirs.get_eval_pair_all(rows, "check"),
    )
    assert scores["aAcc"] == pytest.approx(100 * everything["correct"] / everything["total"])
    assert scores["fAcc"] == pytest.approx(100 * figures["correct"] / figures["total"])
    assert scores["qAcc"] == pytest.approx(100 * pairs["correct"] / pairs["total"])
