"""Choose the precision that a machine is fast in."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple

import torch

AUTO = "auto"
_CPU_FACTS = Path("/proc/cpuinfo")
# Instructions that multiply bfloat16 numbers. Without them bfloat16 is computed by way of float32, and is slower.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


class Precision(NamedTuple):
    """A precision of Lightning's Trainer, and why it was taken."""

    name: str
    reason: str


def best_precision(accelerator: str = AUTO) -> Precision:
    """Choose between ``"bf16-mixed"`` and ``"32-true"`` by what the hardware multiplies.

    It is known and not measured, so that all processes of a run on equal machines take the same.

    Args:
        accelerator: The Trainer's: ``"auto"``, ``"gpu"``, ``"cuda"``, ``"cpu"`` or another.
    """
    if accelerator in (AUTO, "gpu", "cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if torch.cuda.get_device_capability()[0] >= 8:
            return Precision("bf16-mixed", f"{name} has bfloat16 tensor cores")
        return Precision("32-true", f'{name} has no bfloat16 tensor cores; "16-mixed" may be faster')
    if accelerator == "cpu" or (accelerator == AUTO and not torch.backends.mps.is_available()):
        if cpu_multiplies_bfloat16():
            return Precision("bf16-mixed", "this CPU multiplies bfloat16 numbers")
        return Precision("32-true", "this CPU has no bfloat16 arithmetic, or does not say so")
    return Precision("32-true", f"nothing is known about bfloat16 on {accelerator}")


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU says that it has instructions for bfloat16; without them torch is many times as slow in it."""
    return bool(_BF16_FLAGS & _cpu_flags())


def _cpu_flags() -> set[str]:
    """The names of the CPU's instruction sets, where the system tells them."""
    if platform.system() != "Linux" or not _CPU_FACTS.exists():
        return set()
    for line in _CPU_FACTS.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return set(value.split())
    return set()
