"""Judges: models behind an OpenAI-compatible endpoint that score answers without a rule. No reply gives no score."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from string import ascii_uppercase
from typing import Any

import yaml

from florence_vl.evaluate.endpoint import ChatEndpoint, EndpointError
from florence_vl.evaluate.metrics import METRICS, Verdict, parse_choice
from florence_vl.evaluate.metrics.base import Reference
from florence_vl.evaluate.metrics.final import without_reasoning


@lru_cache(maxsize=1)
def _prompts() -> dict[str, str]:
    return yaml.safe_load((files(__package__) / "judge_prompts.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Judgement:
    """Judgement of one answer.

    Attributes:
        verdict: None if the judge failed, or its reply could not be parsed.
        reply: The reply, or the reason why there is none.
    """

    verdict: Verdict | None
    reply: str


class Judge:
    """Asks a judge with the benchmark's own prompt and parses its reply strictly.

    Args:
        endpoint: Endpoint of the judge.
    """

    def __init__(self, endpoint: ChatEndpoint) -> None:
        self.endpoint = endpoint
        self.identity = {"model": endpoint.model, "url": endpoint.url}

    @staticmethod
    def wants(metric: str, strict: Verdict | None) -> bool:
        """Whether an answer goes to the judge: all answers of some benchmarks (MM-Vet ...), or unreadable ones."""
        return metric in _prompts() and (metric in _ALWAYS or (strict is not None and strict.kind == "unparsed"))

    def decide(self, metric: str, answer: str, reference: Reference) -> Judgement:
        """The judgement of one answer, without its reasoning; an empty answer is wrong without asking the judge."""
        answer = without_reasoning(answer)
        if not answer:
            details = {"model_points": 1.0, "reference_points": 10.0} if metric == "llava_bench" else None
            return Judgement(Verdict(None, 0.0, "empty", details), "")
        prompt = fill(_prompts()[metric], _fields(metric, answer, reference))
        try:
            reply, finished = self.endpoint.chat([{"role": "user", "content": prompt}], _LIMITS.get(metric, 128))
        except EndpointError as error:
            return Judgement(None, str(error))
        if not finished and metric != "llava_bench":  # whose scores are in the first line, before an explanation
            return Judgement(None, reply)
        return Judgement(_READERS[metric](without_reasoning(reply), reference), reply)


_ALWAYS = ("mmvet", "llava_bench", "hallusion_bench")
_LIMITS = {"llava_bench": 1024, "hallusion_bench": 16, "mathvista": 256, "circular_choice": 256}


def fill(template: str, values: Mapping[str, str]) -> str:
    """A prompt with `{name}` replaced in one pass, so that braces in the values are kept."""
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(pattern, lambda match: values[match[0][1:-1]], template)


def _fields(metric: str, answer: str, reference: Reference) -> dict[str, str]:
    if metric == "mathvista":
        return {"question": reference["query"], "answer": answer}
    if metric == "circular_choice":
        options = "".join(f"{a}. {o}\n" for a, o in zip(ascii_uppercase, reference["choices"], strict=False))
        return {"question": reference["question"], "options": options, "answer": answer}
    if metric == "hallusion_bench":
        return {"question": reference["question"], "reference": reference["details"], "answer": answer}
    if metric == "mmvet":
        wanted = reference["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        return {"question": reference["question"], "reference": wanted, "answer": answer}
    caption = reference["caption"]
    context = caption if isinstance(caption, str) else "\n".join(caption)
    return {"question": reference["question"], "reference": reference["answer"], "context": context, "answer": answer}


def _kind(score: float) -> str:
    return "right" if score >= 1 else "partly" if score > 0 else "wrong"


def _read_mmvet(reply: str, reference: Reference) -> Verdict | None:
    match = re.match(r"\s*(1(?:\.0+)?|0(?:\.\d+)?)(?![\d.]*\d)", reply)
    if not match:
        return None
    score = float(match[1])
    return Verdict(reply.strip(), score, _kind(score))


def _read_llava(reply: str, reference: Reference) -> Verdict | None:
    numbers = re.findall(r"\d+(?:\.\d+)?", reply.strip().split("\n")[0].replace(",", " ").replace(";", " "))
    if len(numbers) != 2:
        return None
    theirs, ours = map(float, numbers)
    if not (1 <= theirs <= 10 and 1 <= ours <= 10):
        return None
    score = min(1.0, ours / theirs)
    return Verdict(reply.split("\n")[0], score, _kind(score), {"model_points": ours, "reference_points": theirs})


def _read_hallusion(reply: str, reference: Reference) -> Verdict | None:
    text = reply.lower()
    words = set(re.findall(r"\b(?:correct|incorrect|unclear)\b", text))
    if len(words) != 1 or re.search(r"\bnot\b|n['’]t\b", text):
        return None
    unseen = reference["category"] == "VS" and str(reference["figure_id"]) == "0"  # then nobody can know
    score = {"correct": 1.0, "incorrect": 0.0, "unclear": float(unseen)}[words.pop()]
    return Verdict(text.strip(" .\"“”'"), score, _kind(score))


def _read_extraction(reply: str, reference: Reference) -> Verdict | None:
    found = METRICS["mathvista"].judge(reply.strip().split("\n")[0], reference)
    return None if found.parsed is None else found


def _read_option(reply: str, reference: Reference) -> Verdict | None:
    if reply.strip().strip(".").upper() == "E":
        return Verdict("E", 0.0, "wrong")
    letter = parse_choice(reply, reference["choices"])
    if letter is None:
        return None
    score = float(letter == reference["answer"])
    return Verdict(letter, score, _kind(score))


_READERS: dict[str, Any] = {
    "mmvet": _read_mmvet,
    "llava_bench": _read_llava,
    "hallusion_bench": _read_hallusion,
    "mathvista": _read_extraction,
    "circular_choice": _read_option,
}
