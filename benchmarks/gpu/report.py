"""From the rows to REPORT.md and pictures: each bar with its figure and met, not met or not measured; all tables."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.rows import Row as QualityRow
from benchmarks.quality.rows import read_rows
from benchmarks.speed.plan import ARMS
from benchmarks.speed.report import markdown_table
from benchmarks.speed.results import Spread, spread

from .rows import Row, latest, read

BARS_HEADER = ["what", "bar", "figure", "quartiles", "status"]
_GIB = 2**30
_REFERENCES = {"step": "lora", "generate": "base"}


@dataclass(frozen=True)
class Bar:
    """A figure that has to be small enough.

    Args:
        what: In words.
        most: The largest value that is good enough.
        figure: Finds it in the rows by name; raises :class:`KeyError` where it was not measured.
    """

    what: str
    most: float
    figure: Callable[[dict[str, Row]], Spread | float]

    def row(self, rows: dict[str, Row]) -> list[str]:
        """Its row in the table."""
        try:
            found = self.figure(rows)
        except KeyError:
            return [self.what, f"≤ {self.most:g}", "", "", "not measured"]
        value = found.median if isinstance(found, Spread) else found
        quartiles = f"{found.first:.3f}–{found.third:.3f}" if isinstance(found, Spread) else ""
        return [self.what, f"≤ {self.most:g}", f"{value:.3f}", quartiles, "met" if value <= self.most else "not met"]


def ratio(rows: dict[str, Row], name: str, arm: str, reference: str) -> Spread:
    """An arm's time over another's of the same round."""
    arms = rows[name]["values"]
    pairs = zip(arms[arm]["seconds"], arms[reference]["seconds"], strict=True)
    return spread([one / other for one, other in pairs])


def memory(rows: dict[str, Row], name: str, arm: str = "genlora") -> float:
    """An arm's peak over PEFT LoRA's."""
    arms = rows[name]["values"]
    if arms[arm]["peak_bytes"] is None:
        raise KeyError("peak_bytes")
    return float(arms[arm]["peak_bytes"] / arms["lora"]["peak_bytes"])


def waits(rows: dict[str, Row]) -> float:
    """Waits of a training step beyond those of the user's own."""
    values = rows["waits"]["values"]
    if values["waits"] is None:
        raise KeyError("waits")
    return float(values["waits"] - values["own"])


def bars() -> list[Bar]:
    """All bars; of training steps the aim is 0.95."""
    step = "step: random-8b bf16 rank {} 1x2048"
    low, high = step.format(16), step.format(64)
    decode = "generate: random-8b bf16 rank 16 1x64+16"
    return [
        Bar("training step / PEFT LoRA, 8B, rank 16 (aim 0.95)", 1.0, lambda r: ratio(r, low, "genlora", "lora")),
        Bar("training step / PEFT LoRA, 8B, rank 64 (aim 0.95)", 1.0, lambda r: ratio(r, high, "genlora", "lora")),
        Bar("peak memory / PEFT LoRA, 8B, rank 16", 1.0, lambda r: memory(r, low)),
        Bar("peak memory / PEFT LoRA, 8B, rank 64", 1.0, lambda r: memory(r, high)),
        Bar("generator's share of a step, 8B, rank 64", 0.03, lambda r: ratio(r, high, "generator", "genlora")),
        Bar("waits for the device per training step, beyond the user's own", 0.0, waits),
        Bar("decoding / PEFT LoRA, 8B, rank 16", 1.0, lambda r: ratio(r, decode, "genlora", "lora")),
    ]


