"""Peak memory of a training process of its own for each arm: resident memory, for which Linux is needed, or a GPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .models import base_of, make_arm
from .plan import Cell
from .timing import Options

ROOT = Path(__file__).resolve().parents[2]
_STEPS = 3


def measure_memory(cell: Cell, options: Options) -> dict[str, Any]:
    """Bytes at the peak, of the whole process and above what it has with its model loaded, in several processes."""
    found: dict[str, Any] = {name: {"peak_bytes": [], "growth_bytes": []} for name in cell.arms}
    for _ in range(options.repeats):
        for name in cell.arms:
            one = _in_process(cell, name, options)
            found[name]["peak_bytes"].append(one["peak"])
            found[name]["growth_bytes"].append(one["peak"] - one["loaded"])
    return found


def _in_process(cell: Cell, arm: str, options: Options) -> dict[str, int]:
    request = {"cell": cell.to_dict(), "arm": arm, "threads": options.threads, "device": options.device}
    # Memory that was freed goes back to the kernel, so that the peak is the program's and not the allocator's reserve.
    trimmed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "worker", json.dumps(request)],
        cwd=ROOT,
        env={**os.environ, **trimmed, "OMP_NUM_THREADS": str(options.threads)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
        check=True,
    )
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(request: dict[str, Any]) -> dict[str, int]:
    """In a process of its own: load the model, train some steps, and say what was resident."""
    import peft  # noqa: F401  (by every arm, so that all have the same libraries)

    cell = Cell(**{**request["cell"], "arms": tuple(request["cell"]["arms"])})
    device = request["device"]
    torch.set_num_threads(request["threads"])
    warm = torch.nn.Linear(64, 64, device=device)  # the threads, and what is loaded with them
    warm(torch.ones(64, 64, device=device)).sum().backward()
    base_of(request["arm"], cell, device)
    loaded = _resident(device, "VmRSS")
    _reset_peak(device)
    arm = make_arm(request["arm"], cell, device)
    for _ in range(_STEPS):
        arm.step()
    return {"loaded": loaded, "peak": _resident(device, "VmHWM")}


def _resident(device: str, field: str) -> int:
    """Bytes in memory: ``VmRSS`` now, ``VmHWM`` at the peak; of a GPU those that torch has allocated."""
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def _reset_peak(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
