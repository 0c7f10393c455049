"""Multiple choice: strict parsing of the chosen letter, and the benchmarks that need nothing else."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from string import ascii_uppercase

from florence_vl.evaluate.metrics.base import Judged, Metric, Reference, Strata, Verdict, metric, pooled, verdict
from florence_vl.evaluate.metrics.text import plain_normalise

_WHOLE = re.compile(r"[\s\"'`*(\[{]*(?:(?:option|choice|answer)\s*:?\s*)?[\"'`*(\[{]*([A-Za-z])[\s\"'`*)\]}.,:;!。，]*")
_STATED = re.compile(
    r"(?:\b(?:answer|(?:correct|best|right|my)\s+(?:option|choice))\s*(?:is|:|：)+\s*(?:option|choice)?|答案\s*[是为：:]+|选择?项?\s*[：:]?)"
    r"[\s\"'`*:]*(\(?)([A-Z])(?![A-Za-z'’])",
    re.IGNORECASE,
)
_LEADING = re.compile(r"[\s\"'`*]*(?:\(([A-Za-z])\)|([A-Z])(?:[).:,]|[\"'`*]*\n))[\s\"'`*]*(.*)", re.DOTALL)
_SPACED = re.compile(r"\s*([A-Z])\s+(.+)", re.DOTALL)


def parse_choice(answer: str, choices: Sequence[str], finished: bool = True) -> str | None:
    """The letter that an answer chooses, or None when it chooses none or more than one.

    Read are: the letter alone ("B", "(b)", "B."), a letter with a delimiter and text ("B. a dog"), a letter followed by
    its own option ("B a dog"), a statement ("The answer is (B)"), and an option word for word ("a dog"). A guess is
    never made: "A church" doesn't choose A, and of an answer cut off at the token limit only the beginning of an option
    after its letter is read.

    Args:
        answer: Raw text.
        choices: The options in order; empty texts where they are not known.
        finished: False when generation ran into its token limit.
    """
    text = answer.strip()
    letters = ascii_uppercase[: len(choices)]
    options = [plain_normalise(choice) for choice in choices]

    def known(letter: str) -> str | None:
        return letter.upper() if letter.upper() in letters else None

    if whole := _WHOLE.fullmatch(text):
        return known(whole[1])
    if led := _LEADING.match(text):
        letter, rest = known(led[1] or led[2]), led[3]
        if letter and not _lists_another(rest, letter, letters):
            said, option = plain_normalise(rest), options[letters.index(letter)]
            if finished or (said and option.startswith(said)):
                return letter
        return None
    if (spaced := _SPACED.fullmatch(text)) and (letter := known(spaced[1])):
        said, option = plain_normalise(spaced[2]), options[letters.index(letter)]
        if said and option and (said == option or (not finished and option.startswith(said))):
            return letter
    if not finished:
        return None
    if stated := {m[2].upper() for m in _STATED.finditer(text) if _is_letter(m, text)}:
        return known(stated.pop()) if len(stated) == 1 else None
    said = plain_normalise(text)
    same = [letter for letter, option in zip(letters, options, strict=True) if option and option == said]
    return same[0] if len(same) == 1 else None


def _lists_another(rest: str, letter: str, letters: str) -> bool:
    found = re.findall(r"(?:^|[\s(])([A-Z])[.):]\s", rest + " ")
    return any(other in letters and other != letter for other in found)


def _is_letter(match: re.Match[str], text: str) -> bool:
    """Whether the letter after "the answer is" is meant as one: not the article in "the answer is a cat"."""
    after = text[match.end() : match.end() + 1]
    if match[1] or after in ("", ".", ",", ":", ";", ")", "\n", "!", "*", '"', "。"):
        return True
    return match[2].isupper() and match[2] not in "AI"


def substring_match(answer: str, letter: str) -> bool:
    """The scoring rule of the authors' released script for MMVP and CV-Bench: equality or containment either way.

    An empty answer is contained in every letter and so counts as right. Kept only to reproduce their numbers.
    """
    return answer == letter or letter in answer or answer in letter


class _Choice(Metric):
    """Base of multiple-choice metrics: references carry `answer` (a letter) and `choices`."""

    def judge(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        found = parse_choice(answer, reference["choices"], finished)
        details = {"as_authors": float(substring_match(answer.strip(), reference["answer"]))}
        return verdict(answer, found, float(found == reference["answer"]), finished, details)


@metric("multiple_choice")
class MultipleChoice(_Choice):
    """Accuracy of the chosen letter (AI2D, ScienceQA, SEED)."""


@metric("choice_by_category")
class ChoiceByCategory(_Choice):
    """Accuracy overall and of each `category`, which is also where resampling takes place."""

    def stratum(self, reference: Reference) -> str:
        return str(reference.get("category") or "")

    def combine(self, strata: Strata) -> dict[str, float]:
        by = {f"category/{name}": 100 * float(mean[0]) for name, (_, mean) in strata.items() if name}
        return {"accuracy": 100 * float(pooled(strata)[0]), **by}


@metric("circular_choice")
class CircularChoice(_Choice):
    """MMBench: a question counts when all its copies with rotated options are answered right (Liu et al., 2023).

    Copies carry the question's number plus multiples of 1,000,000. `single` is accuracy over the copies.
    """

    headline = "circular"

    def unit(self, reference: Reference) -> Hashable:
        return int(reference["unit"]) % 1_000_000

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        scores = [found.score for found, _ in judged]
        return (float(all(s == 1 for s in scores)), sum(scores) / len(scores))

    def combine(self, strata: Strata) -> dict[str, float]:
        circular, single = pooled(strata)
        return {"circular": 100 * float(circular), "single": 100 * float(single)}


@metric("mmstar")
class MMStar(_Choice):
    """MMStar: mean over the fine categories as lmms-eval has it, over all questions, and of the six abilities."""

    headline = "average"

    def stratum(self, reference: Reference) -> str:
        return f"{reference['category']}/{reference['l2_category']}"

    def combine(self, strata: Strata) -> dict[str, float]:
        means = {name: float(mean[0]) for name, (_, mean) in strata.items()}
        abilities: dict[str, list[float]] = {}
        for name, value in means.items():
            abilities.setdefault(name.split("/")[0], []).append(value)
        return {
            "average": 100 * sum(means.values()) / len(means),
            "accuracy": 100 * float(pooled(strata)[0]),
            **{f"ability/{name}": 100 * sum(v) / len(v) for name, v in abilities.items()},
        }


@metric("mmvp")
class MMVP(_Choice):
    """MMVP: `pair` counts pairs of images with both answers right, `single` counts answers (Tong et al., 2024).

    `as_authors` is accuracy with the authors' substring rule (see `substring_match`).
    """

    headline = "pair"

    def unit(self, reference: Reference) -> Hashable:
        return (int(reference["unit"]) - 1) // 2

    def complete(self, judged: Sequence[Judged]) -> bool:
        return len(judged) == 2

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        if len(judged) != 2:
            raise ValueError(f"MMVP has two images a pair, found {len(judged)} at index {judged[0][1]['unit']}")
        scores = [found.score for found, _ in judged]
        lenient = sum((found.details or {})["as_authors"] for found, _ in judged) / 2
        return (float(sum(scores) == 2), sum(scores) / 2, lenient)

    def combine(self, strata: Strata) -> dict[str, float]:
        return dict(zip(("pair", "single", "as_authors"), (100 * float(v) for v in pooled(strata)), strict=True))


@metric("cv_bench")
class CVBench(_Choice):
    """CV-Bench: 2D is the mean of ADE20K and COCO, 3D is Omni3D, `mean` their mean (Tong et al., 2024).

    `as_authors_...` is the same with the authors' substring rule (see `substring_match`).
    """

    headline = "mean"

    def stratum(self, reference: Reference) -> str:
        return reference["source"]

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        ((found, _),) = judged
        return (found.score, (found.details or {})["as_authors"])

    def combine(self, strata: Strata) -> dict[str, float]:
        scores: dict[str, float] = {}
        for position, prefix in enumerate(("", "as_authors_")):
            means = {name: 100 * float(mean[position]) for name, (_, mean) in strata.items()}
            flat = [means[name] for name in ("ADE20K", "COCO") if name in means]
            parts = {"2D": sum(flat) / len(flat)} if flat else {}
            parts |= {"3D": means["Omni3D"]} if "Omni3D" in means else {}
            if unknown := set(means) - {"ADE20K", "COCO", "Omni3D"}:
                raise ValueError(
                    f"CV-Bench has the sources ADE20K, COCO and Omni3D, found {', '.join(sorted(unknown))}"
                )
            scores[f"{prefix}mean"] = sum(parts.values()) / len(parts)
            scores |= {f"{prefix}{name}": value for name, value in parts.items()}
        return scores


@metric("choice_or_text")
class ChoiceOrText(_Choice):
    """A letter where the answer is one of the options' letters, else the exact text (RealWorldQA)."""

    def judge(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        if reference["answer"].strip().upper() in ascii_uppercase[: max(4, len(reference.get("choices") or ()))]:
            choices = list(reference.get("choices") or ()) or ["", "", "", ""]
            found = parse_choice(answer, choices, finished)
            return verdict(answer, found, float(found == reference["answer"].strip().upper()), finished)
        said = answer.strip().rstrip(".").lower()
        return verdict(
            answer, said or None, float(said != "" and said == reference["answer"].strip().lower()), finished
        )
