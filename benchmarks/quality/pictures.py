"""The pictures of the report. Each function returns whether there were rows to draw."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from .results import AVERAGE, Results
from .stats import average

# LoRA dark, ours in one strong colour, what is neither in greyed hues; each is told apart by its marker too.
STYLES = {
    "lora": {"color": "#1f2937", "marker": "o"},
    "genlora": {"color": "#d9480f", "marker": "D"},
    "variant": {"color": "#d9480f", "marker": "D"},
}
REFERENCES = {"full": "--", "frozen": ":"}  # drawn as lines: no adapter, so no place on the axis of its size
STARS: tuple[Any, ...] = ((4, 1, 0), (5, 2, 0), (6, 1, 0), (4, 2, 0))  # corners, style, turned by
OTHER_MARKERS = ("^", "v", "s", "P", "X", "<", ">", "p", "*", "h", "d", "8", *STARS)
OTHER_COLORS = ("#2f6f9f", "#5b8c5a", "#8b6fb0", "#b0803a", "#4d9a9a")
SHADES = ("#f2a65a", "#e8772e", "#c94a0c", "#7f2704", "#4a1602")  # of the accent, by size
DARK_SHADES = ("#b8bcc4", "#8a8f98", "#4b5563", "#1f2937", "#000000")
MOST_COLUMNS = 3
MANY_ARMS = 8  # a panel with more of them has a line of its own
FEWEST_ARMS = 5


def pareto(results: Results, folder: Path) -> bool:
    """Test loss over adapter parameters, one panel per task and the average."""
    return _over_size(results, folder / "quality-pareto.png", "test_loss", "test loss (mean, 95 % interval)")


def ranks(results: Results, folder: Path) -> bool:
    """Entropy effective rank of ΔW over adapter parameters, one panel per task."""
    return _over_size(
        results, folder / "quality-ranks.png", "entropy_rank", "effective rank of ΔW (entropy)", is_log=True
    )


def _over_size(results: Results, path: Path, column: str, label: str, *, is_log: bool = False) -> bool:
    results = _covered(results)
    tasks = results.tasks()
    if not tasks:
        return False
    panels = [*tasks, AVERAGE] if len(tasks) > 1 else tasks
    plt = _pyplot()
    wide = [task for task in panels if len(panels) > 1 and len(results.arms(task)) > MANY_ARMS and task != AVERAGE]
    narrow = [task for task in panels if task not in wide]
    columns = max(1, min(MOST_COLUMNS, len(narrow)))
    layout = [[task] * columns for task in wide]
    layout += [(narrow[at : at + columns] + ["."] * columns)[:columns] for at in range(0, len(narrow), columns)]
    figure, axes = plt.subplot_mosaic(layout, figsize=(3.0 * columns + 1.8, 3.4 * len(layout)))
    for task, axis in axes.items():
        _draw_points(axis, results, task, column)
        axis.set_title(task, fontsize=10)
        axis.set_xscale("log")
        _size_ticks(axis, results, task)
        axis.margins(x=0.12, y=0.12)
        axis.set_xlabel("adapter parameters", fontsize=9)
        if is_log:
            axis.set_yscale("log")
        if task in [line[0] for line in layout]:
            axis.set_ylabel(label, fontsize=9)
    entries = {
        name: handle for axis in axes.values() for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries, loc="center right", fontsize=8, frameon=False)
    return _save(figure, path, legend=1.45)


def _covered(results: Results) -> Results:
    """Without the tasks on which so few methods ran that there is nothing to see, unless there are no others."""
    counts = {task: len(results.arms(task)) for task in results.tasks()}
    kept = [task for task, number in counts.items() if number >= FEWEST_ARMS] or [*counts]
    cells = {arm: {task: cell for task, cell in found.items() if task in kept} for arm, found in results.cells.items()}
    sizes = {arm: {task: n for task, n in found.items() if task in kept} for arm, found in results.parameters.items()}
    return replace(results, cells=cells, parameters=sizes)


def _size_ticks(axis: Any, results: Results, task: str) -> None:
    """Ticks at LoRA's sizes where it ran, since all is compared with it."""
    arms = [arm for arm in results.arms() if results.methods[arm] == "lora" and results.samples(arm, task, "test_loss")]
    sizes = sorted({_size(results, arm, task) for arm in arms})
    if sizes:
        axis.set_xticks(sizes, [f"{size / 1000:.0f}k" for size in sizes], fontsize=8)
        axis.minorticks_off()


def _size(results: Results, arm: str, task: str) -> float:
    """The arm's parameters on a task; their mean over the tasks for an average of them."""
    sizes = results.parameters[arm]
    return sizes.get(task, sum(sizes.values()) / len(sizes))


