"""Make the parts of a report that show the method at work: data, answers before and after, ranks over time."""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from genlora_lightning.reports.record import Sample, data_rows
from genlora_lightning.reports.spectra import Spectra, SpectrumPoint, kept_places

LAYER = re.compile(r"^(?P<layer>(?:[^.]+\.)*?\d+)\.(?P<linear>.+)$")
_MOST_POINTS = 96  # of the time axis: a map on a phone has no more columns that can be told apart
_MOST_NUMBERS = 1_500_000  # singular values in a page, of a byte each
_DECADES = 6  # below the largest singular value

SPECTRA_SECTION = [
    "<h2>Effective rank over the training</h2>",
    "<p>A row is a layer, and time goes to the right; without a colour an update is zero. Point at a cell for its "
    "value, choose a row for its singular values. <span class='scale strong'><span id='rank-low'></span><i></i>"
    "<span id='rank-high'></span></span></p>",
    "<p id='rank-value' class='value' aria-live='polite'>&nbsp;</p><div id='rank-maps' class='maps'></div>",
    "<figure id='spectrum'><figcaption><b>Singular values of ΔW</b> <select aria-label='layer'></select></figcaption>"
    "<div class='plot'></div></figure>",
]


def data_section(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Make a table of the data of a run, if it has noted any."""
    header, rows = data_rows(starts)
    if not rows:
        return []
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return [f"<h2>Data</h2><div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"]


def answers_section(samples: Sequence[Sample]) -> list[str]:
    """Show each prompt with what was expected, and the answers before and after; those in between on demand."""
    if not samples:
        return []
    prompts: dict[int, list[Sample]] = {}
    for sample in samples:
        prompts.setdefault(sample.index, []).append(sample)
    parts = ["<h2>Answers before and after</h2><div class='answers'>"]
    for answers in (prompts[index] for index in sorted(prompts)):
        first, *between, last = answers if len(answers) > 1 else [answers[0], answers[0]]
        rows = [("expected", last.reference), (_when(first), first.answer)]
        rows += [(_when(last), last.answer)] if last is not first else []
        parts.append(f"<article><p>{escape(last.prompt)}</p>{_answers(rows)}")
        if between:
            inner = _answers([(_when(sample), sample.answer) for sample in between])
            parts.append(f"<details><summary>in between ({len(between)})</summary>{inner}</details>")
        parts.append("</article>")
    return [*parts, "</div>"]


def spectra_data(spectra: Spectra) -> dict[str, Any]:
    """Pack a run's spectra for the page: effective ranks in hundredths, singular values as bytes.

    A byte v > 0 stands for 10^(6 (v/255 − 1)) of the layer's largest singular value at that point, 0 for less.
    """
    places = [kept_places(rank) for rank in spectra.ranks]
    most = max(2, min(_MOST_POINTS, _MOST_NUMBERS // max(1, sum(map(len, places)))))
    points = _some(spectra.points, most)
    packed = bytes(_byte(ratio) for point in points for ratios in point.ratios for ratio in ratios)
    return {
        "layers": spectra.layers,
        "ranks": spectra.ranks,
        "places": {rank: kept_places(rank) for rank in sorted(set(spectra.ranks))},
        "groups": _groups(spectra.layers),
        "steps": [point.step for point in points],
        "effective": [[-1 if math.isnan(rank) else round(100 * rank) for rank in point.effective] for point in points],
        "largest": [[float(f"{value:.3g}") for value in point.largest] for point in points],
        "decades": _DECADES,
        "values": b64encode(packed).decode(),
    }


def _groups(layers: Sequence[str]) -> list[dict[str, Any]]:
    """Put the same linear of all layers together: its name, and which ones these are."""
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(layers):
        match = LAYER.match(name)
        groups.setdefault(match["linear"] if match else "", []).append(number)
    return [{"name": name or "others", "members": members} for name, members in groups.items()]


def _some(points: Sequence[SpectrumPoint], most: int) -> list[SpectrumPoint]:
    if len(points) <= most:
        return list(points)
    return [points[round(place * (len(points) - 1) / (most - 1))] for place in range(most)]


def _byte(ratio: float) -> int:
    return 0 if ratio <= 0 else max(0, min(255, round(255 * (1 + math.log10(ratio) / _DECADES))))


def _when(sample: Sample) -> str:
    return "before" if sample.step == 0 else f"after {sample.step:,} steps"


def _answers(rows: Sequence[tuple[str, str]]) -> str:
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(text) or '<i>nothing</i>'}</dd>" for name, text in rows)
    return f"<dl>{''.join(lines)}</dl>"
