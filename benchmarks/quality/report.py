"""The report: tables in Markdown and pictures, out of the rows alone; missing runs leave gaps, and are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from . import pictures
from .experiments import EXPERIMENTS
from .results import AVERAGE, GROUPS, Results, load
from .stats import Estimate, average

ROOT = Path(__file__).resolve().parents[2]
REPORT = Path(__file__).parent / "REPORT.md"
IMAGES = ROOT / "docs" / "images"
LOSS, ACCURACY = "test_loss", "test_accuracy"
FORGOTTEN = "general_rise"
FRESH, REPEATED = "fresh_loss", "repeated_loss"
TABLE = ("main", "llm", "vision")  # the experiments of the main table
NEW_TAIL = "the language model's last blocks, new text"
TAIL = "the language model's last blocks"
WHOLE = "all blocks of the language model"
NEW_WHOLE = "all blocks of the language model, new text"
MATCH = 0.05  # two arms are of equal size if their parameters differ by less than this share


def write_report(folder: Path, target: Path = REPORT, images: Path = IMAGES) -> None:
    """Write the report and its pictures."""
    main, rates, traces, scaling, new_tail, new_search, tail, search, whole, new_whole = (
        load(folder, names)
        for names in (
            TABLE,
            (*TABLE, "rates"),
            ("ranks",),
            ("rank-scaling",),
            ("new-tail", "new-tail-gralora"),
            ("new-tail-sizes", "new-tail-search", "new-tail-others"),
            ("tail", "tail-decay"),
            ("tail-search",),
            ("whole",),
            ("new-whole",),
        )
    )
    images.mkdir(parents=True, exist_ok=True)
    parts = [_head(main), _score_tables(main), _difference_tables(main), _bars(main, rates), _rank_table(main)]
    parts.append(_rate_table(main, rates))
    parts += [_score_tables(new_tail, NEW_TAIL), _difference_tables(new_tail, NEW_TAIL)]
    parts += [_trial_table(NEW_TAIL, new_tail, new_search), _rate_table(new_tail, new_tail, NEW_TAIL)]
    parts += [_score_tables(tail, TAIL), _difference_tables(tail, TAIL), _repetition_table(tail, TAIL)]
    parts.append(_trial_table(TAIL, tail, search))
    parts.append(_rate_table(tail, tail, TAIL))
    for title, found in ((WHOLE, whole), (NEW_WHOLE, new_whole)):
        parts += [_score_tables(found, title), _difference_tables(found, title), _trial_table(title, found)]
    drawn = [
        ("quality-pareto.png", "Quality over adapter parameters", pictures.pareto(main, images)),
        ("quality-ranks.png", "Effective rank of ΔW by size", pictures.ranks(main, images)),
        ("quality-rank-trace.png", "Effective rank of ΔW over training", pictures.traces(traces, images)),
        ("quality-rates.png", "Validation loss over the learning rate", pictures.rates(rates, images)),
        ("quality-forgetting.png", "Learned and forgotten: the last blocks", pictures.forgetting(new_tail, images)),
        ("quality-rank-scaling.png", "R at a nearly fixed budget", pictures.scaling(scaling, images)),
    ]
    lines = ["## Pictures", ""]
    for name, title, is_drawn in drawn:
        picture = f"![{title}]({_relative(images, target)}/{name})"
        lines.append(f"{title}:\n\n{picture}\n" if is_drawn else f"{title}: no rows yet.\n")
    parts.append("\n".join(lines))
    target.write_text("\n\n".join(part.rstrip() for part in parts if part) + "\n", encoding="utf-8")
    print(f"wrote {target} and {sum(is_drawn for *_, is_drawn in drawn)} pictures in {images}")


def _relative(images: Path, target: Path) -> str:
    try:
        return "../../" + images.relative_to(ROOT).as_posix() if target == REPORT else images.as_posix()
    except ValueError:
        return images.as_posix()


def _head(results: Results) -> str:
    missing = [arm.name for arm in EXPERIMENTS["main"].arms if arm.name not in results.arms()]
    lines = [
        "# Quality: results",
        "",
        "Made by `python -m benchmarks.quality report` from the rows in `results/`; not edited by hand. Means over "
        "seeds with 95 % intervals (t); differences are paired by seed. All methods: same steps, batches and number of "
        "rates, between which validation loss decided, at as many seeds as the table of learning rates says; the test "
        "data were seen by the final runs only.",
        "",
        f"Rows: {results.runs} runs, {results.diverged} of them diverged, {results.seconds / 3600:.1f} hours of one "
        f"thread. Versions: {'; '.join(results.versions) or 'none'}.",
    ]
    if missing:
        lines += ["", f"Without final runs so far, and left out below: {', '.join(missing)}."]
    return "\n".join(lines)


def _cell(samples: list[list[float]], digits: int, scale: float = 1.0) -> str:
    if not samples:
        return "–"
    values = [value for sample in samples for value in sample]
    failed = sum(not math.isfinite(value) for value in values)
    if failed:
        return f"{failed} of {len(values)} diverged"
    return average([[scale * value for value in sample] for sample in samples]).text(digits)


def _score_tables(results: Results, of: str = "") -> str:
    if not results.arms():
        return ""
    parts = []
    tasks = [*results.tasks(), AVERAGE]
    for column, title, digits, scale in (
        (LOSS, "Test loss (lower is better)", 4, 1.0),
        (ACCURACY, "Test accuracy in percent", 1, 100.0),
        (FORGOTTEN, "Rise of the loss on English news (lower is better)", 4, 1.0),
    ):
        if column == FORGOTTEN and not of:
            continue  # most rows of the main table have none
        rows = [
            [arm, _size(results, arm), *(_cell(results.samples(arm, task, column), digits, scale) for task in tasks)]
            for arm in results.arms()
        ]
        parts.append(f"## {_titled(title, of)}\n\n" + _table(["method", "adapter parameters", *tasks], rows))
    return "\n\n".join(parts)


def _titled(title: str, of: str) -> str:
    return f"{title}: {of}" if of else title


def _size(results: Results, arm: str) -> str:
    sizes = sorted(set(results.parameters[arm].values()))
    return " / ".join(f"{size:,}" for size in sizes)


def reference(results: Results, arm: str) -> str | None:
    """LoRA of the arm's size; where none is, the smallest that is larger; ``None`` beyond the largest."""
    larger = [
        (results.budgets[name], name)
        for name in results.arms()
        if results.methods[name] == "lora" and results.budgets[name] >= results.budgets[arm] * (1 - MATCH)
    ]
    return min(larger)[1] if larger else None


