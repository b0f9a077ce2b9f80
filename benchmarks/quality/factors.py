"""A base for factors of kinds that are only compared here: a formula, and autograd does the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from typing_extensions import Self, override

from genlora_lightning.adapters.base import Factor


class FormulaFactor(Factor):
    """A factor that says its :meth:`matrix`: made alone, and differentiated by autograd."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The matrix ``M (rank, num_entries)``."""

    @override
    def forward(self, *, scale: float = 1.0, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        matrix = self.matrix() if scale == 1.0 else scale * self.matrix()
        return matrix if dtype is None else matrix.to(dtype)

    @override
    def batch_key(self) -> Hashable:
        return self.rank, self.num_entries

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        scale: float,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        return [factor(scale=scale, dtype=dtype) for factor in factors]

    @classmethod
    @override
    def pass_gradients(cls, factors: Sequence[Self], gradients: Sequence[Tensor], *, scale: float) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            matrices = cls.make_many(factors, scale=scale, dtype=None)
            torch.autograd.backward(matrices, [gradient.to(matrices[0].dtype) for gradient in gradients])
