"""Multiple choice: strict parsing of the chosen letter, and the benchmarks that use only letters."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from string import ascii_uppercase

from florence_vl.evaluate.metrics.base import Judged, Metric, Reference, Strata, Verdict, metric, pooled, verdict
from florence_vl.evaluate.metrics.final import plain_text, unwrapped
from florence_vl.evaluate.metrics.text import NUMBERS

# A separate letter, with or without brackets; the groups are the letter in brackets, and the one without.
_LETTER = r"(?:[(\[]\s?([A-Za-z])\s?[)\]]|(?<![A-Za-z0-9_'])([A-Za-z])(?![A-Za-z0-9_']))"
_NOUN = (
    r"(?:(?:final|correct|best|right|selected|most\s(?:appropriate|likely|suitable)|my)\s{1,3}){0,3}"
    r"(?:answer|option|choice|letter|response|ans\b\.?|réponse|respuesta|antwort|risposta|resposta|ответ)"
    r"(?:\sto\s(?:the|this|your)\squestion)?"
)
_VERB = r"(?:is|are|was|would\sbe|should\sbe|must\sbe|will\sbe|seems\sto\sbe|appears\sto\sbe|es|est|ist|é|è|=|:|-)"
_WHOLE = re.compile(
    rf"(?:[->•]\s{{1,3}})?(?:(?:the\s)?{_NOUN}\s{{0,3}}(?:{_VERB}\s{{0,3}}){{0,2}})?(?:option\s|choice\s|letter\s)?{_LETTER}"
    r"(?:\s?选?项)?(?:是?正确的?)?[\s.,:;!)\]]*",
    re.I,
)
_HEADING = re.compile(
    r"(?:(?:option|choice)\s)?(?:[(\[]\s?([A-Za-z])\s?[)\]]\s?[.:,-]?|([A-Z])\s?(?:[).:,\]]|-\s|(?=\n)))\s*", re.I
)
_STATED = re.compile(
    rf"(?:\b{_NOUN}\s{{0,3}}(?:{_VERB}\s{{0,3}}){{1,2}}(?:{_NOUN}\s{{0,3}}{_VERB}\s{{0,3}})?|\b{_NOUN}\s{{0,2}}\n\s{{0,3}}"
    rf"|\b(?:it|this|that)(?:'s|\sis|\sshould\sbe|\smust\sbe|\swould\sbe)\s"
    rf"|\bi(?:'d|'ll|\swill|\swould)?\s(?:choose|pick|select|say|go\s(?:with|for))\s|\bi\s(?:think|believe|guess)\s"
    rf"|\b(?:so|thus|hence|therefore|certainly|sure)(?:,|:)?\s|\b(?:no|wait|actually|sorry|correction|rather)(?:,|:)\s"
    rf"|答案?\s?[是为选:]{{1,2}}\s?|(?:选项|选择|应选|故选|选)\s?[是为:]?\s?)"
    rf"(?:the\s)?(?:option\s|choice\s)?(?:选项\s?)?{_LETTER}",
    re.I,
)
_JUDGED = re.compile(
    rf"(?<![\w']){_LETTER}\s(?:(?:is|was|would\sbe|must\sbe|seems|appears\sto\sbe|looks)\s(?:clearly\s|indeed\s|definitely\s)?"
    r"(?:the\s)?(?:only\s)?(?:most\s)?(?:correct|right|best|true|accurate|appropriate|likely|suitable|answer)"
    r"|(?:best\s)?(?:matches|fits|describes|represents))\b",
    re.I,
)
# What may follow a stated letter; otherwise "the answer is A dog" would name the option A.
_AFTER = re.compile(
    r"\s*(?:$|[.,:;!?)\]\n(]|-(?!\w)|[^\x00-\x7f]|(?:because|since|as|for|due|given|which|based|from|with|by|see|in|on|that|this|"
    r"according|here|rather|not|instead|if|so|therefore|it|is|was)\b)",
    re.I,
)
_ANOTHER = re.compile(
    r"\s{0,2}(?:,\s?(?i:or|and)\b|,|/|&|(?i:and|or)\b)\s{0,2}(?i:option\s|choice\s)?"
    r"(?:[(\[]([A-Za-z])[)\]]|([A-Z])(?![A-Za-z0-9_']))"
)
_ONE_BEFORE = re.compile(r"(?<![A-Za-z0-9_'])[A-Za-z][)\]]?\s?(?:,|/|&|(?:or|and)\b)\s?(?:option\s|choice\s)?$", re.I)
_CORRECTION = re.compile(
    r"\b(?:no|wait|actually|correction|rather|instead|sorry|however|but|hold on|scratch that|hmm)\b", re.I
)
_EXPLAINS = re.compile(r"\b(?:explanation|because|reason|reasoning|rationale|since|analysis|whereas|while)\b", re.I)
_HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|either|neither|unsure|unclear|unknown|cannot|can't|might|may|could|not\ssure|not\scertain)\b",
    re.I,
)
_NEGATION = frozenset({"not", "no", "never", "isnt", "arent", "wasnt", "without", "neither", "nor", "than", "不"})
# What takes a statement back: before it ("I don't think it is B"), and after its letter ("I think B is wrong").
_DENIED_BEFORE = re.compile(r"(?:n't|\b(?:not|never|cannot|hardly|doubt))\s[^.,;:!?\n]{0,30}$", re.I)
_DENIED_AFTER = re.compile(
    r"[)\]]?\s(?:is|was|can|could|would|does|seems|looks)(?:n't|\snot|not)?\s(?:be\s)?(?:not|wrong|incorrect|false|unlikely|\w+n't)\b"
    r"|[)\]]?\s(?:is|was|can|could|would|does)(?:n't|not|\snot)\b",
    re.I,
)
_ARTICLES = frozenset({"a", "an", "the"})
_WORD = re.compile(r"\d+(?:[./:]\d+)*%?|[^\W\d_\u3040-\u9fff]+|[\u3040-\u9fff]")


def parse_choice(answer: str, choices: Sequence[str], finished: bool = True) -> str | None:
    """The letter that an answer chooses; None if it chooses none or more than one.

    These forms are read, equally for every letter and after `without_reasoning`:

    - the letter alone or in answer tags, a box or JSON: "B", "(b)", "**B.**", `\\boxed{B}`, "<answer>B</answer>";
    - a letter with a delimiter and text, or before its own option: "B. a dog", "Option B: a dog", "B a dog";
    - a statement: "The answer is (B) because ...", "B is correct", "I think it's B"; of two statements the second
      if it retracts the first ("no wait, the answer is B");
    - a last line that is one of these;
    - an option's own words: "a dog", "The animal is a dog, not a cat."

    Nothing is guessed: "A church" does not choose A, and hedges and lists of options choose nothing. Of an answer cut
    at the token limit, only a complete first line, or the beginning of an option after its letter, is read.

    Args:
        answer: Raw text.
        choices: The options in order; empty texts if they are unknown.
        finished: False if generation reached its token limit.
    """
    reader = _Reader(choices)
    found = {reader.read(plain_text(part), finished) for part in unwrapped(answer.strip())}
    return found.pop() if len(found) == 1 else None


class _Reader:
    """Reads the choice in plain text for one list of options."""

    def __init__(self, choices: Sequence[str]) -> None:
        self.letters = ascii_uppercase[: len(choices)]
        self.options = [_words(plain_text(choice)) for choice in choices]

    def read(self, text: str, finished: bool) -> str | None:
        if whole := _WHOLE.fullmatch(text):
            return self.known(whole)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        headings = {letter for line in lines if (letter := self.heading(line))}
        if headed := _HEADING.match(text):
            letter, rest = self.known(headed, upper=headed[1] is None), text[headed.end() :]
            if letter and not self.lists(letter, text[headed.end(headed.lastindex or 0) :], rest, finished):
                return letter if finished or self.cut(letter, rest, text) else None
            if letter and not (finished and (stated := self.stated(text))):
                return None
            if letter:
                return stated
        if letter := self.followed(text, finished):
            return letter
        if not finished:
            return None
        if letter := self.stated(text):
            return letter
        if letter is not None:
            return None
        if len(lines) > 1 and len(headings) == 1 and self.heading(lines[-1]):
            return headings.pop()
        return self.by_words(text) if not headings else None

    def known(self, match: re.Match[str], upper: bool = False) -> str | None:
        letter = next((group for group in match.groups() if group), "")
        return letter.upper() if letter.upper() in self.letters and (not upper or letter.isupper()) else None

    def heading(self, line: str) -> str | None:
        """The letter of a line that is a letter, or begins with one and a delimiter."""
        if whole := _WHOLE.fullmatch(line):
            return self.known(whole)
        headed = _HEADING.match(line)
        return self.known(headed, upper=headed[1] is None) if headed else None

    def lists(self, letter: str, after: str, rest: str, finished: bool) -> bool:
        """Whether the text after a heading names another option in the same way (in a truncated answer: any option)."""
        if (another := _ANOTHER.match(after)) and self.known(another) not in (None, letter):
            return True
        explains = _EXPLAINS.search(rest)
        rest = rest[: explains.start()] if explains and finished else rest
        found = re.findall(r"(?:^|[\s(\[])([A-Za-z])[.):\]](?=\s|$)|\(([A-Za-z])\)", rest)
        named = {(one or other).upper() for one, other in found} & set(self.letters)
        named |= {line.upper() for line in rest.split("\n") if len(line) == 1} & set(self.letters)
        return bool(named - {letter} if finished else named)

    def cut(self, letter: str, rest: str, text: str) -> bool:
        """Whether a truncated answer had already chosen: a complete line, its option, or part of its option."""
        if re.match(r"\(?[A-Z][).]?\n", text):
            return True
        said, option = " ".join(_words(rest)), " ".join(self.options[self.letters.index(letter)])
        first = " ".join(_words(re.split(r"[.\n]\s", rest, maxsplit=1)[0]))
        return bool(said) and (option.startswith(said) or (first == option and first != said))

    def followed(self, text: str, finished: bool) -> str | None:
        """A letter before its own option, or before an article if the options are unknown."""
        match = re.match(r"([A-Z])\s+(?=\S)", text)
        if not match or match[1] not in self.letters:
            return None
        if finished and re.match(r"\(?(?:because|since)\b", text[match.end() : match.end() + 10], re.I):
            return match[1]
        said, option = _words(text[match.end() :]), self.options[self.letters.index(match[1])]
        if option:
            whole = said == option or (not finished and " ".join(option).startswith(" ".join(said)))
            return match[1] if said and whole else None
        return match[1] if finished and said[:1] and said[0] in _ARTICLES and not any(self.options) else None

    def stated(self, text: str) -> str | None:
        """The letter of the only statement, or of the last one if it retracts the others; "" for a conflict."""
        found: list[tuple[int, int, str]] = []
        for pattern in (_STATED, _JUDGED):
            for match in pattern.finditer(text):
                letter = self.known(match)
                if letter is None or not (pattern is _JUDGED or self.meant(match, text, letter)):
                    continue
                another = _ANOTHER.match(text, match.end())
                before = text[max(0, match.start() - 40) : match.start()]
                if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(text, match.end()):
                    continue
                if (another and self.known(another) not in (None, letter)) or _ONE_BEFORE.search(before):
                    return ""
                found.append((match.start(), match.end(), letter))
        found.sort()
        if len({letter for _, _, letter in found}) > 1:
            start = next(end for _, end, letter in reversed(found) if letter != found[-1][2])
            if not _CORRECTION.search(text, start, found[-1][1]):
                return ""
        return found[-1][2] if found else None

    def meant(self, match: re.Match[str], text: str, letter: str) -> bool:
        """Whether the letter of a statement is a choice, not the article in "the answer is a cat"."""
        after = text[match.end() : match.end() + 200]
        if match[1]:
            return True
        bare = match[2]
        if re.match(r"\s*(?:$|[.,:;!?)\]\n])", after) or (bare.isupper() and _AFTER.match(after)):
            return True
        option = self.options[self.letters.index(letter)]
        return bare.isupper() and bool(option) and _words(after)[: len(option)] == option

    def by_words(self, text: str) -> str | None:
        """The only option whose words are in the text, without negated ones; None if the text hedges."""
        said = _words(text)
        same = [i for i, option in enumerate(self.options) if option and option == said]
        if same:
            return self.letters[same[0]] if len(same) == 1 else None
        if _HEDGE.search(text) or len(said) > 200:
            return None
        bare = [[word for word in option if word not in _ARTICLES] for option in self.options]
        places = {i: _find(said, option) for i, option in enumerate(bare) if option}
        found = set()
        for i, starts in places.items():
            for start in starts:
                end = start + len(bare[i])
                longer = any(
                    s <= start and end <= s + len(bare[j]) and len(bare[j]) > len(bare[i])
                    for j, others in places.items()
                    for s in others
                )
                if not longer and not _NEGATION & set(said[max(0, start - 2) : start]):
                    found.add(i)
        return self.letters[found.pop()] if len(found) == 1 else None


def _words(text: str) -> list[str]:
    """Lower-case words and numbers; number words as digits, without thousands separators, CJK characters separately."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text.lower().replace("'", ""))
    return [NUMBERS.get(word, word) if word != "none" else word for word in _WORD.findall(text)]