def _draw_points(axis: Any, results: Results, task: str, column: str) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    references: list[tuple[float, dict[str, str]]] = []
    others = [arm for arm in results.arms() if results.methods[arm] not in (*STYLES, *REFERENCES)]
    for arm in results.arms():
        samples = results.samples(arm, task, column)
        if not samples or not all(math.isfinite(value) for sample in samples for value in sample):
            continue
        found = average(samples)
        half = found.half if math.isfinite(found.half) else 0.0
        kind = results.methods[arm]
        if kind in REFERENCES:
            references.append((found.mean, {"linestyle": REFERENCES[kind], "label": arm}))
            continue
        size = _size(results, arm, task)
        if kind in STYLES:
            label = "GenLoRA" if kind == "genlora" else arm if kind == "variant" else "LoRA"
            style = STYLES[kind]
            curves.setdefault(kind, []).append((size, found.mean))
            tag = arm.removeprefix(f"{label} ")
            side = (0, 9, "center") if kind != "lora" else (5, -10, "left")
            axis.annotate(
                tag,
                (size, found.mean),
                xytext=side[:2],
                textcoords="offset points",
                ha=side[2],
                fontsize=8,
                color=style["color"],
            )
        else:
            label, index = arm, others.index(arm)
            style = {
                "color": OTHER_COLORS[index % len(OTHER_COLORS)],
                "marker": OTHER_MARKERS[index % len(OTHER_MARKERS)],
            }
            size *= 1.045 ** (index - (len(others) - 1) / 2)  # side by side where sizes are equal
        axis.errorbar(
            size,
            found.mean,
            half,
            capsize=2,
            markersize=5,
            linewidth=1,
            linestyle="",
            label=label,
            zorder=4 if kind in STYLES else 3,
            **style,
        )
    for kind, points in curves.items():
        if kind != "variant":
            axis.plot(*zip(*sorted(points), strict=True), color=STYLES[kind]["color"], linewidth=1.2, alpha=0.6)
    low, high = axis.get_ylim()
    for mean, style in references:
        # One that is far off would leave no room to tell the others apart.
        if mean > 0 and low - (high - low) / 2 < mean < high + (high - low) / 2:
            axis.axhline(mean, color="#666666", linewidth=1, **style)


def traces(results: Results, folder: Path) -> bool:
    """Effective rank of ΔW over the steps of training."""
    curves = [
        (arm, json.loads(row["rank_trace"]))
        for arm, tasks in results.cells.items()
        for cell in tasks.values()
        for row in cell.finals.values()
        if row["rank_trace"]
    ]
    if not curves:
        return False
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.8, 3.9))
    styles = _line_styles(results, [arm for arm, _ in curves])
    for arm, points in sorted(curves, key=lambda curve: -curve[1][-1][1]):  # in the legend from top to bottom
        axis.plot([p[0] for p in points], [p[1] for p in points], label=arm, **styles[arm])
    axis.set_yscale("log")
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_xlabel("step")
    axis.set_ylabel("effective rank of ΔW (entropy)")
    return _save(figure, folder / "quality-rank-trace.png")


def rates(results: Results, folder: Path) -> bool:
    """Validation loss over the learning rate for LoRA and ours."""
    chosen = [arm for arm in results.cells if results.methods[arm] in ("lora", "genlora", "variant")]
    tasks = list(dict.fromkeys(task for arm in chosen for task, cell in results.cells[arm].items() if cell.trials))
    if not tasks:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks) + 0.4, 3.7), squeeze=False)
    styles = _line_styles(results, chosen)
    for axis, task in zip(axes[0], tasks, strict=True):
        for arm in chosen:
            if (cell := results.cells[arm].get(task)) and cell.trials:
                points = sorted(cell.means().items())
                points = [(rate, loss) for rate, loss in points if math.isfinite(loss)]
                axis.plot(*zip(*points, strict=True), label=arm, **styles[arm])
        axis.set_xscale("log", base=2)
        tried = sorted(
            {rate for arm in chosen if task in results.cells[arm] for rate in results.cells[arm][task].means()}
        )
        axis.set_xticks(tried[::2], [f"{rate:g}" for rate in tried[::2]], fontsize=8)
        axis.minorticks_off()
        axis.set_title(task)
        axis.set_xlabel("learning rate")
    axes[0][0].set_ylabel("validation loss")
    axes[0][0].legend(fontsize=7, frameon=False)
    return _save(figure, folder / "quality-rates.png")


