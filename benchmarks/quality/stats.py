"""Means over seeds with 95 % intervals (Student's t)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond the table the normal distribution's is near.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_LIMIT = 2.12  # that of 16, a little wide for more


class Estimate(NamedTuple):
    """A mean and the half width of its interval (infinite for one value)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    def text(self, digits: int = 4, *, signed: bool = False) -> str:
        """The estimate for a table."""
        sign = "+" if signed else ""
        half = f" ± {self.half:.{digits}f}" if math.isfinite(self.half) else " (one seed)"
        return f"{self.mean:{sign}.{digits}f}{half}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of the mean."""
    return average([values])


def average(samples: Sequence[Sequence[float]]) -> Estimate:
    """Mean of the means of independent samples, one per task, and its 95 % interval.

    The samples may differ in number and in spread: ``half = t(f) · √V / k`` with ``V = Σ vᵢ``, ``vᵢ = sᵢ² / nᵢ``, and
    Welch's and Satterthwaite's degrees of freedom ``f = V² / Σ vᵢ² / (nᵢ − 1)``, rounded down.
    """
    means = [sum(values) / len(values) for values in samples]
    mean = sum(means) / len(means)
    if any(len(values) < 2 for values in samples):
        return Estimate(mean, math.inf)
    spreads = [
        sum((value - own) ** 2 for value in values) / (len(values) - 1) / len(values)
        for values, own in zip(samples, means, strict=True)
    ]
    total = sum(spreads)
    if not total:
        return Estimate(mean, 0.0)
    weights = sum(v * v / (len(values) - 1) for v, values in zip(spreads, samples, strict=True))
    freedom = int(total * total / weights + 1e-9)
    t = _T[freedom - 1] if freedom <= len(_T) else _T_LIMIT
    return Estimate(mean, t * math.sqrt(total) / len(samples))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours minus theirs for each seed that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
