"""A base for factors of kinds that are only compared here: their matrix is a formula."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from genlora_lightning.adapters.base import Factor


class FormulaFactor(Factor):
    """A factor that says its :meth:`matrix`: differentiated by autograd."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The matrix ``M (rank, num_entries)``."""

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        matrix = self.matrix()
        return matrix if dtype is None else matrix.to(dtype)
