"""Say where a run runs: versions, machine, commit and command, and nothing that is secret."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from genlora_lightning.artifacts.writing import library_versions

# All that is told of the environment: what changes how fast, or where, the same command runs.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "NODE_RANK",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "WORLD_SIZE",
)
_HIDDEN = "***"
# Names of options whose values are secrets, and values that are whatever the option's name is.
_SECRET_NAME = re.compile(r"(?:^|[._-])(?:token|auth|credentials?)$|api[_-]?key|secret|passw|private[_-]?key", re.I)
_SECRET_VALUE = re.compile(
    r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_GIB = 2**30


def describe_environment(arguments: Sequence[str], *, processes: int = 1) -> dict[str, Any]:
    """Describe where this process runs, as JSON values.

    Args:
        arguments: Its command line; what looks like a secret is hidden.
        processes: How many processes train together.
    """
    found = {
        "command": shlex.join(without_secrets(arguments)),
        "folder": str(Path.cwd()),
        "versions": library_versions(),
        "machine": {**_machine(), "processes": processes},
        "git": git_state(Path.cwd()),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    return {name: value for name, value in found.items() if value is not None}


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Put stars in the place of values that are secrets, by the names of their options or by their looks."""
    found: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_option = argument.startswith("-")
        if hide_next and not is_option:
            argument = _HIDDEN
        elif equals and _SECRET_NAME.search(name):
            argument = f"{name}={_HIDDEN}"
        hide_next = is_option and not equals and _SECRET_NAME.search(name) is not None
        found.append(_SECRET_VALUE.sub(_HIDDEN, argument))
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Find the commit of the repository that a folder is in, and whether tracked files differ; ``None`` for no one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    # Without locks: another process may be at work there.
    command = ["git", "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    found: dict[str, Any] = {"system": platform.platform(), "cpu": _cpu_name(), "cores": usable}
    with suppress(AttributeError, ValueError, OSError):  # Windows
        found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1)
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        found["gpus"] = [f"{one.name} ({one.total_memory / _GIB:.0f} GiB)" for one in properties]
        found["cuda"] = torch.version.cuda or getattr(torch.version, "hip", None)
    return found


def _cpu_name() -> str:
    try:
        named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except (OSError, ValueError):
        named = None
    return named[1] if named else platform.processor() or platform.machine()
