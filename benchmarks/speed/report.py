"""The report: each bar beside its figure, and tables of all cells."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .plan import EXPERIMENTS, FULL, PRECISIONS, QUICK, Cell, Grid, rank_if_sized, title_of
from .results import Results, Spread

Row = list[str]
_MIB = 2**20


@dataclass(frozen=True)
class Bar:
    """A figure, and what it must not be above.

    Args:
        what: In words.
        most: The bar; ``None`` for a figure that is only reported.
        figure: Makes it; a spread stands for its median.
    """

    what: str
    most: float | None
    figure: Callable[[Results], float | Spread]

    def row(self, results: Results) -> Row:
        """Words, bar, figure, quartiles and status."""
        bar = "" if self.most is None else f"≤ {self.most:.2f}"
        try:
            found = self.figure(results)
        except KeyError:
            return [self.what, bar, "", "", "not measured"]
        value = found.median if isinstance(found, Spread) else found
        quartiles = _quartiles(found) if isinstance(found, Spread) else ""
        status = "reported" if self.most is None else "met" if value <= self.most else "not met"
        return [self.what, bar, f"{value:.3f}", quartiles, status]


BARS_HEADER = ["language model", "bar", "figure", "quartiles", "status"]


def bars(grid: Grid) -> list[Bar]:
    """All bars, for the language model of a grid."""
    found = [
        _ratio_bar(f"step / PEFT LoRA rank {size.rank}, {title_of(name)}, fp32", 1.1, size, "lora", arm=name)
        for size in (grid.size_cell(grid.language, number) for number in range(len(grid.sizes)))
        for name in size.arms
        if rank_if_sized(name)
    ]
    for precision in PRECISIONS:
        found += _step_bars(grid, precision)
        found += _growth_bars(grid, precision)
        for rank in grid.main_ranks:
            found += _memory_bars(grid, precision, rank)
            found += _inference_bars(grid, precision, rank)
    return [*found, *_count_bars(grid)]


def _step_bars(grid: Grid, precision: str) -> list[Bar]:
    low, high = grid.main_ranks
    at_low, at_high = grid.cell("step", precision, low), grid.cell("step", precision, high)
    setting = f"{precision}, rank {low}"
    found = [
        _ratio_bar(f"step / PEFT LoRA, {precision}, rank {rank}", 1.0, grid.cell("step", precision, rank), "lora")
        for rank in dict.fromkeys((low, high, grid.ranks[-1]))
    ]
    found += [
        _ratio_bar(
            f"LoRA by us / PEFT LoRA, step, {precision}, rank {rank}",
            0.95,
            grid.cell("step", precision, rank),
            "lora",
            arm="our-lora",
        )
        for rank in grid.main_ranks
    ]
    found.append(_ratio_bar(f"step / floor, {setting}", None, at_low, "floor"))
    if "lora-bf16" in at_low.arms:
        what = f"step / PEFT LoRA of bf16, both on a bf16 base, {setting}"
        found.append(_ratio_bar(what, None, at_low, "lora-bf16", arm="genlora-bf16"))
    share = f"generator's share of a step, {precision}, rank {high}"
    found.append(_ratio_bar(share, 0.05, at_high, "genlora", arm="generator"))
    return found


def _ratio_bar(what: str, most: float | None, cell: Cell, reference: str, arm: str = "genlora") -> Bar:
    return Bar(what, most, lambda results: results.ratio(cell, arm, reference))


def _growth_bars(grid: Grid, precision: str) -> list[Bar]:
    low, top, first, last = grid.main_ranks[0], grid.ranks[-1], grid.tokens[0], grid.tokens[-1]
    by_rank = [grid.cell("step", precision, rank) for rank in (low, top)]
    by_tokens = [grid.cell("step", precision, low, batch=1, tokens=tokens) for tokens in (first, last)]
    return [
        Bar(f"step's growth / PEFT LoRA's, {precision}, rank {low} to {top}", 1.0, lambda r: _growth(r, *by_rank)),
        Bar(f"step's growth / PEFT LoRA's, {precision}, 1x{first} to 1x{last}", 1.0, lambda r: _growth(r, *by_tokens)),
    ]


def _growth(results: Results, small: Cell, large: Cell) -> float:
    # Each cell's ratio is of interleaved steps, so that a machine that is slower in one of them does not count.
    return results.ratio(large, "genlora", "lora").median / results.ratio(small, "genlora", "lora").median


def _memory_bars(grid: Grid, precision: str, rank: int) -> list[Bar]:
    counts, memory = grid.cell("counts", precision, rank), grid.cell("memory", precision, rank)
    setting = f"{precision}, rank {rank}"
    most = 1.0 if precision == "fp32" else 0.75
    ways = (("saved_bytes", "parameters apart"), ("saved_and_trained_bytes", "frozen ones apart"))
    saved = [
        Bar(
            f"bytes saved for the backward / PEFT LoRA, {setting}, {way}",
            most,
            lambda results, field=field: _counted(results, counts, field),
        )
        for field, way in ways
    ]
    return [
        *saved,
        Bar(f"peak memory / PEFT LoRA, {setting}", 1.0, lambda results: _memory(results, memory, "peak_bytes")),
        Bar(
            f"peak memory above the loaded model / PEFT LoRA, {setting}",
            1.0,
            lambda results: _memory(results, memory, "growth_bytes"),
        ),
    ]


def _counted(results: Results, cell: Cell, *fields: str, arm: str = "genlora") -> float:
    arms = results.arms(cell)
    return sum(arms[arm][field] for field in fields) / sum(arms["lora"][field] for field in fields)


def _memory(results: Results, cell: Cell, field: str, arm: str = "genlora") -> float:
    arms = results.arms(cell)
    return statistics.median(arms[arm][field]) / statistics.median(arms["lora"][field])


def _inference_bars(grid: Grid, precision: str, rank: int) -> list[Bar]:
    cell = grid.cell("forward", precision, rank)
    ways = (("unmerged", "genlora", 1.1), ("merged", "genlora-merged", 1.01))
    return [
        _ratio_bar(f"forward / frozen base, {way}, {precision}, rank {rank}", most, cell, "base", arm=arm)
        for way, arm, most in ways
    ]


def _count_bars(grid: Grid) -> list[Bar]:
    low, high = grid.main_ranks
    at_low, at_high = grid.cell("counts", "fp32", low), grid.cell("counts", "fp32", high)

    def depth(results: Results) -> float:
        generator = results.arms(at_high)["genlora"]["generator"]
        return float(generator["forward"] / generator["forward_at_half_depth"])

    def per_linear(results: Results) -> float:
        return float(results.arms(at_low)["genlora"]["operators"]["per_linear"])

    return [
        Bar(f"operators forward in an adapted linear, fp32, rank {low}", 3.0, per_linear),
        Bar(f"generator's operators, all blocks / half of them, rank {high}", 1.0, depth),
        Bar(
            f"bytes of optimizer and gradients / PEFT LoRA, rank {high}",
            0.1,
            lambda results: _counted(results, at_high, "optimizer_bytes", "gradient_bytes"),
        ),
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


def table(cells: Sequence[Cell], results: Results) -> tuple[Row, list[Row]]:
    """Header and rows of cells of one kind; those that were not measured are left out."""
    header, row_of = _TABLES[cells[0].kind]
    rows = []
    for cell in cells:
        arms = results.arms(cell) if cell.key in results.cells else {}
        for number, name in enumerate(arms):
            rows.append(["" if number else cell.label, title_of(name), *row_of(results, cell, name, arms[name])])
    return ["setting", "arm", *header], rows


def _step_row(results: Results, cell: Cell, name: str, arm: dict[str, Any]) -> Row:
    to_lora = results.ratio(cell, name, "lora")
    to_floor = results.ratio(cell, name, "floor").median
    share = f"{results.ratio(cell, name, 'genlora').median:.1%} of a step" if name == "generator" else ""
    ratios = [share, "", ""] if share else [f"{to_lora.median:.3f}", _quartiles(to_lora), f"{to_floor:.3f}"]
    return [_milliseconds(arm), *ratios]


def _inference_row(results: Results, cell: Cell, name: str, arm: dict[str, Any]) -> Row:
    to_base = results.ratio(cell, name, "base")
    tokens = cell.batch * (cell.new_tokens or cell.tokens)
    speed = tokens / statistics.median(arm["seconds"])
    return [_milliseconds(arm), f"{to_base.median:.3f}", _quartiles(to_base), f"{speed:,.0f}"]


def _memory_row(results: Results, cell: Cell, name: str, arm: dict[str, Any]) -> Row:
    return [
        text
        for field in ("peak_bytes", "growth_bytes")
        for text in (_mebibytes(statistics.median(arm[field])), f"{_memory(results, cell, field, name):.3f}")
    ]


def _count_row(results: Results, cell: Cell, name: str, arm: dict[str, Any]) -> Row:
    operators, generator = arm["operators"], arm.get("generator", {})
    return [
        *(f"{operators[part]:,}" for part in ("forward", "backward", "optimizer")),
        f"{operators['per_linear']:.2f}",
        *(f"{generator[part]:,}" if generator else "" for part in ("forward", "backward", "forward_at_half_depth")),
        _mebibytes(arm["saved_bytes"]),
        f"{_counted(results, cell, 'saved_bytes', arm=name):.3f}",
        f"{arm['gradient_elements']:,}",
        f"{arm['optimizer_bytes']:,}",
    ]


_INFERENCE_HEADER = ["ms", "/ frozen base", "quartiles", "tokens / s"]
_TABLES: dict[str, tuple[Row, Callable[[Results, Cell, str, dict[str, Any]], Row]]] = {
    "step": (["ms", "/ PEFT LoRA", "quartiles", "/ floor"], _step_row),
    "forward": (_INFERENCE_HEADER, _inference_row),
    "generate": (_INFERENCE_HEADER, _inference_row),
    "memory": (["peak MiB", "/ PEFT LoRA", "above the model MiB", "/ PEFT LoRA"], _memory_row),
    "counts": (
        [
            "operators forward",
            "backward",
            "optimizer",
            "in a linear",
            "generator's forward",
            "its backward",
            "its forward, half of the blocks",
            "saved MiB",
            "/ PEFT LoRA",
            "gradient elements",
            "optimizer bytes",
        ],
        _count_row,
    ),
}


def _quartiles(found: Spread) -> str:
    return f"{found.first:.3f}–{found.third:.3f}"


def _milliseconds(arm: dict[str, Any]) -> str:
    return f"{1000 * statistics.median(arm['seconds']):,.1f}"


def _mebibytes(value: float) -> str:
    return f"{value / _MIB:,.1f}"


# --- the whole --------------------------------------------------------------------------------------------------------


def grid_of(results: Results) -> Grid:
    """The grid whose models were measured."""
    found = {entry["settings"]["model"] for entry in results.cells.values()}
    return QUICK if found and found <= {QUICK.language, QUICK.encoder} else FULL


def markdown(results: Results) -> str:
    """The report of all results."""
    grid = grid_of(results)
    parts = ["# Speed", *_conditions(results), "## Bars", markdown_table(BARS_HEADER, bar_rows(results), left=1)]
    for experiment in EXPERIMENTS:
        by_kind: dict[str, list[Cell]] = {}
        for cell in grid.cells(experiment):
            by_kind.setdefault(cell.kind, []).append(cell)
        for kind, cells in by_kind.items():
            header, rows = table(cells, results)
            if rows:
                parts += [f"## {experiment.capitalize()}: {kind}", markdown_table(header, rows, left=2)]
    return "\n\n".join(parts) + "\n"


def bar_rows(results: Results) -> list[Row]:
    """Rows for :data:`BARS_HEADER`."""
    return [bar.row(results) for bar in bars(grid_of(results))]


def _conditions(results: Results) -> list[str]:
    """Sentences on where and how it was measured."""
    environments = [entry["environment"] for entry in results.cells.values()]
    settings = [entry["settings"] for entry in results.cells.values()]
    if not environments:
        return ["Nothing was measured yet."]
    libraries = {" ".join(f"{name} {v}" for name, v in one["versions"].items()) for one in environments}
    machines = {", ".join([one["processor"], f"{one['cores']} cores", *one["gpu"]]) for one in environments}
    loads = [one["load_average"] for one in environments]
    how = ", ".join(
        f"{key} {' or '.join(str(value) for value in values)}"
        for key in ("rounds", "warmup", "repeats", "threads", "device")
        if (values := sorted({one[key] for one in settings if key in one}))
    )
    return [
        f"{'; '.join(sorted(machines))}. {'; '.join(sorted(libraries))}. Commit {_joined(environments, 'commit')}, "
        f"{min(one['time'] for one in environments)[:10]} to {max(one['time'] for one in environments)[:10]}; load "
        f"average after a cell {min(loads)} to {max(loads)}. Measured with {how}.",
        "Ratios are medians over rounds of the ratio within a round, with quartiles. The floor is the frozen base with "
        "the gradient of the embedding's output. Bytes saved for the backward are those of each storage, once: without "
        "those of parameters (in the tables), or of frozen ones alone, which counts LoRA's matrices as it does ours.",
    ]


def _joined(found: Sequence[dict[str, Any]], key: str) -> str:
    return ", ".join(sorted({str(one[key]) for one in found}))


def markdown_table(header: Row, rows: Sequence[Row], left: int) -> str:
    """A Markdown table whose first `left` columns are aligned to the left."""
    rule = ["---" if number < left else "---:" for number in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))
