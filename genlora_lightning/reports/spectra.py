"""Write and read the singular values of a run's updates over time, in a form that is small for hundreds of layers."""

from __future__ import annotations

import json
import math
import struct
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genlora_lightning.reports.record import SPECTRA_FILE, read_lines

MOST_VALUES = 32  # of a layer's singular values that are kept; the effective rank is of all


@dataclass(frozen=True, kw_only=True)
class SpectrumPoint:
    """The updates of all layers after one step.

    Args:
        step: Optimizer steps that were made before.
        effective: Entropy effective rank of each layer's update; NaN where it is not finite.
        largest: Largest singular value of each.
        ratios: The kept singular values of each, divided by the largest, descending.
    """

    step: int
    effective: tuple[float, ...]
    largest: tuple[float, ...]
    ratios: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """The updates of a run over time.

    Args:
        layers: Names of the adapted layers.
        ranks: Highest rank that the update of each can have.
        points: Oldest first.
    """

    layers: tuple[str, ...]
    ranks: tuple[int, ...]
    points: tuple[SpectrumPoint, ...]


def kept_places(rank: int) -> list[int]:
    """The places, from 0, of the singular values that are kept of so many: all, or some from the first to the last."""
    if rank <= MOST_VALUES:
        return list(range(rank))
    return [round(place * (rank - 1) / (MOST_VALUES - 1)) for place in range(MOST_VALUES)]


def header_line(layers: Sequence[str], ranks: Sequence[int]) -> str:
    """Make the line that stands before the points of one start."""
    return json.dumps({"layers": list(layers), "ranks": list(ranks)}) + "\n"


def point_line(point: SpectrumPoint) -> str:
    """Make the line of a point: ranks with three decimals, ratios as half-precision numbers."""
    flat = [_half(ratio) for ratios in point.ratios for ratio in ratios]
    fields = {
        "step": point.step,
        "effective": [None if math.isnan(rank) else round(rank, 3) for rank in point.effective],
        "largest": [float(f"{value:.5g}") if math.isfinite(value) else 0.0 for value in point.largest],
        "ratios": b64encode(struct.pack(f"<{len(flat)}e", *flat)).decode(),
    }
    return json.dumps(fields, separators=(",", ":"), allow_nan=False) + "\n"


def read_spectra(folders: Iterable[Path]) -> Spectra | None:
    """Read what a run's starts have kept, oldest first; ``None`` if there is nothing.

    A restart goes on from a checkpoint, so what an earlier one kept from its first step on is left out. A start with
    other layers than the last one's is left out, and so are lines that are damaged.
    """
    layers: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    points: dict[int, SpectrumPoint] = {}
    for folder in folders:
        begun = False
        for line in read_lines(folder / SPECTRA_FILE):
            if "layers" in line:
                header = _header(line)
                if header is None:
                    continue
                if header != (layers, ranks):
                    (layers, ranks), points = header, {}
                begun = False
                continue
            point = _point(line, ranks)
            if point is None:
                continue
            if not begun:
                points = {step: one for step, one in points.items() if step < point.step}
                begun = True
            points[point.step] = point
    if not points:
        return None
    return Spectra(layers=layers, ranks=ranks, points=tuple(points[step] for step in sorted(points)))


def _header(line: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]] | None:
    layers, ranks = line.get("layers"), line.get("ranks")
    if not (isinstance(layers, list) and isinstance(ranks, list) and len(layers) == len(ranks)):
        return None
    if not all(isinstance(name, str) for name in layers):
        return None
    if not all(type(rank) is int and 0 < rank < 1 << 20 for rank in ranks):
        return None
    return tuple(layers), tuple(ranks)


def _point(line: dict[str, Any], ranks: Sequence[int]) -> SpectrumPoint | None:
    sizes = [min(rank, MOST_VALUES) for rank in ranks]
    try:
        flat = struct.unpack(f"<{sum(sizes)}e", b64decode(line["ratios"], validate=True))
        effective = tuple(math.nan if rank is None else float(rank) for rank in line["effective"])
        largest = tuple(float(value) for value in line["largest"])
        step = line["step"]
    except (KeyError, TypeError, ValueError, OverflowError, struct.error):
        return None
    finite = all(map(math.isfinite, (*flat, *largest))) and not any(map(math.isinf, effective))
    if type(step) is not int or step < 0 or not finite or not len(effective) == len(largest) == len(ranks):
        return None
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    ratios = tuple(flat[end - size : end] for end, size in zip(ends, sizes, strict=True))
    return SpectrumPoint(step=step, effective=effective, largest=largest, ratios=ratios)


def _half(ratio: float) -> float:
    return ratio if math.isfinite(ratio) else 0.0
