"""Put several examples into one row, so that little of a batch is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORE_INDEX = -100


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute examples over rows: best fit, the longest first, in O(n log n).

    Args:
        lengths: Tokens of each example, at most `capacity`.
        capacity: Tokens that a row holds.

    Returns:
        The examples' indices, row by row.
    """
    rows: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # rows by the tokens they have room for
    rooms: list[int] = []  # its keys that have rows, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        rows[row].append(index)
        left = room - length
        if left:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(row)
    return rows


class PackedRows(Dataset[dict[str, list[int]]]):
    """Rows of several examples each.

    Args:
        examples: Rows with `input_ids` and `labels`.
        rows: The examples' indices, row by row.
    """

    def __init__(self, examples: Any, rows: list[list[int]]) -> None:
        self.examples = examples
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for index in self.rows[number]:
            example = self.examples[index]
            row["input_ids"] += example["input_ids"]
            # An example's first token follows another example, from which nothing predicts it.
            row["labels"] += [IGNORE_INDEX, *example["labels"][1:]]
            row["position_ids"] += range(len(example["input_ids"]))
        return row


@dataclass(frozen=True)
class Packer:
    """Puts rows of examples into rows of several each, where not all examples are known.

    Args:
        capacity: Tokens that a row holds.
    """

    capacity: int

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the packed rows, as `PackedRows` has them."""
        packed = PackedRows(rows, pack([len(row["input_ids"]) for row in rows], self.capacity))
        return [packed[number] for number in range(len(packed))]


@dataclass(frozen=True)
class PackedCollator:
    """Pads packed rows on the right.

    Positions begin at 0 with each example and with each token of padding, by which transformers keeps them apart. The
    `attention_mask` only says which tokens are no padding.

    Args:
        pad_token_id: Fills `input_ids`; labels are -100 there.
        multiple: Lengths are rounded up to a multiple of it.
    """

    pad_token_id: int
    multiple: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Returns a batch of tensors (rows, length)."""
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple) * self.multiple
        fills = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX, "position_ids": 0}
        batch = {name: torch.full((len(rows), length), fill) for name, fill in fills.items()}
        batch["attention_mask"] = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            for name, values in row.items():
                batch[name][number, : len(values)] = torch.tensor(values)
            batch["attention_mask"][number, : len(row["input_ids"])] = 1
        return batch
