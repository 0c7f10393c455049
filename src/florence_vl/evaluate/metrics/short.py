"""Short answers of any form: a letter if there are options, yes or no, a number, or a few words (mini suite)."""

from __future__ import annotations

import re

from florence_vl.evaluate.metrics.base import Metric, Reference, Strata, Verdict, metric, pooled, verdict
from florence_vl.evaluate.metrics.choice import parse_choice
from florence_vl.evaluate.metrics.text import NUMBERS
from florence_vl.evaluate.metrics.yes_no import parse_yes_no


def short_normalize(text: str) -> str:
    """Lower case, single spaces, no leading article, punctuation or currency signs; number words as digits."""
    text = re.sub(r"[$€£]\s*", "", " ".join(text.lower().split())).strip(" .,;:!?\"'`*()")
    text = re.sub(r"^(?:a|an|the)\s+", "", text)
    return " ".join(NUMBERS.get(word, word) for word in text.split())


@metric("short_answer")
class ShortAnswer(Metric):
    """Accuracy, where the form of the correct answer determines how an answer is parsed; also per `skill`."""

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        wanted = reference["answer"]
        if reference.get("choices"):
            found = parse_choice(answer, reference["choices"], finished)
            return verdict(answer, found, float(found == wanted), finished)
        if wanted.lower() in ("yes", "no"):
            found = parse_yes_no(answer, finished)
            return verdict(answer, found, float(found == wanted.lower()), finished)
        said = short_normalize(answer)
        return verdict(answer, said or None, float(said != "" and said == short_normalize(wanted)), finished)

    def stratum(self, reference: Reference) -> str:
        return reference.get("skill") or ""

    def combine(self, strata: Strata) -> dict[str, float]:
        by = {f"skill/{name}": 100 * float(mean[0]) for name, (_, mean) in strata.items() if name}
        return {"accuracy": 100 * float(pooled(strata)[0]), **by}
