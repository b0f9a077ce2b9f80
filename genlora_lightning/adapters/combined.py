"""Combine updates of one matrix, of whatever kinds, into one update: a weighted sum, low-rank if they are.

Shapes: R_i rank of the i-th, n entries of a factor's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from genlora_lightning.adapters.base import Factor, FactorPair, WeightUpdate


class ConcatenatedFactor(Factor):
    """The rows of several factors under each other: ``[w_1 · M_1; w_2 · M_2; …]`` ``(Σ R_i, n)``.

    Its parameters are theirs. Where layers have factors of the same kinds in one order, they are made at once.

    Args:
        factors: The factors, of one length n.
        weights: The w_i; all 1 if ``None``.
    """

    def __init__(self, factors: Sequence[Factor], weights: Sequence[float] | None = None) -> None:
        super().__init__(sum(factor.rank for factor in factors), factors[0].num_entries)
        self.factors = nn.ModuleList(factors)
        self.weights = None if weights is None else tuple(weights)
        self._members = tuple(factors)  # a module list's own lookup is slow

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self._members[0].first_shape

    @override
    def parts(self) -> tuple[Tensor, ...]:
        return tuple(part for factor in self._members for part in factor.parts())

    @property
    @override
    def is_whole(self) -> bool:
        return all(factor.is_whole for factor in self._members)

    @override
    def batch_key(self) -> Hashable:
        return tuple((type(factor), factor.batch_key()) for factor in self._members), self.weights

    @property
    @override
    def cost(self) -> int:
        return sum(factor.cost for factor in self._members)

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        inner = dtype if factors[0].weights is None else None  # a weight is multiplied before a cast, not after it
        columns = [
            type(column[0]).make_many(column, dtype=inner, when_differentiated=when_differentiated)
            for column in zip(*(factor._members for factor in factors), strict=True)
        ]
        rows = zip(*columns, strict=True)
        return [factor._joined(matrices, dtype) for factor, matrices in zip(factors, rows, strict=True)]

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        inner = dtype if self.weights is None else None
        return self._joined([factor(dtype=inner, plain=plain) for factor in self._members], dtype)

    def _joined(self, matrices: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
        if self.weights is not None:
            matrices = [weight * matrix for weight, matrix in zip(self.weights, matrices, strict=True)]
        joined = torch.cat(list(matrices))
        return joined if dtype is None else joined.to(dtype)


class SummedUpdate(WeightUpdate):
    """``ΔW = Σ w_i · ΔW_i`` of updates that are not all products of two factors.

    Args:
        updates: The updates, of one shape.
        weights: The w_i.
    """

    def __init__(self, updates: Sequence[WeightUpdate], weights: Sequence[float]) -> None:
        super().__init__(updates[0].shape)
        self.updates = nn.ModuleList(updates)
        self.weights = tuple(weights)
        self._members = tuple(updates)

    @property
    @override
    def rank(self) -> int:
        return min(sum(update.rank for update in self._members), *self.shape)

    @override
    def delta_weight(self) -> Tensor:
        parts = [weight * update() for weight, update in zip(self.weights, self._members, strict=True)]
        return torch.stack(parts).sum(0)


def combine_updates(updates: Sequence[WeightUpdate], weights: Sequence[float]) -> WeightUpdate:
    """The update ``Σ w_i · ΔW_i``, whose parameters are theirs.

    Of products ``s_i · B_iᵀ A_i`` it is one: of ``A = [A_1; A_2; …]`` and ``B = [B_1; B_2; …]``. The factors w_i · s_i
    are its scaling if they are equal, and else multiplied into B.

    Args:
        updates: The updates, of one shape.
        weights: The w_i.
    """
    pairs = [update for update in updates if isinstance(update, FactorPair)]
    if len(pairs) < len(updates):
        return SummedUpdate(updates, weights)
    scalings = [weight * pair.scaling for weight, pair in zip(weights, pairs, strict=True)]
    is_common = len(set(scalings)) == 1
    A = ConcatenatedFactor([pair.A for pair in pairs])
    B = ConcatenatedFactor([pair.B for pair in pairs], None if is_common else scalings)
    return FactorPair(A, B, scalings[0] if is_common else 1.0)
