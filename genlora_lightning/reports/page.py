"""Write runs as one HTML file: curves, tables and effective ranks, with all that they need inside of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from typing import Any

import yaml

from genlora_lightning._version import __version__
from genlora_lightning.reports.curves import Curve, thin
from genlora_lightning.reports.method import LAYER, SPECTRA_SECTION, answers_section, data_section, spectra_data
from genlora_lightning.reports.record import read_samples
from genlora_lightning.reports.runs import AdapterSizes, Rank, Run
from genlora_lightning.reports.spectra import Spectra, read_spectra
from genlora_lightning.reports.words import RUN_COLUMNS, facts_of, metric_rows, run_cells, size

_TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "memory_gib": "Most memory so far (GiB)",
}
_SPLIT = re.compile(r"^(?:train|val|valid|validation)[_/]")
_VERSION = re.compile(r"[\\/]logs[\\/]version_\d+$")
_LIMIT = 2000  # points of a curve: more than a screen has columns
_POINTS = 200_000  # of all curves together, at about 16 bytes each ...
_LEAST = 100  # ... unless they are very many
_SCRIPTS = ("touch.js", "report.js", "spectra.js")
_DIGITS = 7


@dataclass(frozen=True)
class _Panel:
    title: str
    curves: dict[str, Curve]


def run_page(run: Run, sizes: AdapterSizes | None) -> str:
    """Returns the HTML page of one run.

    What is read of it here: its answers and spectra.

    Args:
        run: The run.
        sizes: Of its adapter, if it has one.
    """
    spectra = read_spectra(run.folders)
    parts = [
        f"<h1>{escape(str(run.folder))}</h1>",
        _facts(facts_of(run, sizes)),
        "".join(f'<p class="note">{escape(note)}</p>' for note in run.notes),
    ]
    rows = metric_rows(run)
    panels = _panels_of_run(run)
    if rows:
        parts += [*_figures(panels), "<h2>Figures</h2>", _table(("figure", "first", "last", "lowest", "highest"), rows)]
    else:
        parts.append("<p>Nothing was logged.</p>")
    parts += data_section(run.starts) + answers_section(read_samples(run.folders))
    if sizes is not None:
        parts += _sizes(run, sizes)
    if spectra is not None:
        parts += SPECTRA_SECTION
    if run.config:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        parts.append(f"<details><summary>Configuration, resolved</summary><pre>{escape(text)}</pre></details>")
    return _page(str(run.folder), parts, panels, spectra)


def runs_page(runs: Sequence[Run], title: str) -> str:
    """Returns the HTML page of several runs: a table, and their curves over each other."""
    panels = _panels_of_runs(runs)
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{len(runs)} runs.</p>"]
    parts += [_table(RUN_COLUMNS, [run_cells(run) for run in runs]), *_figures(panels)]
    return _page(title, parts, panels)


# -- curves -----------------------------------------------------------------------------------------------------------


def _panels_of_run(run: Run) -> list[_Panel]:
    """A panel for each figure, training and validation in one."""
    figures: dict[str, dict[str, Curve]] = {}
    for name, curve in run.shown_curves.items():
        figures.setdefault(_SPLIT.sub("", name), {})[name] = curve
    return [_Panel(_TITLES.get(name, name), dict(sorted(figures[name].items()))) for name in _in_order(figures)]


def _panels_of_runs(runs: Sequence[Run]) -> list[_Panel]:
    """A panel for each figure, training and validation apart, with a curve for each run."""
    short = [_VERSION.sub("", str(run.folder)) for run in runs]
    figures: dict[str, dict[str, Curve]] = {}
    for run, label in zip(runs, short, strict=True):
        for name, curve in run.shown_curves.items():
            figures.setdefault(name, {})[label if short.count(label) == 1 else str(run.folder)] = curve
    return [_Panel(_TITLES.get(name, name), figures[name]) for name in _in_order(figures)]


def _in_order(figures: Mapping[str, Any]) -> list[str]:
    places = {name: place for place, name in enumerate(_TITLES)}
    return sorted(figures, key=lambda name: (places.get(_SPLIT.sub("", name), len(places)), name))


def _figures(panels: Sequence[_Panel]) -> list[str]:
    parts = ['<noscript><p class="note">The curves need JavaScript.</p></noscript><div class="panels">']
    for number, panel in enumerate(panels):
        broken = {name: one.not_finite for name, one in panel.curves.items() if one.not_finite}
        notes = [
            f"{name} was NaN or infinite at {len(steps)} of the logged steps, first at {steps[0]}."
            for name, steps in broken.items()
        ]
        parts.append(
            f'<figure data-panel="{number}"><figcaption><b>{escape(panel.title)}</b> <span class="tools">'
            '<button type="button" data-log aria-pressed="false">log scale</button> '
            '<button type="button" data-reset hidden>reset zoom</button></span></figcaption><div class="plot"></div>'
            f"{''.join(f'<p class=note>{escape(note)}</p>' for note in notes)}</figure>"
        )
    return [*parts, "</div>"]


def _data(panels: Sequence[_Panel]) -> dict[str, Any]:
    count = sum(len(panel.curves) for panel in panels)
    limit = max(_LEAST, min(_LIMIT, _POINTS // max(1, count)))
    curves = [[(name, thin(one, limit)) for name, one in panel.curves.items()] for panel in panels]
    return {
        "panels": [
            {
                "title": panel.title,
                "series": [
                    {"name": name, "x": one.steps, "y": [float(f"{value:.{_DIGITS}g}") for value in one.values]}
                    for name, one in thinned
                ],
            }
            for panel, thinned in zip(panels, curves, strict=True)
        ]
    }


# -- adapter ----------------------------------------------------------------------------------------------------------


def _sizes(run: Run, sizes: AdapterSizes) -> list[str]:
    parts = ["<h2>Adapter</h2>"]
    rows = [(f"this adapter ({run.kind})", sizes.parameters)]
    if sizes.lora_parameters is not None and run.kind != "lora":
        rows.append((f"LoRA of rank {run.rank} for the same linears", sizes.lora_parameters))
    if sizes.lora_8_parameters is not None and run.rank != 8:
        rows.append(("LoRA of rank 8", sizes.lora_8_parameters))
    most = max((count for _, count in rows), default=1) or 1
    parts.append('<table class="bars">')
    for name, count in rows:
        parts.append(
            f"<tr><th>{escape(name)}</th><td><i style='width:{100 * count / most:.2f}%'></i></td>"
            f"<td>{count:,} values</td></tr>"
        )
    parts.append("</table>")
    if run.num_bytes is not None:
        parts.append(f"<p>{size(run.num_bytes)} in {escape(str(run.adapter))}.</p>")
    return [*parts, *_heat_map(sizes.ranks)]


def _heat_map(ranks: Sequence[Rank]) -> list[str]:
    """Effective ranks as a table of layers and kinds of linears, coloured from the lowest to the highest."""
    if not ranks:
        return []
    found = [(rank, LAYER.match(rank.module)) for rank in ranks]
    cells: dict[str, dict[str, Rank]] = {}
    for rank, match in found:
        layer, linear = (match["layer"], match["linear"]) if match else ("", rank.module)
        cells.setdefault(layer, {})[linear] = rank
    linears = list(dict.fromkeys(linear for row in cells.values() for linear in row))
    low, high = min(rank.effective for rank in ranks), max(rank.effective for rank in ranks)
    stacks = [layer.rpartition(".")[0] for layer in cells if layer]
    shared = f"{stacks[0]}." if stacks and len(set(stacks)) == 1 and stacks[0] else ""
    parents = [linear.rpartition(".")[0] for linear in linears]
    lines = [
        "<h2>Effective rank of each update</h2>",
        "<p>The exponential of the entropy of its singular values: 1 if one direction carries all of it, the rank "
        f"({_span([rank.rank for rank in ranks])}) if all directions weigh the same. "
        f"<span class='scale'>{low:.1f}<i></i>{high:.1f}</span></p>",
        "<div class='wide'><table class='heat'><thead><tr>",
        f"<th>{escape(shared or 'layer')}</th>",
        *(
            f"<th title='{escape(linear)}'><small>{escape(parent)}</small><br>{escape(linear.rpartition('.')[2])}</th>"
            for linear, parent in zip(linears, parents, strict=True)
        ),
        "</tr></thead><tbody>",
    ]
    for layer, row in cells.items():
        lines.append(f"<tr><th>{escape(layer[len(shared) :] or '-')}</th>")
        for linear in linears:
            one = row.get(linear)
            if one is None:
                lines.append("<td></td>")
                continue
            share = (one.effective - low) / (high - low) if high > low else 1.0
            lines.append(
                f"<td style='--v:{share:.3f}' title='{escape(one.module)}: {one.effective:.2f} of {one.rank}'>"
                f"{one.effective:.1f}</td>"
            )
        lines.append("</tr>")
    return ["\n".join([*lines, "</tbody></table></div>"])]


def _span(values: Sequence[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


# -- HTML -------------------------------------------------------------------------------------------------------------


def _facts(rows: Mapping[str, str]) -> str:
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows.items())
    return f"<dl>{''.join(lines)}</dl>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _page(title: str, parts: Sequence[str], panels: Sequence[_Panel], spectra: Spectra | None = None) -> str:
    shown = {**_data(panels), **({} if spectra is None else {"spectra": spectra_data(spectra)})}
    # In a script element only `<` can end it early; JSON allows it to be escaped.
    data = json.dumps(shown, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            # What is in the file may run and style it; nothing may be fetched.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>{_asset('uPlot.min.css')}\n{_asset('report.css')}</style></head><body><main>",
            *parts,
            f"<footer>Written by genlora-lightning {escape(__version__)}.</footer></main>",
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>/* uPlot:\n{_asset('uPlot-LICENSE.txt')}*/\n{_asset('uPlot.iife.min.js')}</script>",
            f"<script>{''.join(map(_asset, _SCRIPTS))}</script></body></html>\n",
        ]
    )


@cache
def _asset(name: str) -> str:
    return resources.files("genlora_lightning.reports").joinpath("assets", name).read_text(encoding="utf-8")