def _genlora(results: Results, arm: str) -> str | None:
    """GenLoRA of the size of another method."""
    size = results.budgets[arm]
    found = (name for name in results.arms() if results.methods[name] == "genlora" and name != arm)
    same = (name for name in found if abs(results.budgets[name] / size - 1) <= MATCH)
    return None if results.methods[arm] in ("genlora", "lora") else next(same, None)


def difference(results: Results, arm: str, other: str | None, task: str, column: str = LOSS) -> Estimate | None:
    """The arm's score minus the other's, paired by seed; ``None`` without a pair, or where a run diverged."""
    if other is None or arm == other:
        return None
    found = [*results.differences(arm, other, task, column).values()]
    is_finite = all(math.isfinite(value) for values in found for value in values)
    return average(found) if found and is_finite else None


def _over(results: Results, arm: str, other: str) -> str:
    """The tasks that two arms have in common, where these are not all."""
    found = list(results.differences(arm, other, AVERAGE, LOSS))
    return "" if found == results.tasks() else f" (over {', '.join(found)})"


def _difference_tables(results: Results, of: str = "") -> str:
    if not results.arms():
        return ""
    parts = []
    tasks = [*results.tasks(), AVERAGE]
    choices: list[tuple[str, Callable[[str], str | None]]] = [
        ("LoRA of its size (where there is none, the next larger)", lambda arm: reference(results, arm)),
        ("LoRA r8", lambda arm: "LoRA r8" if "LoRA r8" in results.arms() else None),
    ]
    if of:  # the aims say it of the main table
        choices.append(("GenLoRA of its size", lambda arm: _genlora(results, arm)))
    for title, choose in choices:
        rows = []
        for arm in results.arms():
            other = choose(arm)
            found = [difference(results, arm, other, task) for task in tasks]
            if other is None or not any(found):
                continue
            accuracy = difference(results, arm, other, AVERAGE, ACCURACY)
            share = results.budgets[arm] / results.budgets[other]
            last = Estimate(100 * accuracy.mean, 100 * accuracy.half).text(1, signed=True) if accuracy else "–"
            texts = [f.text(4, signed=True) if f else "–" for f in found]
            texts[-1] += _over(results, arm, other)
            rows.append([arm, other, f"{share:.2f}", *texts, last])
        if rows:
            header = ["method", "compared with", "share of its size", *tasks, "accuracy, average (points)"]
            parts.append(
                f"## {_titled(f'Difference in test loss to {title}', of)}\n\nNegative is better.\n\n"
                + _table(header, rows)
            )
    return "\n\n".join(parts)


