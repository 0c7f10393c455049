"""Benchmarks that only a judge can score: MM-Vet and LLaVA-Bench in the wild."""

from __future__ import annotations

from collections.abc import Sequence

from florence_vl.evaluate.metrics.base import Judged, Metric, Reference, Strata, Verdict, metric, pooled


class JudgedMetric(Metric):
    """A metric whose verdicts come from a judge's replies (`florence_vl.evaluate.judge`), never from the text alone."""

    def read(self, answer: str, reference: Reference, finished: bool = True) -> Verdict:
        raise ValueError(f"the metric {self.name!r} needs a judge: give an OpenAI-compatible endpoint with --judge URL")


@metric("mmvet")
class MMVet(JudgedMetric):
    """MM-Vet: mean of the judge's correctness (0 to 1), over all questions and by capability (Yu et al., 2024)."""

    headline = "score"

    def stratum(self, reference: Reference) -> str:
        return str(reference.get("capability") or "")

    def combine(self, strata: Strata) -> dict[str, float]:
        scores = {"score": 100 * float(pooled(strata)[0])}
        for capability in ("rec", "ocr", "know", "gen", "spat", "math"):
            if part := {name: value for name, value in strata.items() if capability in name.split(",")}:
                scores[f"capability/{capability}"] = 100 * float(pooled(part)[0])
        return scores


@metric("llava_bench")
class LLaVABench(JudgedMetric):
    """LLaVA-Bench: the judge's points for the model over its points for the reference answer (Liu et al., 2023)."""

    headline = "all"

    def stratum(self, reference: Reference) -> str:
        return reference["category"]

    def vector(self, judged: Sequence[Judged]) -> tuple[float, ...]:
        ((found, _),) = judged
        details = found.details or {}
        return (details["model_points"], details["reference_points"])

    def extremes(self, judged: Sequence[Judged]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (1.0, 10.0), (10.0, 10.0)  # the judge gives 1 to 10 points

    def combine(self, strata: Strata) -> dict[str, float]:
        ours, theirs = pooled(strata)
        return {"all": 100 * float(ours / theirs), **{n: 100 * float(m[0] / m[1]) for n, (_, m) in strata.items()}}
