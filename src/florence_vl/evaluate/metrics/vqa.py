"""Open short answers: VQA accuracy over ten annotators, and exact match after normalisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from florence_vl.evaluate.metrics.base import Metric, Reference, Verdict, metric, verdict
from florence_vl.evaluate.metrics.text import evalai_normalise, plain_normalise, vqa_normalise


def vqa_accuracy(answer: str, answers: Sequence[str], normalise: Callable[[str], str] = vqa_normalise) -> float:
    """Accuracy against annotators: the mean, over each annotator left out, of min(1, agreeing others / 3).

    An answer of which normalisation leaves nothing scores 0, also when an annotator's answer vanishes too.
    """
    given = normalise(answer)
    if not given or not answers:
        return 0.0
    counts = Counter(normalise(other) for other in answers)
    same = counts[given]
    left_in, left_out = min(1.0, same / 3), min(1.0, (same - 1) / 3)
    return ((len(answers) - same) * left_in + same * left_out) / len(answers)


@metric("vqa_accuracy")
class VQAAccuracy(Metric):
    """VQA accuracy with the official VQAv2 normalisation (Goyal et al., 2017)."""

    normalise: Callable[[str], str] = staticmethod(vqa_normalise)

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        score = vqa_accuracy(answer, reference["answers"], self.normalise)
        return verdict(answer, self.normalise(answer) or None, score, finished)


@metric("evalai_accuracy")
class EvalAIAccuracy(VQAAccuracy):
    """VQA accuracy with the EvalAI normalisation (TextVQA, VizWiz)."""

    normalise = staticmethod(evalai_normalise)


@metric("exact_match")
class ExactMatch(Metric):
    """Equality with the answer without regard to case, punctuation and spacing (GQA)."""

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        given = plain_normalise(answer)
        accepted = reference["answers"] if "answers" in reference else [reference["answer"]]
        return verdict(answer, given or None, float(given != "" and given in map(plain_normalise, accepted)), finished)