def _find(words: Sequence[str], wanted: Sequence[str]) -> list[int]:
    return [i for i in range(len(words) - len(wanted) + 1) if list(words[i : i + len(wanted)]) == list(wanted)]


def substring_match(answer: str, letter: str) -> bool:
    """The scoring rule of the authors' released script for MMVP and CV-Bench: equality or containment either way.

    An empty answer is contained in every letter and therefore counts as correct. Only for reproducing their numbers.
    """
    return answer == letter or letter in answer or answer in letter


class _Choice(Metric):
    """Base of multiple-choice metrics: references contain `answer` (a letter) and `choices`."""

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        wanted, choices = reference["answer"], reference["choices"]
        if wanted not in tuple(ascii_uppercase[: len(choices)]):
            raise ValueError(f"the answer to {len(choices)} choices is the letter of one of them, found {wanted!r}")
        found = parse_choice(answer, choices, finished)
        details = {"as_authors": float(substring_match(answer.strip(), wanted))}
        return verdict(answer, found, float(found == wanted), finished, details)


@metric("multiple_choice")
class MultipleChoice(_Choice):
    """Accuracy of the chosen letter (AI2D, ScienceQA, SEED)."""


@metric("choice_by_category")
class ChoiceByCategory(_Choice):
    """Accuracy overall and per `category`; resampling is within categories."""

    def stratum(self, reference: Reference) -> str:
        return str(reference.get("category") or "")

    def combine(self, strata: Strata) -> dict[str, float]:
        by = {f"category/{name}": 100 * float(mean[0]) for name, (_, mean) in strata.items() if name}
        return {"accuracy": 100 * float(pooled(strata)[0]), **by}