def _repetition_table(results: Results, of: str, other: str = "LoRA r2") -> str:
    """Test loss of text that training repeats and of other text, beside LoRA's, of the runs that have both."""
    rows = []
    for arm in results.arms():
        for task in results.tasks():
            if not (fresh := results.samples(arm, task, FRESH)):
                continue
            repeated = results.samples(arm, task, REPEATED)
            found = [difference(results, arm, other, task, column) for column in (FRESH, REPEATED)]
            texts = [one.text(4, signed=True) if one else "–" for one in found]
            rows.append([arm, task, str(len(fresh[0])), _cell(fresh, 4), _cell(repeated, 4), *texts])
    if not rows:
        return ""
    header = ["method", "task", "runs", "new", "repeated", f"new, to {other}", f"repeated, to {other}"]
    words = (
        "Repeated is a window of which more than a tenth of all sequences of 12 tokens stand in the training data, "
        "too. Validation data, which chose the rates, have such windows as well."
    )
    title = _titled("Test loss of new and of repeated text", of)
    return f"## {title}\n\n{words}\n\n" + _table(header, rows)


def _bars(main: Results, rates: Results) -> str:
    """Which of the aims are met, per GenLoRA arm where it matters."""
    genloras = [arm for arm in main.arms() if main.methods[arm] in ("genlora", "variant")]
    if not genloras:
        return ""
    rows = []
    tasks = main.tasks()
    for arm in genloras:
        other = reference(main, arm)
        if other:
            rows += _bar_1(main, arm, other)
        if other and abs(main.budgets[arm] / main.budgets[other] - 1) <= MATCH:
            ours, theirs = (_mean_rank(main, name) for name in (arm, other))
            if ours and theirs:
                rows.append(
                    [
                        f"3. effective rank of {arm} at least 4 × that of {other}",
                        _verdict(ours >= 4 * theirs),
                        f"{ours:.1f} against {theirs:.1f}",
                    ]
                )
            rows += _bar_4(main, arm)
            ours_width, their_width = _width(rates, arm), _width(rates, other)
            if ours_width is not None and their_width is not None:
                rows.append(
                    [
                        f"5. learning-rate range of {arm} at least as wide as that of {other}",
                        _verdict(ours_width >= their_width),
                        f"{ours_width:.1f} against {their_width:.1f} factors of two",
                    ]
                )
        if "LoRA r8" in main.arms() and main.budgets[arm] <= main.budgets["LoRA r8"] / 4 * 1.001:
            each = {task: difference(main, arm, "LoRA r8", task) for task in tasks}
            worse = [task for task, d in each.items() if d and d.low > 0]
            rows.append(
                [
                    f"2. {arm} within the interval of LoRA r8 or better on every task",
                    _verdict(not worse),
                    "; ".join(f"{task} {d.text(4, signed=True)}" for task, d in each.items() if d),
                ]
            )
    rows.sort(key=lambda row: row[0][0])
    return "## The aims\n\nDecided on test loss, the finer figure.\n\n" + _table(["aim", "met", "figures"], rows)


def _bar_1(results: Results, arm: str, other: str) -> list[list[str]]:
    """Against LoRA of the arm's size or the next larger, on all tasks and on those of one kind of model."""
    found = difference(results, arm, other, AVERAGE)
    if found is None:
        return []
    each = {task: difference(results, arm, other, task) for task in results.tasks()}
    worse = [task for task, d in each.items() if d and d.low > 0]
    figures = [f"average{_over(results, arm, other)} {found.text(4, signed=True)}"]
    for group in GROUPS:
        pairs = results.differences(arm, other, group, LOSS)
        if 1 < len(pairs) < len(results.differences(arm, other, AVERAGE, LOSS)):
            figures.append(f"{group} {average([*pairs.values()]).text(4, signed=True)}")
    share = results.budgets[arm] / results.budgets[other]
    smaller = "" if abs(share - 1) <= MATCH else f" ({share:.2f} of its size)"
    return [
        [
            f"1. {arm}{smaller} better than {other} on average, worse on no task",
            _verdict(found.high < 0 and not worse),
            "; ".join([*figures, f"worse on: {', '.join(worse) or 'none'}"]),
        ]
    ]


