"""Say what a run is and has come to, in the words and figures of tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from genlora_lightning.reports.record import cost_of, environment_facts
from genlora_lightning.reports.runs import INTERRUPTED, AdapterSizes, Run

RUN_COLUMNS = (
    "run",
    "date (UTC)",
    "model",
    "kind",
    "rank",
    "steps",
    "best val loss",
    "last train loss",
    "adapter",
    "state",
)


def run_cells(run: Run) -> list[str]:
    """A run's line in a table of runs; see ``RUN_COLUMNS``."""
    best, starts = run.best_val_loss, len(run.folders)
    return [
        f"{run.folder}{f' ({starts} starts)' if starts > 1 else ''}",
        f"{run.date:%Y-%m-%d %H:%M}",
        run.model,
        run.kind,
        "-" if run.rank is None else str(run.rank),
        f"{run.steps:,}",
        "-" if best is None else number(best[0]),
        "-" if run.last_train_loss is None else number(run.last_train_loss),
        "-" if run.num_bytes is None else size(run.num_bytes),
        run.state,
    ]


def facts_of(run: Run, sizes: AdapterSizes | None) -> dict[str, str]:
    """What a run is and has come to, by names; what is not known is left out."""
    trainer = _mapping(run.config.get("trainer"))
    data = _mapping(run.config.get("data"))
    arguments = _mapping(data.get("init_args"))
    files = [f"{name} {value}" for name, value in arguments.items() if name.endswith("_file") and value]
    settings = [f"rank {run.rank}" if run.rank is not None else "", _lr(run)]
    told = {
        name: _short(trainer.get(name)) for name in ("strategy", "accelerator", "devices", "num_nodes", "precision")
    }
    seed = run.config.get("seed_everything")
    state = f"{run.state}, or still running" if run.state == INTERRUPTED else run.state
    starts = "" if len(run.folders) < 2 else f"; {len(run.folders)} starts, of which the curves are joined"
    rows = {
        "state": f"{state}; {run.date:%Y-%m-%d %H:%M} UTC{starts}",
        "model": ", ".join(filter(None, [run.model, _class(run.config.get("model"))])),
        "data": ", ".join(filter(None, [_class(data), *files])),
        "adapter": ", ".join(filter(None, [run.kind, *settings])),
        "trainer": ", ".join([f"{name} {value}" for name, value in told.items() if value])
        + (f", seed {seed}" if seed is not None and told else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "training": _progress(run),
        **environment_facts(run.starts),
    }
    if run.adapter is not None:
        weight = [size(run.num_bytes or 0)]
        if sizes is not None:
            weight.append(f"{sizes.parameters:,} values")
            if sizes.lora_parameters and run.kind != "lora":
                share = 100 * sizes.parameters / sizes.lora_parameters
                weight.append(f"{share:.3g} % of the {sizes.lora_parameters:,} of LoRA of that rank")
        rows["saved in"] = f"{run.adapter} ({', '.join(weight)})"
    return {name: text for name, text in rows.items() if text}


def metric_rows(run: Run) -> list[tuple[str, str, str, str, str]]:
    """First, last, lowest and highest value of each figure, losses first, with the steps of the last two."""
    rows = []
    for name in sorted(run.shown_curves, key=lambda name: ("loss" not in name, name)):
        one = run.curves[name]
        extremes = [f"{number(value)} at {step:,}" for value, step in (one.lowest, one.highest)]
        rows.append((name, number(one.values[0]), number(one.values[-1]), extremes[0], extremes[1]))
    return rows


def number(value: float) -> str:
    """A figure with four digits."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def size(num_bytes: int) -> str:
    """A size in bytes, kB or MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} bytes"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"


def _progress(run: Run) -> str:
    parts = [f"{run.steps:,} steps"]
    if run.seconds is not None:
        about = "" if run.seconds_exact else "about "
        parts.append(f"in {about}{duration(run.seconds)}{'' if run.seconds_exact else ', by the times of the files'}")
    cost, rate = cost_of(run.starts), run.tokens_per_second
    took = [" ".join(parts)]
    took += [f"{cost['tokens']:,.0f} tokens"] if cost.get("tokens") else []
    took += [f"{number(rate)} tokens per second"] if rate is not None else []
    took += [f"{cost['memory_gib']:.3g} GiB at most"] if "memory_gib" in cost else []
    return ", ".join(took)


def _lr(run: Run) -> str:
    return "" if run.learning_rate is None else f"lr {run.learning_rate:g}"


def _class(section: Any) -> str:
    return str(_mapping(section).get("class_path", "")).rpartition(".")[2]


def _short(value: Any) -> str:
    """A setting of the trainer, of which objects are given by class and arguments."""
    return _class(value) or ("" if value is None else str(value))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