@metric("circular_choice")
class CircularChoice(_Choice):
    """MMBench: a question counts if all its copies with rotated options are answered correctly (Liu et al., 2023).

    Copies have the question's number plus multiples of 1,000,000. `single` is accuracy over the copies.
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
    """MMStar: mean over the fine categories as in lmms-eval, over all questions, and of the six abilities."""

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
    """MMVP: `pair` counts pairs of images with both answers correct, `single` counts answers (Tong et al., 2024).

    `as_authors` is accuracy with the authors' substring rule (see `substring_match`).
    """

    headline = "pair"

    def unit(self, reference: Reference) -> Hashable:
        return (int(reference["unit"]) - 1) // 2

    def complete(self, judged: Sequence[Judged]) -> bool:
        return len(judged) == 2

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        if len(judged) != 2:
            raise ValueError(f"MMVP has two images per pair, found {len(judged)} at index {judged[0][1]['unit']}")
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
    """A letter if the answer is one of the options' letters, otherwise the exact text (RealWorldQA)."""

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        if reference["answer"].strip().upper() in ascii_uppercase[: max(4, len(reference.get("choices") or ()))]:
            choices = list(reference.get("choices") or ()) or ["", "", "", ""]
            found = parse_choice(answer, choices, finished)
            return verdict(answer, found, float(found == reference["answer"].strip().upper()), finished)
        wanted = _words(plain_text(reference["answer"]))
        said = _words(plain_text(unwrapped(answer)[-1]))
        numbers = [word for word in said if word.isdigit()]
        if finished and len(wanted) == 1 and wanted[0].isdigit() and len(numbers) == 1 and len(said) <= 20:
            said = numbers
        return verdict(answer, " ".join(said) or None, float(bool(said) and said == wanted), finished)