def _bar_4(results: Results, arm: str) -> list[list[str]]:
    """Against each other method of the arm's size or smaller."""
    lines = []
    for other in results.arms():
        same = abs(results.budgets[other] / results.budgets[arm] - 1) <= MATCH
        if results.methods[other] in ("lora", "genlora", "grouped", "variant", "frozen", "full") or not same:
            continue
        if found := difference(results, arm, other, AVERAGE):
            lines.append(
                [
                    f"4. {arm} better than, or tied with, {other} on average",
                    _verdict(found.low <= 0),
                    f"average{_over(results, arm, other)} {found.text(4, signed=True)}",
                ]
            )
    return lines


def _verdict(is_met: bool) -> str:
    return "yes" if is_met else "**no**"


def _mean_rank(results: Results, arm: str, column: str = "entropy_rank", task: str | None = None) -> float | None:
    values = [
        value
        for name, cell in results.cells[arm].items()
        if task in (None, name)
        for value in cell.scores(column).values()
        if math.isfinite(value)
    ]
    return sum(values) / len(values) if values else None


def _width(results: Results, arm: str) -> float | None:
    widths = [cell.range_width() for cell in results.cells.get(arm, {}).values()]
    found = [width[0] for width in widths if width]
    return sum(found) / len(found) if found else None


def _rank_table(results: Results) -> str:
    rows = []
    for arm in results.arms():
        entropy, stable = _mean_rank(results, arm), _mean_rank(results, arm, "stable_rank")
        if entropy and stable:
            rows.append([arm, _size(results, arm), f"{entropy:.1f}", f"{stable:.2f}"])
    if not rows:
        return ""
    header = ["method", "adapter parameters", "entropy effective rank of ΔW", "stable rank"]
    return "## Effective rank at the end of training\n\nMeans over linears, seeds and tasks.\n\n" + _table(header, rows)


def _trial_table(of: str, *results: Results) -> str:
    """Validation losses of all that was tried, at each rate."""
    tasks = sorted({task for found in results for cells in found.cells.values() for task in cells})
    rows = [
        [arm, f"{found.budgets[arm]:.2f}", *(_trials(found, arm, task) for task in tasks)]
        for found in results
        for arm, cells in found.cells.items()
        if any(cell.trials for cell in cells.values())
    ]
    if not rows:
        return ""
    title = _titled("Validation loss by learning rate", of)
    return f"## {title}\n\nThe tuning seed alone.\n\n" + _table(["method", "size, of LoRA rank 1's", *tasks], rows)


def _trials(results: Results, arm: str, task: str) -> str:
    cell = results.cells[arm].get(task)
    return ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(cell.means().items())) if cell else "–"


def _rate_table(main: Results, rates: Results, of: str = "") -> str:
    rows, edges = [], []
    for arm, tasks in main.cells.items():
        for task, cell in tasks.items():
            if cell.best_rate is None:
                continue
            wide = rates.cells[arm][task].range_width()
            if cell.is_at_edge:
                edges.append(f"{arm} on {task} ({cell.is_at_edge})")
            text = f"{'≥ ' if wide[1] else ''}{wide[0]:.1f}" if wide else "–"
            tried = sorted(cell.means())
            trials = f"{len(tried)} × {max(map(len, cell.trials.values()))}"
            rows.append([arm, task, f"{tried[0]:g} to {tried[-1]:g}", trials, f"{cell.best_rate:g}", text])
    if not rows:
        return ""
    header = [
        "method",
        "task",
        "rates tried",
        "rates × seeds",
        "best",
        "range within 1 % of the best loss, factors of two",
    ]
    text = f"## {_titled('Learning rates', of)}\n\n" + _table(header, rows)
    if edges:
        text += "\n\nBest at the end of the rates tried: " + ", ".join(edges) + "."
    return text


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
