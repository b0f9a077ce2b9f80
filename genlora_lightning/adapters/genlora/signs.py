"""Compute fixed pseudo-random signs, one for each entry of a basis vector, by a formula that nobody stores.

With signs each entry of a latent has a direction of its own in the space of the R basis vectors, instead of one that it
shares with its group. It is the idea of VeRA (arXiv 2310.11454), whose frozen random matrices are the same in all
layers; of them only the signs are left.

Shapes: R rank, Q latents, n entries of a basis vector.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from genlora_lightning.adapters.autograd import is_tracing

# Odd constants of a 32-bit integer mixer, modulo 2^32 of the least size: products with 32 bits stay below 2^63, so that
# no arithmetic overflows on any device.
_MIX = 0x45D9F3B
_STEP = 0x9E3779B1 - (1 << 32)
_MASK = 0xFFFFFFFF
_MOST_LATENTS = 1 << 10

_Tables = dict[tuple[int, int, int, int, torch.device], Tensor]
_tables: _Tables = {}
_tables_of_modes: weakref.WeakKeyDictionary[Any, _Tables] = weakref.WeakKeyDictionary()


def entry_signs(table: int, rank: int, num_latents: int, num_entries: int, device: torch.device) -> Tensor:
    """Signs ``σ (R, Q, n)``, each -1 or 1, in int8: a hash of the table's number and the three indices.

    The same on every machine, and part of the adapter file's format: a sign depends on its indices alone, so that a
    wider or longer table begins with the narrower one. Tables are kept, one for each size, shared by all layers.

    Args:
        table: Number of the table: A's and B's differ, or ΔW would have a diagonal of its own.
        rank: R.
        num_latents: Q, at most 1024.
        num_entries: n.
        device: Where.
    """
    if torch.compiler.is_compiling() or is_tracing():  # part of the kernel and of each trace, and takes no memory
        return _make(table, rank, num_latents, num_entries, device)
    mode = detect_fake_mode()  # in which tables have no values, and are nobody else's
    tables = _tables if mode is None else _tables_of_modes.setdefault(mode, {})
    key = (table, rank, num_latents, num_entries, device)
    if key not in tables:
        with torch.inference_mode(False), torch.no_grad():
            tables[key] = _make(table, rank, num_latents, num_entries, device)
    return tables[key]


def _make(table: int, rank: int, num_latents: int, num_entries: int, device: torch.device) -> Tensor:
    entry = torch.arange(1, num_entries + 1, device=device)
    latent = torch.arange(num_latents, device=device)
    row = torch.arange(1, rank + 1, device=device) * _MOST_LATENTS
    of_row = _mixed((row.unsqueeze(1) + latent) * 2 + table)  # (R, Q)
    value = _mixed(_mixed(entry) ^ of_row.unsqueeze(2))
    return (1 - 2 * (value & 1)).to(torch.int8)


def _mixed(value: Tensor) -> Tensor:
    value = (value * _STEP) & _MASK
    for _ in range(2):
        value = ((value ^ (value >> 16)) * _MIX) & _MASK
    return value ^ (value >> 16)
