"""Yes or no: POPE, MME, HallusionBench."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

from florence_vl.evaluate.metrics.base import Judged, Metric, Reference, Strata, Verdict, metric, pooled, verdict
from florence_vl.evaluate.metrics.final import plain_text, unwrapped
from florence_vl.evaluate.metrics.text import NUMBERS

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_MME_PARTS = {"perception": MME_PERCEPTION, "cognition": MME_COGNITION}

_WORDS = {
    "yes": "yes yeah yep yup yea affirmative 是 是的 有 对 对的",
    "no": "no nope nah negative 否 不 不是 没有 不对",
}
_MEANING = {word: meaning for meaning, words in _WORDS.items() for word in words.split()}
# Read only if they are the whole answer.
_ALONE = _MEANING | dict.fromkeys(("y", "true", "correct", "right"), "yes")
_ALONE |= dict.fromkeys(("n", "false", "incorrect", "wrong", "none"), "no")
_SAYS = "|".join(sorted(_MEANING, key=len, reverse=True))
_SAID = re.compile(
    rf"(?P<before>^|[.,;:!?\n(-]\s*|\b(?:so|is|be|think|believe|say|guess|answer|therefore|thus|hence|definitely|actually)"
    rf"\s+|\b(?P<joined>or|and)\s+|/\s*)(?P<word>{_SAYS})(?P<after>(?=\s*(?:$|[.,;:!?\n)/-]))|(?![\w'])|(?<=[^\x00-\x7f]))"
)
_UNSURE = re.compile(
    r"\b(?:maybe|perhaps|possibly|unsure|unclear|not\s(?:at\sall\s)?(?:sure|certain)"
    r"|can(?:not|'t)\s(?:tell|say|determine))\b"
)
# "There is a dog in the image.", alone: existence is said without the word.
_EXISTS = re.compile(
    r"there(?:'s| is| are|re) (?P<none>no|not an?|not any|an?|some)\b(?:(?!\b(?:but|not|no)\b)[^.,;:!?\n\d])*[.!]?"
)


def parse_yes_no(answer: str, finished: bool = True) -> str | None:
    """`yes` or `no` if the answer begins with it, states it or ends with it, and does not retract it; otherwise None.

    "Yes.", "No, there is none", "The answer is no.", "I see a dog, so yes" and "There is no dog in the image." are
    read, in answer tags and boxes too; "Yes or no", "Yes. No.", "Maybe yes", an empty answer and one cut off at the
    token limit are not.
    """
    found = {_parse_yes_no(plain_text(part).lower(), finished) for part in unwrapped(answer.strip())}
    return found.pop() if len(found) == 1 else None


def _parse_yes_no(text: str, finished: bool) -> str | None:
    words = re.findall(r"[^\W\d_]+", text)
    if len(words) == 1:
        return _ALONE.get(words[0])
    if not words or not finished or _UNSURE.search(text):
        return None
    if (exists := _EXISTS.fullmatch(text)) and not NUMBERS.keys() & set(words[3:]):
        return "no" if exists["none"].startswith("no") else "yes"
    meanings = set()
    for said in _SAID.finditer(text):
        alone = said["after"] == "" and re.match(r"\s*(?:$|[.,;:!?\n)/-])", text[said.end() : said.end() + 20])
        first = said.start("word") <= text.find(words[0])
        if first or alone or said["joined"]:
            meanings.add(_MEANING[said["word"]])
    second = _MEANING.get(words[1]) if re.match(r"\W*\w+ +\w", text) else None  # "yes no"
    if words[0] in _MEANING and second:
        meanings.add(second)
    return meanings.pop() if len(meanings) == 1 else None


class _YesNo(Metric):
    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        found = parse_yes_no(answer, finished)
        return verdict(answer, found, float(found == _wanted(reference)), finished)


def _wanted(reference: Reference) -> str:
    wanted = str(reference["answer"]).strip().lower().rstrip(".")
    wanted = {"1": "yes", "0": "no"}.get(wanted, wanted)
    if wanted not in _WORDS:
        raise ValueError(f"a yes/no question needs the answer yes or no, found {reference['answer']!r}")
    return wanted


@metric("yes_no")
class YesNo(_YesNo):
    """Plain accuracy of yes/no answers."""


@metric("pope")
class POPE(_YesNo):
    """Object hallucination: accuracy, precision, recall, F1 and fraction of "yes" (Li et al., 2023).

    An answer that is neither is wrong, and counts as "not yes" in recall.
    """

    headline = "f1"

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        ((found, reference),) = judged
        said, true = found.parsed == "yes", _wanted(reference) == "yes"
        return (found.score, float(said and true), float(said), float(true))

    def combine(self, strata: Strata) -> dict[str, float]:
        accuracy, hit, said, true = (float(value) for value in pooled(strata))
        return {
            "f1": 200 * hit / (said + true) if said + true else 0.0,
            "accuracy": 100 * accuracy,
            "precision": 100 * hit / said if said else 0.0,
            "recall": 100 * hit / true if true else 0.0,
            "yes_ratio": 100 * said,
        }


@metric("mme")
class MME(_YesNo):
    """MME: an image's two questions give accuracy and accuracy+ (both correct), summed (Fu et al., 2023).

    `perception` has at most 2000 points in ten categories, `cognition` at most 800 in four. A category without
    questions adds nothing.
    """

    headline = "perception"

    def unit(self, reference: Reference) -> Hashable:
        return reference["unit"]

    def stratum(self, reference: Reference) -> str:
        category = reference["category"]
        if category not in MME_PERCEPTION and category not in MME_COGNITION:
            raise ValueError(f"MME has no category {category!r}; it has {', '.join((*MME_PERCEPTION, *MME_COGNITION))}")
        return category

    def counts_for(self, key: str, reference: Reference) -> bool:
        return key not in _MME_PARTS or reference["category"] in _MME_PARTS[key]

    def complete(self, judged: Sequence[Judged]) -> bool:
        return len(judged) == 2

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        if len(judged) != 2:
            raise ValueError(f"MME asks two questions of each image, found {len(judged)} for {judged[0][1]['unit']!r}")
        scores = [found.score for found, _ in judged]
        return (sum(scores) / 2, float(sum(scores) == 2))

    def combine(self, strata: Strata) -> dict[str, float]:
        points = {name: 100 * float(mean[0] + mean[1]) for name, (_, mean) in strata.items()}
        accuracy, plus = (100 * float(value) for value in pooled(strata))
        scores = {
            **{part: sum(points.get(name, 0.0) for name in names) for part, names in _MME_PARTS.items()},
            "accuracy": accuracy,
            "accuracy_plus": plus,
        }
        return scores | {f"category/{name}": value for name, value in points.items()}


@metric("hallusion_bench")
class HallusionBench(_YesNo):
    """HallusionBench: questions (aAcc), question pairs (qAcc) and figures (fAcc) with all answers correct.

    The official code excludes figure 0 of visual-supplement questions (no figure shown) from fAcc (Guan et al., 2024).
    """

    headline = "aAcc"

    def target(self, reference: Reference) -> str | None:
        return _wanted(reference).capitalize()

    def unit(self, reference: Reference) -> Hashable:
        return (reference["category"], reference["subcategory"], str(reference["set_id"]))

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        questions: dict[str, list[float]] = defaultdict(list)
        figures: dict[str, list[float]] = defaultdict(list)
        for found, reference in judged:
            questions[str(reference["question_id"])].append(found.score)
            if not (reference["category"] == "VS" and str(reference["figure_id"]) == "0"):
                figures[str(reference["figure_id"])].append(found.score)
        right = [sum(all(s == 1 for s in scores) for scores in groups.values()) for groups in (questions, figures)]
        return (sum(f.score for f, _ in judged), len(judged), right[0], len(questions), right[1], len(figures))

    def combine(self, strata: Strata) -> dict[str, float]:
        values = pooled(strata)
        names = ("aAcc", "qAcc", "fAcc")
        return {
            n: 100 * float(values[2 * i] / values[2 * i + 1]) if values[2 * i + 1] else 0.0 for i, n in enumerate(names)
        }
