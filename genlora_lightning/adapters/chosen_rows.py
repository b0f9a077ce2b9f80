"""Update chosen rows of a weight alone, as the queries and values of a fused projection: of any kind with two factors.

The kind makes the update of a matrix that has these rows only; between them B gets columns of zeros. What is adapted,
merged and exported is then an update of the whole matrix like any other.

Shapes: R rank, O rows of the weight (its outputs), o of them chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from typing_extensions import Self, override

from genlora_lightning.adapters.base import Factor, FactorPair, MatrixShape, WeightUpdate

Ranges = Sequence[Sequence[int]]


class ChosenColumns(Factor):
    """A matrix ``(R, O)`` that is another factor's ``(R, o)`` in some columns, and zero in all others.

    Args:
        factor: The other one.
        ranges: Of columns, rising: ``[[start, end], …]``, the end left out.
        num_entries: O.
    """

    def __init__(self, factor: Factor, ranges: Ranges, num_entries: int) -> None:
        super().__init__(factor.rank, num_entries)
        self.factor = factor
        self.ranges = tuple((start, end) for start, end in ranges)

    @override
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        return  # there are none of its own

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self.factor.first_shape

    @override
    def parts(self) -> tuple[Tensor, ...]:
        return self.factor.parts()

    @override
    def batch_key(self) -> Hashable:
        return type(self.factor), self.factor.batch_key(), self.ranges, self.num_entries

    @property
    @override
    def cost(self) -> int:
        return max(self.factor.cost, super().cost)

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        return self._spread(self.factor(dtype=dtype, plain=plain))

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        inner = [factor.factor for factor in factors]
        made = type(inner[0]).make_many(inner, dtype=dtype, when_differentiated=when_differentiated)
        return [factor._spread(matrix) for factor, matrix in zip(factors, made, strict=True)]

    def _spread(self, matrix: Tensor) -> Tensor:
        pieces, end = [], 0
        chosen = torch.split(matrix, [end - start for start, end in self.ranges], dim=-1)
        for (start, own_end), piece in zip(self.ranges, chosen, strict=True):
            pieces += [matrix.new_zeros(self.rank, start - end), piece]
            end = own_end
        return torch.cat([*pieces, matrix.new_zeros(self.rank, self.num_entries - end)], dim=-1)


def spread_over(update: WeightUpdate, ranges: Ranges, shape: MatrixShape) -> WeightUpdate:
    """Make the update of some rows one of the whole weight.

    Args:
        update: Of a matrix of these rows.
        ranges: Of rows, rising: ``[[start, end], …]``, the end left out.
        shape: The weight's.

    Raises:
        ValueError: The kind has no two factors.
    """
    if not isinstance(update, FactorPair):
        raise ValueError(f"`target_rows` is for kinds with two factors, and {type(update).__name__} has none.")
    update.B = ChosenColumns(update.B, ranges, shape.out_features)
    update.shape, update.is_stored = shape, False
    return update
