"""Means over seeds with 95 % intervals (Student's t)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom; beyond the table the normal distribution's is near.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_LIMIT = 1.96


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
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Estimate(mean, math.inf)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    t = _T[n - 2] if n - 2 < len(_T) else _T_LIMIT
    return Estimate(mean, t * deviation / math.sqrt(n))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Ours minus theirs over the seeds that both have; ``None`` without one, or where a run diverged."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
    return estimate(differences) if differences and all(map(math.isfinite, differences)) else None


def mean_over_tasks(by_task: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Per seed the mean over tasks, for the seeds that every task has."""
    seeds = set.intersection(*(set(values) for values in by_task)) if by_task else set()
    return {seed: sum(values[seed] for values in by_task) / len(by_task) for seed in sorted(seeds)}
