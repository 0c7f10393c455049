"""Documents, charts and text in pictures: ANLS, relaxed accuracy, OCRBench."""

from __future__ import annotations

import math
from collections.abc import Sequence

from florence_vl.evaluate.metrics.base import Metric, Reference, Strata, Verdict, metric, pooled, verdict
from florence_vl.evaluate.metrics.text import edit_distance


def anls(answer: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalized Levenshtein similarity of one question (Biten et al., 2019).

    The maximum of 1 - distance / longer length over the accepted answers, lower-cased with single spaces; 0 below the
    threshold.
    """
    given = " ".join(answer.lower().split())
    if not given:
        return 0.0
    best = 0.0
    for accepted in answers:
        wanted = " ".join(accepted.lower().split())
        if min(len(given), len(wanted)) < threshold * max(len(given), len(wanted)):
            continue  # the distance is at least the difference in length
        best = max(best, 1 - edit_distance(given, wanted) / max(len(given), len(wanted)))
    return best if best >= threshold else 0.0


def relaxed_match(answer: str, wanted: str, tolerance: float = 0.05) -> bool:
    """ChartQA's relaxed accuracy: numbers within 5 %, otherwise equality ignoring case (Masry et al., 2022)."""
    answer, wanted = answer.strip(), wanted.strip()
    if not answer:
        return False
    given, target = _number(answer), _number(wanted)
    if given is None or target is None:
        return answer.lower() == wanted.lower()
    if target == 0:
        return given == 0
    return abs(given - target) / abs(target) <= tolerance


def _number(text: str) -> float | None:
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@metric("anls")
class ANLS(Metric):
    """Average normalized Levenshtein similarity (DocVQA, InfoVQA)."""

    headline = "anls"

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        return verdict(answer, " ".join(answer.lower().split()), anls(answer, reference["answers"]), finished)


@metric("relaxed_accuracy")
class RelaxedAccuracy(Metric):
    """Relaxed accuracy, over all questions and per question type (ChartQA)."""

    headline = "relaxed_overall"

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        return verdict(answer, answer.strip(), float(relaxed_match(answer, reference["answer"])), finished)

    def stratum(self, reference: Reference) -> str:
        return "human" if reference.get("type", "human_test") == "human_test" else "augmented"

    def combine(self, strata: Strata) -> dict[str, float]:
        parts = {f"relaxed_{name}": 100 * float(mean[0]) for name, (_, mean) in strata.items()}
        return {"relaxed_overall": 100 * float(pooled(strata)[0]), **parts}


@metric("ocrbench")
class OCRBench(Metric):
    """OCRBench: the answer contains an accepted answer (Liu et al., 2023); spaces are ignored in formulas.

    Containment rewards endless text, so an answer that reached the token limit is wrong here.
    """

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        accepted = reference["answer"]
        accepted = [accepted] if isinstance(accepted, str) else accepted
        formula = reference.get("dataset") == "HME100k"
        given = _ocr_normalize(answer, formula)
        hit = finished and any(wanted and wanted in given for wanted in (_ocr_normalize(a, formula) for a in accepted))
        return verdict(answer, given or None, float(hit), finished)

    def stratum(self, reference: Reference) -> str:
        return reference.get("question_type") or ""

    def combine(self, strata: Strata) -> dict[str, float]:
        by_type = {name: 100 * float(mean[0]) for name, (_, mean) in strata.items() if name}
        return {"accuracy": 100 * float(pooled(strata)[0]), **by_type}


def _ocr_normalize(text: str, formula: bool) -> str:
    if formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    return text.translate(_FULLWIDTH).lower().strip().replace("\n", " ")


# Full-width forms of ASCII, and the ideographic space.
_FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
