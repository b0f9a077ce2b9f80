"""Which examples stand together in a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def bucketed(lengths: list[int], batch_size: int, seed: int, steps: int, window: int = 16) -> Iterator[list[int]]:
    """Indices of random batches of similar length: shuffled, sorted within windows, and the batches shuffled again."""
    generator = torch.Generator().manual_seed(seed)
    made = 0
    while made < steps:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for start in range(0, len(order) - batch_size + 1, window * batch_size):
            part = sorted(order[start : start + window * batch_size], key=lambda index: lengths[index])
            batches = [part[i : i + batch_size] for i in range(0, len(part) - batch_size + 1, batch_size)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                if made == steps:
                    return
                made += 1
                yield batches[index]


def on_device(batch: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """A batch's tensors on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}
