"""Read what a run has kept of itself beside its metrics: where it ran, on which data, what it cost, and its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"  # a list, with an entry for each start
SAMPLES_FILE = "samples.jsonl"
SPECTRA_FILE = "spectra.jsonl"
LOG_FILE = "run.log"


@dataclass(frozen=True)
class Sample:
    """What a model answered to one prompt of the validation data.

    Args:
        step: Optimizer steps that were made before.
        index: The prompt's number.
        prompt: Its text.
        reference: The answer in the data.
        answer: The model's.
    """

    step: int
    index: int
    prompt: str
    reference: str
    answer: str


def read_starts(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Read what each start of a run has noted, oldest first; what cannot be read is left out."""
    found: list[dict[str, Any]] = []
    for folder in folders:
        try:
            starts = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        found += [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    return found


def read_samples(folders: Iterable[Path]) -> list[Sample]:
    """Read the answers of a run, oldest first; of two to one prompt at one step the later one counts."""
    found: dict[tuple[int, int], Sample] = {}
    for folder in folders:
        for line in read_lines(folder / SAMPLES_FILE):
            try:
                one = Sample(**line)
            except TypeError:
                continue
            texts = (one.prompt, one.reference, one.answer)
            if isinstance(one.step, int) and isinstance(one.index, int) and all(isinstance(t, str) for t in texts):
                found[one.step, one.index] = one
    return [found[key] for key in sorted(found)]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON lines, but for lines that are none, as one that was cut off."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        try:
            one = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(one, dict):
            found.append(one)
    return found


def environment_facts(starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Say in words where a run ran, by names; of several starts the last one counts."""
    if not starts:
        return {}
    last = starts[-1]
    machine, git = _mapping(last.get("machine")), _mapping(last.get("git"))
    gpus = machine.get("gpus")
    memory = machine.get("memory_gib")
    processes = machine.get("processes")
    where = [
        " + ".join(str(gpu) for gpu in gpus) if isinstance(gpus, list) else "",
        str(machine.get("cpu") or ""),
        f"{machine['cores']} cores" if machine.get("cores") else "",
        f"{memory:.0f} GiB" if isinstance(memory, (int, float)) else "",
        f"{processes} processes" if isinstance(processes, int) and processes > 1 else "",
        str(machine.get("system") or ""),
    ]
    commit = f"{str(git.get('commit'))[:12]}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else ""
    return {
        "machine": ", ".join(filter(None, where)),
        "code": f"git {commit}" if commit else "",
        "command": str(last.get("command") or ""),
    }


def data_rows(starts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Make a table of the data that a run was trained on: its header, and a row for each split."""
    splits = _mapping(starts[-1].get("data")) if starts else {}
    rows = {name: one for name, one in splits.items() if isinstance(one, dict)}
    names = list(dict.fromkeys(name for one in rows.values() for name, count in one.items() if count))
    cells = [[split, *(_count(one.get(name)) for name in names)] for split, one in rows.items()]
    return ["data", *(name.replace("_", " ") for name in names)], cells


def cost_of(starts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Add up what the starts of a run took: ``seconds``, ``tokens``, and the highest ``memory_gib``."""
    found: dict[str, float] = {}
    for start in starts:
        for name, value in _mapping(start.get("cost")).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                before = found.get(name, 0.0)
                found[name] = max(before, value) if name == "memory_gib" else before + value
    return found


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else "-"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
