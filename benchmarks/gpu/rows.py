"""The rows of results: one JSON line per measurement, appended when it is made, with all that it was made with."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.results import environment

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


def card_of(device: str) -> str:
    """The card's name, or the processor's."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {environment()['processor']}"


@dataclass
class Rows:
    """A file of rows, and what there is still to be measured.

    Args:
        path: The file; it may not be there yet.
        device: Torch's name of it.
        end: When to stop beginning new measurements, as :func:`time.time` counts.
    """

    path: Path
    device: str
    end: float = float("inf")

    def measure(self, stage: str, name: str, settings: dict[str, Any], task: Callable[[], dict[str, Any]]) -> bool:
        """Do a task and write its row, unless it is there or the time is over; whether it was done without an error.

        An error is a row as well, with the error's text; it is tried again in the next run.
        """
        key = self.key(stage, name, settings)
        if key in {row["key"] for row in read(self.path) if "error" not in row}:
            print(f"{stage}: {name}: measured before", flush=True)
            return True
        if time.time() >= self.end:
            print(f"{stage}: {name}: no time left", flush=True)
            return False
        started = time.perf_counter()
        found: dict[str, Any]
        try:
            found = {"values": task()}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
        seconds = round(time.perf_counter() - started, 2)
        where = environment()
        where["versions"] |= {name: version(name) for name in ("lightning", "safetensors")}
        row = {"key": key, "stage": stage, "name": name, "settings": settings, "card": card_of(self.device)}
        append(self.path, {**row, "environment": where, "seconds": seconds, **found})
        print(f"{stage}: {name}: {found.get('error', 'done')}, {seconds:.1f} s", flush=True)
        return "error" not in found

    def key(self, stage: str, name: str, settings: dict[str, Any]) -> str:
        """A digest of what decides a measurement, the card included."""
        text = json.dumps([stage, name, settings, card_of(self.device)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(*paths: Path) -> list[Row]:
    """The rows of some files; a line that was cut off in the middle is left out."""
    rows = []
    for path in paths:
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row, on a line of its own even after one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_cut = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_cut + json.dumps(row) + "\n")


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of the rows with one key the last, a measurement before an error."""
    found: dict[str, Row] = {}
    for row in rows:
        if "error" not in row or "error" in found.get(row["key"], row):
            found[row["key"]] = row
    return [*found.values()]
