"""The results' file: a cell is written as soon as it is measured, and is not measured again."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .plan import Cell
from .timing import Options

_ROOT = Path(__file__).resolve().parents[2]
_FORMAT = 1
COMMIT_VARIABLE = "GENLORA_COMMIT"  # for a copy of the files without git's


class Spread(NamedTuple):
    """Median and quartiles."""

    first: float
    median: float
    third: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of some values."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


class Results:
    """What was measured: ``{"format": 1, "cells": {key: {"settings", "environment", "arms"}}}``.

    Args:
        path: The JSON file; it may not be there yet.

    Raises:
        ValueError: It is of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text()) if path.is_file() else {"format": _FORMAT, "cells": {}}
        if content.get("format") != _FORMAT:
            raise ValueError(f"{path} has format {content.get('format')!r}, not {_FORMAT}. Give another --output.")
        self.cells: dict[str, dict[str, Any]] = content["cells"]

    def has(self, cell: Cell, options: Options) -> bool:
        """Whether a cell was measured with these settings."""
        return self.cells.get(cell.key, {}).get("settings") == settings_of(cell, options)

    def add(self, cell: Cell, options: Options, arms: dict[str, Any], seconds: float) -> None:
        """Add a cell, and write the file."""
        self.cells[cell.key] = {
            "settings": settings_of(cell, options),
            "environment": {**environment(), "measuring_seconds": round(seconds, 1)},
            "arms": arms,
        }
        self._summarise(cell)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps({"format": _FORMAT, "cells": self.cells}, indent=1) + "\n")
        partial.replace(self.path)

    def _summarise(self, cell: Cell) -> None:
        """Add medians and ratios, for those who read the file; the report makes its own."""
        for name, arm in self.arms(cell).items():
            if "seconds" in arm:
                arm["median_seconds"] = statistics.median(arm["seconds"])
                reference = "lora" if cell.kind == "step" else "base"
                arm[f"ratio_to_{reference}"] = self.ratio(cell, name, reference)._asdict()

    def arms(self, cell: Cell) -> dict[str, Any]:
        """The arms of a cell.

        Raises:
            KeyError: It was not measured.
        """
        found: dict[str, Any] = self.cells[cell.key]["arms"]
        return found

    def ratio(self, cell: Cell, arm: str, reference: str) -> Spread:
        """The spread of an arm's time divided by another's of the same round."""
        arms = self.arms(cell)
        pairs = zip(arms[arm]["seconds"], arms[reference]["seconds"], strict=True)
        return spread([one / other for one, other in pairs])


def settings_of(cell: Cell, options: Options) -> dict[str, Any]:
    """All by which a cell would come out otherwise, the machine and the libraries apart."""
    used: dict[str, tuple[str, ...]] = {"memory": ("repeats", "threads", "device"), "counts": ()}
    chosen = used.get(cell.kind, ("rounds", "warmup", "threads", "device"))
    chosen += ("folder",) if cell.model == "smollm2" else ()
    return {**cell.to_dict(), **{key: value for key, value in asdict(options).items() if key in chosen}}


def environment() -> dict[str, Any]:
    """The machine, the versions, and how busy the machine is."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": _commit(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": [torch.cuda.get_device_name()] if torch.cuda.is_available() else [],
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
