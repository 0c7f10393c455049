"""Open short answers: VQA accuracy over ten annotators, and exact match after normalization."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from florence_vl.evaluate.metrics.base import Metric, Reference, Verdict, metric, verdict
from florence_vl.evaluate.metrics.text import evalai_normalize, plain_normalize, vqa_normalize


def vqa_accuracy(answer: str, answers: Sequence[str], normalize: Callable[[str], str] = vqa_normalize) -> float:
    """Accuracy against annotators: the mean, over each annotator left out, of min(1, agreeing others / 3).

    An answer that is empty after normalization scores 0, even if an annotator's answer is empty too.
    """
    given = normalize(answer)
    if not given or not answers:
        return 0.0
    counts = Counter(normalize(other) for other in answers)
    same = counts[given]
    left_in, left_out = min(1.0, same / 3), min(1.0, (same - 1) / 3)
    return ((len(answers) - same) * left_in + same * left_out) / len(answers)


@metric("vqa_accuracy")
class VQAAccuracy(Metric):
    """VQA accuracy with the official VQAv2 normalization (Goyal et al., 2017)."""

    normalize: Callable[[str], str] = staticmethod(vqa_normalize)

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        score = vqa_accuracy(answer, reference["answers"], self.normalize)
        return verdict(answer, self.normalize(answer) or None, score, finished)


@metric("evalai_accuracy")
class EvalAIAccuracy(VQAAccuracy):
    """VQA accuracy with the EvalAI normalization (TextVQA, VizWiz)."""

    normalize = staticmethod(evalai_normalize)


@metric("exact_match")
class ExactMatch(Metric):
    """Equality with the answer, ignoring case, punctuation and spacing (GQA)."""

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        given = plain_normalize(answer)
        accepted = reference["answers"] if "answers" in reference else [reference["answer"]]
        return verdict(answer, given or None, float(given != "" and given in map(plain_normalize, accepted)), finished)
