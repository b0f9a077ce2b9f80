"""Save and restore the random number generators of torch, numpy and Python as values that load safely."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The state of torch's, numpy's and Python's global generators: tensors, numbers and lists only.

    Args:
        device: Its generator's state is added if it is a CUDA device.
    """
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, _tensor(np.array(numbers, dtype=np.uint32)), gauss],
    }
    kind, keys, *rest = np.random.get_state(legacy=True)
    if kind == "MT19937":
        state["numpy"] = [_tensor(np.asarray(keys)), *(float(value) for value in rest)]
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Put the generators back to a state of :func:`random_state`; the device's too, if both have one."""
    torch.set_rng_state(state["torch"].cpu())
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(_numbers(numbers).tolist()), gauss))
    if "numpy" in state:
        keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state(("MT19937", _numbers(keys), int(position), int(has_gauss), cached))
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _tensor(numbers: np.ndarray[Any, Any]) -> torch.Tensor:
    # As signed numbers: tensors of unsigned ones are not stored and loaded by every release of torch.
    return torch.from_numpy(numbers.astype(np.uint32).view(np.int32).copy())


def _numbers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    numbers: np.ndarray[Any, Any] = tensor.cpu().numpy().view(np.uint32)
    return numbers