def scaling(results: Results, folder: Path) -> bool:
    """Test loss and effective rank as R grows at a nearly fixed budget."""
    points = []
    for arm in results.arms():
        for task in results.cells[arm]:
            losses = results.samples(arm, task, "test_loss")
            spectrum = results.samples(arm, task, "entropy_rank")
            if losses and all(math.isfinite(value) for sample in losses + spectrum for value in sample):
                rank = int(str(results.settings[f"{arm}/{task}"].get("rank", 0)))
                points.append((rank, average(losses), average(spectrum)))
    if not points:
        return False
    points.sort(key=lambda point: point[0])
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4))
    for axis, index, title in ((axes[0], 1, "test loss"), (axes[1], 2, "effective rank of ΔW (entropy)")):
        halves = [point[index].half if math.isfinite(point[index].half) else 0.0 for point in points]
        means = [point[index].mean for point in points]
        axis.errorbar([point[0] for point in points], means, halves, capsize=2, **STYLES["genlora"])
        axis.set_xscale("log", base=2)
        axis.set_xticks([point[0] for point in points], [str(point[0]) for point in points])
        axis.set_xlabel("R")
        axis.set_ylabel(title)
    return _save(figure, folder / "quality-rank-scaling.png")


def forgetting(results: Results, folder: Path) -> bool:
    """What was learned against what was forgotten: a marker for each method, a line through shares of its update."""
    tasks = [task for task in results.tasks() if any(results.samples(a, task, "general_rise") for a in results.arms())]
    if not tasks:
        return False
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks) + 1.7, 3.6), squeeze=False)
    styles = _line_styles(results, results.arms())
    for axis, task in zip(axes[0], tasks, strict=True):
        for arm in results.arms():
            points = _learned_and_forgotten(results, arm, task)
            if not all(math.isfinite(value) for point in points for value in point):
                continue
            style = styles[arm] | {"linestyle": "-", "markersize": 3}
            if len(points) > 1:
                axis.plot(*zip(*points, strict=True), **style, alpha=0.7)
            if points:
                axis.plot(*points[-1], **style | {"linestyle": "", "markersize": 6}, label=arm, zorder=4)
        axis.axhline(0.0, color="#666666", linestyle=":", linewidth=1)
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("test loss", fontsize=9)
    axes[0][0].set_ylabel("rise of the loss on English news", fontsize=9)
    entries = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="center right", fontsize=8, frameon=False)
    return _save(figure, folder / "quality-forgetting.png", legend=1.45)


def _learned_and_forgotten(results: Results, arm: str, task: str) -> list[tuple[float, float]]:
    """Means over seeds of test loss and rise, for each share of the update that was tried and last for the whole."""
    cell = results.cells[arm].get(task)
    rows = [row for row in cell.finals.values() if row["general_rise"]] if cell else []
    by_share: dict[float, list[tuple[float, float]]] = {}
    for row in [row for row in rows if row["shares"]] or rows:  # a line through the same seeds
        for share, loss, rise in json.loads(row["shares"] or "[]"):
            by_share.setdefault(share, []).append((loss, rise))
        by_share.setdefault(1.0, []).append((float(row["test_loss"]), float(row["general_rise"])))
    return [
        (sum(loss for loss, _ in found) / len(found), sum(rise for _, rise in found) / len(found))
        for _, found in sorted(by_share.items())
    ]


def _line_styles(results: Results, arms: list[str]) -> dict[str, dict[str, Any]]:
    """Colours by method, shaded by size; markers as in the other pictures."""
    styles: dict[str, dict[str, Any]] = {}
    for kinds, shades in ((("genlora", "variant"), SHADES), (("lora",), DARK_SHADES)):
        members = sorted({arm for arm in arms if results.methods[arm] in kinds}, key=results.budgets.__getitem__)
        for i, arm in enumerate(members):
            shade = shades[round(i * (len(shades) - 1) / max(1, len(members) - 1))]
            styles[arm] = {"color": shade, "marker": STYLES[kinds[0]]["marker"], "linewidth": 1.4, "markersize": 3.5}
    for arm in arms:
        index = len(styles)
        color, marker = OTHER_COLORS[index % len(OTHER_COLORS)], OTHER_MARKERS[index % len(OTHER_MARKERS)]
        styles.setdefault(
            arm, {"color": color, "marker": marker, "linewidth": 1.2, "linestyle": "--", "markersize": 3.5}
        )
    return styles


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    return plt


def _save(figure: Any, path: Path, legend: float = 0.0) -> bool:
    """Save, with so many inches on the right left for a legend."""
    figure.tight_layout(rect=(0, 0, 1 - legend / figure.get_figwidth(), 1))
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return True
