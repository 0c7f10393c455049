"""Means with intervals over seeds, and paired differences: few runs, so Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t by degrees of freedom, 1..30; then the normal quantile is near enough.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and half of its 95 % interval.

    Args:
        mean: The mean.
        half: Half of the interval's width; None for a single run, which has no interval.
        runs: Number of runs.
    """

    mean: float
    half: float | None
    runs: int

    @property
    def low(self) -> float:
        """Lower end; minus infinity for a single run."""
        return -math.inf if self.half is None else self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end; plus infinity for a single run."""
        return math.inf if self.half is None else self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of the interval; never for a single run."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """`mean ± half`, or the mean alone for a single run."""
        mean = f"{self.mean * scale:.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half * scale:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval of runs that differ in the seed only.

    Raises:
        ValueError: There is no value.
    """
    runs = len(values)
    if runs == 0:
        raise ValueError("an interval needs at least one value")
    mean = math.fsum(values) / runs
    if runs == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (runs - 1)
    quantile = T_975[runs - 2] if runs - 2 < len(T_975) else 1.96
    return Interval(mean, quantile * math.sqrt(variance / runs), runs)


def paired(values: Sequence[float], reference: Sequence[float]) -> Interval:
    """Interval of the differences `values - reference`, run by run (same seed, same split).

    Raises:
        ValueError: Different numbers of runs.
    """
    if len(values) != len(reference):
        raise ValueError(
            f"a paired difference needs as many runs on both sides, got {len(values)} and {len(reference)}"
        )
    return interval([v - r for v, r in zip(values, reference, strict=True)])
