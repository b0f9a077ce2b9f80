"""The tables of results: one CSV per experiment, one row per run, appended under a lock."""

from __future__ import annotations

import csv
import fcntl
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "key",  # digest of what decides the numbers: task, method, settings, rates, seed, steps, …
    "experiment",
    "arm",  # name in the tables
    "task",
    "method",
    "settings",  # JSON, all that the method needs
    "budget",  # adapter parameters over those of LoRA rank 1
    "adapter_parameters",
    "head_parameters",
    "lr",
    "head_lr",
    "seed",
    "steps",
    "batch_size",
    "dtype",
    "stage",  # "tuning": validation only; "final": test too
    "status",  # "ok" or "diverged"
    "train_loss",  # mean of the last third of the steps
    "val_loss",
    "val_accuracy",
    "test_loss",
    "test_accuracy",
    "general_rise",  # of a language model: of the loss on English news, over the base's
    "entropy_rank",
    "stable_rank",
    "rank_trace",  # JSON: [step, entropy rank, stable rank] over training, where asked for
    "saved_bytes",  # of a checkpoint's tensors: frozen ones that the method saves count, too
    "peak_bytes",  # on a GPU: most memory that torch has allocated while training
    "train_seconds",
    "seconds",
    "versions",
    "fresh_loss",  # of text, the windows that training does not repeat: test loss, of a tuning run validation loss; …
    "repeated_loss",  # … of those that it does
    "shares",  # JSON: [share of the trained update that is added, test loss, general_rise], where asked for
)
Row = dict[str, str]


def read_rows(folder: Path = RESULTS) -> dict[str, Row]:
    """The rows of all experiments by key; of several with one key the first."""
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.setdefault(row["key"], row)
    return rows


def append_row(experiment: str, values: dict[str, object], folder: Path = RESULTS) -> None:
    """Add one row; the file and its header are made where they are missing.

    Raises:
        ValueError: The row has a field that the table does not have, or lacks one.
    """
    path = folder / f"{experiment}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    if set(values) != set(FIELDS):
        raise ValueError(f"A row's fields differ from the table's: {sorted(set(values) ^ set(FIELDS))}.")
    with path.open("a", newline="", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow({key: _plain(value) for key, value in values.items()})


def _plain(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