def write_report(path: Path, target: Path, images: Path) -> None:
    """Write the Markdown, and the pictures of what was measured.

    Args:
        path: The file of rows; the language tasks' are in ``quality.csv`` beside it.
        target: The Markdown file.
        images: Folder of the pictures.
    """
    rows = latest(read(path))
    cards = list(dict.fromkeys(row["card"] for row in rows))
    quality = [row for row in read_rows(path.parent).values() if row["experiment"] == "quality"]
    parts = ["# On a GPU"]
    if not rows and not quality:
        parts.append("Nothing was measured yet: no GPU was at hand. `python -m benchmarks.gpu run` measures it.")
    for card in cards or ["no card yet"]:
        mine = {row["name"]: row for row in rows if row["card"] == card and "error" not in row}
        parts += [f"## Bars: {card}", markdown_table(BARS_HEADER, [bar.row(mine) for bar in bars()], 1)]
        if mine:
            parts += [_conditions([*mine.values()]), *_right(mine), *_fast(mine)]
        if failed := [row for row in rows if row["card"] == card and "error" in row]:
            parts += ["### Ended with an error", markdown_table(["stage", "what", "error"], _errors(failed), 3)]
    parts += _good(quality)
    if names := _draw(rows, quality, images):
        parts += ["## Pictures", *(f"![{name}]({os.path.relpath(images / name, target.parent)})" for name in names)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _errors(rows: list[Row]) -> list[list[str]]:
    return [[row["stage"], row["name"], " ".join(row["error"].split())[:300].replace("|", "/")] for row in rows]


def _conditions(rows: list[Row]) -> str:
    def each(text: Callable[[dict[str, Any]], str]) -> str:
        return ", ".join(sorted({text(row["environment"]) for row in rows}))

    versions = each(lambda e: " ".join([f"Python {e['python']}", *(f"{n} {v}" for n, v in e["versions"].items())]))
    return f"{versions}. Commit {each(lambda e: str(e['commit']))}, {each(lambda e: e['time'][:10])}."


def _right(rows: dict[str, Row]) -> list[str]:
    lines = []
    for row in rows.values():
        if row["stage"] != "right" or row["name"] == "waits":
            continue
        values = row["values"]
        errors = [
            f"{name} {x:.1e} (≤ {values['tolerances'][name]:.0e})" for name, x in values.get("errors", {}).items()
        ]
        counts = [f"{number} {word}" for word, number in values.get("counts", {}).items()]
        found = ", ".join([*errors, *counts, *values.get("failures", ()), *filter(None, [values.get("backend")])])
        lines.append([row["name"], found, "right" if values["right"] else "wrong"])
    if not lines:
        return []
    text = (
        "Errors are ‖x − reference‖ / ‖reference‖; the reference of `float32` and `bfloat16` is float64 on the CPU "
        "with the same weights, of the others the plain way. Tests that need a second device are skipped."
    )
    parts = ["### Right", text, markdown_table(["check", "errors and tolerances", ""], lines, 3)]
    values = rows["waits"]["values"] if "waits" in rows else {"waits": None}
    if values["waits"] is not None:
        places = [[place, f"{count:g}"] for place, count in sorted(values["places"].items(), key=lambda item: -item[1])]
        own = f"Waits for the device per step: {values['waits']:g}; {values['own']:g} in a run without adapters."
        parts += [own, *([markdown_table(["where", "waits per step"], places, 1)] if places else [])]
    return parts


def _fast(rows: dict[str, Row]) -> list[str]:
    parts = []
    for kind, reference in _REFERENCES.items():
        lines = []
        for name, row in rows.items():
            if row["stage"] != "fast" or row["settings"]["cell"]["kind"] != kind:
                continue
            for arm, values in row["values"].items():
                found = ratio(rows, name, arm, reference)
                line = [name.partition(": ")[2], _label(arm), f"{1000 * statistics.median(values['seconds']):,.1f}"]
                line += [f"{found.median:.3f}", f"{found.first:.3f}–{found.third:.3f}"]
                if kind == "step":
                    peak, own, launches = (values.get(key) for key in ("peak_bytes", "own_bytes", "launches"))
                    line += [f"{x / _GIB:.3f}" if x is not None else "" for x in (peak, own)]
                    line += [f"{launches:,}" if launches is not None else ""]
                lines.append(line)
        header = ["setting", "arm", "ms", f"/ {_label(reference)}", "quartiles"]
        header += ["peak GiB", "trained and optimizer GiB", "kernels"] if kind == "step" else []
        if lines:
            title = "Training steps" if kind == "step" else "Tokens one at a time"
            parts += [f"### {title}", markdown_table(header, lines, 2)]
    return parts


def _label(arm: str) -> str:
    name, _, groups = arm.partition("-g")
    if arm == "lora-bf16":
        return "PEFT LoRA, bf16 adapters"  # all are on a bf16 base
    return f"{ARMS[name]}, {groups} groups" if groups.isdigit() else ARMS[arm]


def best(rows: list[QualityRow]) -> dict[tuple[str, str, int], list[QualityRow]]:
    """By task, arm and parameters the runs at the rate with the lowest validation loss of the first seed."""
    cells: dict[tuple[str, str, int], list[QualityRow]] = {}
    for row in rows:
        if row["status"] == "ok":
            cells.setdefault((row["task"], row["arm"], int(row["adapter_parameters"])), []).append(row)
    found = {}
    for cell, mine in cells.items():
        first = min(
            (row for row in mine if row["seed"] == "0"), key=lambda row: float(row["val_loss"]), default=mine[0]
        )
        found[cell] = [row for row in mine if row["lr"] == first["lr"]]
    return dict(sorted(found.items()))


def _good(rows: list[QualityRow]) -> list[str]:
    if not rows:
        return []
    lines = []
    for (task, arm, parameters), mine in best(rows).items():
        losses, accuracies = ([float(row[f"test_{key}"]) for row in mine] for key in ("loss", "accuracy"))
        spreads = f"{min(losses):.4f}–{max(losses):.4f}"
        found = [f"{statistics.mean(losses):.4f}", spreads, f"{statistics.mean(accuracies):.3f}"]
        rises = [float(row["general_rise"]) for row in mine if row["general_rise"]]
        peaks = [int(row["peak_bytes"]) for row in mine if row["peak_bytes"]]
        found += [f"{statistics.mean(rises):+.4f}" if rises else "", f"{max(peaks) / 2**30:.2f}" if peaks else ""]
        found += [f"{statistics.mean(float(row['train_seconds']) for row in mine):.0f}", str(len(mine))]
        lines.append([task, arm, f"{parameters:,}", f"{json.loads(mine[0]['lr']):g}", *found, mine[0]["steps"]])
    text = (
        "SmolLM2-135M on the quality benchmark's texts and questions. For each arm the rate with the lowest validation "
        "loss of seed 0, then all seeds at it. Forgotten: the rise of the loss on English news. Seconds are those of "
        f"training, beside other runs on the card. {'; '.join(sorted({row['versions'] for row in rows}))}."
    )
    header = ["task", "arm", "parameters", "rate", "test loss", "lowest to highest", "accuracy"]
    header += ["forgotten", "peak GiB", "seconds", "seeds", "steps"]
    return ["## Good", text, markdown_table(header, lines, 2)]


def _draw(rows: list[Row], quality: list[QualityRow], images: Path) -> list[str]:
    """Pictures of what there is; their names."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> None:
        images.mkdir(parents=True, exist_ok=True)
        figure.tight_layout()
        figure.savefig(images / name, dpi=130, metadata={"Software": None})
        pyplot.close(figure)

    names = []
    steps = [row for row in rows if row["stage"] == "fast" and "error" not in row]
    steps = [row for row in steps if row["settings"]["cell"]["kind"] == "step"]
    if steps:
        figure, axes = pyplot.subplots(figsize=(8, 1 + 0.45 * len(steps)))
        for offset, arm in enumerate(("floor", "genlora")):
            medians = [ratio({"it": row}, "it", arm, "lora").median for row in steps]
            axes.barh([n + 0.4 * offset for n in range(len(steps))], medians, 0.38, label=ARMS[arm])
        axes.axvline(1.0, color="black", linewidth=1, label="PEFT LoRA")
        labels = [f"{row['name'].partition(': ')[2]}, {row['card']}" for row in steps]
        axes.set_yticks([n + 0.2 for n in range(len(steps))], labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("time of a training step / PEFT LoRA's of the same rank")
        axes.legend(fontsize=7)
        save(figure, "gpu-steps.png")
        names.append("gpu-steps.png")
    found = best(quality)
    if tasks := sorted({task for task, _, _ in found}):
        figure, all_axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False)
        for axes, task in zip(all_axes[0], tasks, strict=True):
            for kind, is_mine in (("LoRA", True), ("others", False)):
                points = [
                    (parameters, statistics.mean(float(row["test_loss"]) for row in mine), arm)
                    for (where, arm, parameters), mine in found.items()
                    if where == task and arm.startswith("LoRA") == is_mine
                ]
                points.sort()
                axes.plot([p for p, _, _ in points], [y for _, y, _ in points], "o-" if is_mine else "s", label=kind)
                for p, y, arm in points:
                    axes.annotate(arm, (p, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
            axes.set(xscale="log", title=task, xlabel="trained parameters", ylabel="test loss")
        save(figure, "gpu-quality.png")
        names.append("gpu-quality.png")
    return names
