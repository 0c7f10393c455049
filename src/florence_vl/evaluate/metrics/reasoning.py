"""Answers inside longer text, parsed without a judge: MMMU and MathVista."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from florence_vl.evaluate.metrics.base import Metric, Reference, Strata, Verdict, metric, pooled, verdict
from florence_vl.evaluate.metrics.choice import parse_choice
from florence_vl.evaluate.metrics.final import plain_text, unwrapped

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBER_FORMS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:[eE][-+]?\d+)?"
_STATED_NUMBER = re.compile(
    rf"(?:\b(?:answer|value|result|total)\b[^.\n\d-]{{0,40}}?(?:is|:|=|of)\s*|\\boxed{{)[$€£]?\s*({_NUMBER})"
)
_PLAIN_NUMBER = re.compile(rf"(?<![\w.])({_NUMBER})(?![\w,]{{0,40}}\d)")
_CONCLUSION = re.compile(
    r"=|\b(?:so|thus|therefore|hence|equals|gives|makes|leaves|get|total\s(?:of|is))\b", re.IGNORECASE
)


def mmmu_normalize(text: str) -> list[str | float]:
    """MMMU's normal forms of an open answer: a number rounded to two places, or lower-case text (one letter padded)."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_open_candidates(answer: str) -> list[str | float]:
    """Candidates of an open MMMU answer: the ends of its concluding sentences and the numbers in them.

    Follows the official `parse_open_response` (Yue et al., 2024), in a fixed order.
    """
    answer = answer.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", answer)
    tails: list[str] = []
    for position, part in enumerate(parts):
        signs = (*_INDICATORS, "=") if position == len(parts) - 1 else _INDICATORS
        shortest = ""
        for tail in (part.split(sign)[-1].strip() for sign in signs if sign in part):
            if not shortest or len(tail) < len(
                shortest
            ):  # as in the official code: an empty end discards what came before it
                shortest = tail
        if shortest and shortest not in {":", ",", ".", "!", "?", ";", "'"}:
            tails.append(shortest)
    tails = tails or [answer]
    numbers = [number for tail in tails for form in _NUMBER_FORMS for number in form.findall(tail)]
    return list(dict.fromkeys(value for text in (*tails, *numbers) for value in mmmu_normalize(text)))


def mmmu_open_match(candidates: Sequence[str | float], answers: Sequence[str]) -> bool:
    """Whether a candidate number equals an accepted one, or a candidate text contains an accepted text."""
    wanted = [value for answer in answers for value in mmmu_normalize(answer)]
    texts = [value for value in wanted if isinstance(value, str) and value.strip()]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in wanted
        for candidate in candidates
    )


@metric("mmmu")
class MMMU(Metric):
    """MMMU: letters of multiple-choice questions, official matching of open ones; unreadable answers are wrong."""

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        if reference["question_type"] == "multiple-choice":
            letter = parse_choice(answer, reference["choices"], finished)
            return verdict(answer, letter, float(letter == reference["answer"]), finished)
        accepted = _as_list(reference["answer"])
        candidates = mmmu_open_candidates(answer) if finished and answer.strip() else []
        return verdict(answer, candidates or None, float(mmmu_open_match(candidates, accepted)), finished)

    def stratum(self, reference: Reference) -> str:
        return reference.get("subject") or ""

    def combine(self, strata: Strata) -> dict[str, float]:
        by = {f"subject/{name}": 100 * float(mean[0]) for name, (_, mean) in strata.items() if name}
        return {"accuracy": 100 * float(pooled(strata)[0]), **by}


def _as_list(answer: str) -> list[str]:
    """Several accepted answers are stored as the text of a Python list."""
    if answer.startswith("["):
        try:
            return [str(item) for item in ast.literal_eval(answer)]
        except (SyntaxError, ValueError):
            pass
    return [answer]


def read_number(answer: str) -> float | None:
    """The number in an answer: alone, boxed, stated ("the answer is 14"), or the only one in the last sentence.

    If the last sentence has several numbers, the only one after its conclusion counts ("5 + 9 = 14", "so there are
    14").
    """
    text = plain_text(unwrapped(answer)[-1])
    bare = text.rstrip(".").lstrip("$€£ ").rstrip("% ").replace(",", "")
    try:
        value = float(bare)
    except ValueError:
        pass
    else:
        return value if math.isfinite(value) else None  # Python reads "inf" and "nan" as numbers
    stated = {value for number in _STATED_NUMBER.findall(text) if math.isfinite(value := _float(number))}
    if len(stated) == 1:
        return stated.pop()
    sentences = [part for part in re.split(r"(?<=[.!?])\s+|\n", text) if part.strip()]
    plain = _PLAIN_NUMBER.findall(sentences[-1]) if sentences else []
    last = {value for number in plain if math.isfinite(value := _float(number))}
    if len(last) > 1 and (conclusions := list(_CONCLUSION.finditer(sentences[-1]))):
        plain = _PLAIN_NUMBER.findall(sentences[-1][conclusions[-1].end() :])
        last = {value for number in plain if math.isfinite(value := _float(number))}
    return last.pop() if len(last) == 1 and not stated else None


def _float(text: str) -> float:
    return float(text.replace(",", ""))


@metric("mathvista")
class MathVista(Metric):
    """MathVista without an extraction model: options, numbers at the asked precision, lists.

    Where the official code lets an LLM extract the answer, or uses the option closest in spelling, an unreadable answer
    is wrong here.
    """

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        found = self.extract(answer, reference, finished)
        right = found is not None and found.strip() == str(reference["answer"]).strip()
        return verdict(answer, found, float(right), finished)

    def target(self, reference: Reference) -> str | None:
        if reference["question_type"] != "multi_choice":
            return super().target(reference)
        choices = [choice.strip() for choice in reference["choices"]]
        return ascii_uppercase[choices.index(reference["answer"].strip())]

    def extract(self, answer: str, reference: Reference, finished: bool = True) -> str | None:
        """The answer in MathVista's normal form (an option's text, an integer, a rounded number, a list), or None."""
        if reference["question_type"] == "multi_choice":
            letter = parse_choice(answer, reference["choices"], finished)
            return None if letter is None else str(reference["choices"][ord(letter) - ord("A")])
        if not finished:
            return None
        if reference["answer_type"] == "list":
            found = re.findall(r"\[[^\[\]]*\]", answer)
            return str(_literal(found[-1])) if found and _literal(found[-1]) is not None else None
        value = read_number(answer)
        if value is None:
            return None
        if reference["answer_type"] == "integer":
            return str(int(value)) if value == int(value) else str(value)
        return str(round(value, int(reference.get("precision") or 0)))

    def stratum(self, reference: Reference) -> str:
        return str(reference.get("category") or "")

    def combine(self, strata: Strata) -> dict[str, float]:
        by = {f"category/{name}": 100 * float(mean[0]) for name, (_, mean) in strata.items() if name}
        return {"accuracy": 100 * float(pooled(strata)[0]), **by}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
