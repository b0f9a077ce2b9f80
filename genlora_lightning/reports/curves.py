"""Read the curves of a run's metrics, join those of its restarts, and thin them without losing their extremes."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.csv"  # of Lightning's CSVLogger
_STEP, _EPOCH = "step", "epoch"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One logged figure over the optimizer steps.

    Args:
        steps: Lightning's ``global_step`` when it was logged, rising.
        values: The finite values at these steps.
        not_finite: Steps at which it was NaN or infinite, which are left out of ``values``.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]
    not_finite: tuple[int, ...] = ()

    @property
    def lowest(self) -> tuple[float, int]:
        """Its lowest value, and the first step with it."""
        return min(zip(self.values, self.steps, strict=True))

    @property
    def highest(self) -> tuple[float, int]:
        """Its highest value, and the first step with it."""
        value = max(self.values)
        return value, self.steps[self.values.index(value)]


def read_curves(file: Path) -> dict[str, Curve]:
    """Read a metrics file, by the names of its columns; a last line that was cut off while it was written is left out.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no text, or has no column ``step``.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is damaged: it is no text ({error}).") from error
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = list(csv.DictReader(lines))
    if rows and _STEP not in rows[0]:
        raise ValueError(f"{file} has no column `{_STEP}`, so it is none of Lightning's CSVLogger.")
    logged: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        step = _number(row.get(_STEP))
        if step is None or not math.isfinite(step):
            continue
        for name, text in row.items():
            value = _number(text)
            if value is not None and name not in (_STEP, _EPOCH):
                logged.setdefault(name, []).append((int(step), value))
    return {name: curve(points) for name, points in logged.items()}


def curve(points: Iterable[tuple[int, float]]) -> Curve:
    """Sort points by step; of two at one step the later one counts."""
    at = dict(points)
    finite = [(step, at[step]) for step in sorted(at) if math.isfinite(at[step])]
    return Curve(
        steps=tuple(step for step, _ in finite),
        values=tuple(value for _, value in finite),
        not_finite=tuple(step for step in sorted(at) if not math.isfinite(at[step])),
    )


def join_curves(parts: Sequence[dict[str, Curve]]) -> dict[str, Curve]:
    """Join the curves of a run and its restarts, oldest first.

    A restart goes on from a checkpoint, so what an earlier part logged from the first step of a later one on was
    trained in vain, and is left out.
    """
    joined: dict[str, list[tuple[int, float]]] = {}
    for part in parts:
        steps = [step for one in part.values() for step in (*one.steps, *one.not_finite)]
        begin = min(steps, default=math.inf)
        joined = {name: [point for point in points if point[0] < begin] for name, points in joined.items()}
        for name, one in part.items():
            joined.setdefault(name, []).extend(zip(one.steps, one.values, strict=True))
            joined[name] += [(step, math.nan) for step in one.not_finite]
    return {name: curve(points) for name, points in joined.items() if points}


def thin(one: Curve, limit: int = 2000) -> Curve:
    """Keep at most ``limit`` points (at least 4) of a curve: its ends, and the extremes of each of equal stretches."""
    count = len(one.values)
    if count <= limit:
        return one
    kept = {0, count - 1}
    buckets = (limit - 2) // 2
    for bucket in range(buckets):
        inside = range(1 + bucket * (count - 2) // buckets, 1 + (bucket + 1) * (count - 2) // buckets)
        kept |= {min(inside, key=one.values.__getitem__), max(inside, key=one.values.__getitem__)}
    order = sorted(kept)
    return Curve(
        steps=tuple(one.steps[i] for i in order),
        values=tuple(one.values[i] for i in order),
        not_finite=one.not_finite,
    )


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) and text else None
    except ValueError:
        return None
