"""Adapt an embedding: rows of the frozen table plus the same rows of the low-rank product.

Shapes: V num_embeddings, D embedding_dim, R rank; ``...`` the shape of the ids.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.layers.by_name import AdaptedByName
from genlora_lightning.layers.swapped import call_with


class AdaptedEmbedding(AdaptedByName):
    r"""A frozen embedding with an update of its weight ``W (V, D)``.

    .. math::
        y = W[i] + s \, B[i] A

    with ``A (rank, D)`` and ``B (V, rank)``: ΔW is never formed where a kind has two factors, and only the rows of B
    that are asked for are read. Of a class with a forward of its own (a scale, an offset of the ids) the forward gives
    the rows of B, too. The row of ``padding_idx`` is never updated. Dropout is not applied: ids have no entries to
    drop.

    What else reads the weight, such as an output head that is tied to it, goes on with the base's.
    """

    noun = "embedding"

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module) -> MatrixShape | None:
        if not isinstance(module, nn.Embedding):
            return None
        return MatrixShape(module.num_embeddings, module.embedding_dim)

    @classmethod
    @override
    def obstacle(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return f"its `max_norm` ({module.max_norm}) rescales rows of the frozen weight in each forward"
        if module.scale_grad_by_freq:
            return (
                "its `scale_grad_by_freq` scales gradients of single rows, which the factors of an update do not have"
            )
        if has_own_forward(module) and "weight" not in module._parameters:
            return f"the forward of {type(module).__name__} is its own, and its weight is computed from others"
        if has_own_forward(module) and not _takes_rows(module):
            return f"the forward of {type(module).__name__} does more with its weight than to take and to scale rows"
        return None

    @override
    def to_stored(self, delta: Tensor) -> Tensor:
        return delta

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = super().factors()
        return A, self._without_padding(B)

    @override
    def delta_weight(self) -> Tensor:
        return self._without_padding(super().delta_weight())

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the adapted layer.

        Args:
            args: What the base layer takes: for an ``nn.Embedding`` ids of any shape.
            kwargs: The same by name.

        Returns:
            ``(..., D)``, in the dtype the base layer gives.
        """
        output: Tensor = self.base_layer(*args, **kwargs)
        if not self.is_active:
            return output
        pair = self.matrices(self.factor_dtype())
        if pair is None:
            return output + self._rows(self.masked(self.update()), args, kwargs).to(output.dtype)
        A, B = pair
        return output + (self.update.scaling * (self._rows(B.T, args, kwargs) @ A)).to(output.dtype)

    def _rows(self, table: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the base layer's forward would give with another table ``(V, …)``."""
        base = self.base_layer
        if has_own_forward(base):
            return rows_by(base, self._without_padding(table), args, kwargs)
        (ids,) = (*args, *kwargs.values())
        rows = F.embedding(ids, table)
        padding = base.padding_idx
        return rows if padding is None else rows.masked_fill((ids == padding).unsqueeze(-1), 0)

    def _without_padding(self, table: Tensor) -> Tensor:
        padding = getattr(self.base_layer, "padding_idx", None)  # the base is a stand-in where a file is read
        if padding is None:
            return table
        return table.masked_fill((torch.arange(len(table), device=table.device) == padding).unsqueeze(-1), 0)


def has_own_forward(module: nn.Module) -> bool:
    """Whether an embedding has a forward other than ``nn.Embedding``'s."""
    return type(module).forward is not nn.Embedding.forward or "forward" in vars(module)


def rows_by(module: nn.Module, table: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module's forward gives with another weight, without its hooks."""
    rows: Tensor = call_with(module, "weight", table, module.forward, args, kwargs)
    return rows


@torch.no_grad()
def _takes_rows(module: nn.Module) -> bool:
    """Whether a forward f gives ``f(T) M = f(T M)`` for any table T and matrix M, as to take and scale rows does."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    generator = torch.Generator().manual_seed(0)
    T, M = (torch.randn(*shape, generator=generator).to(weight.device) for shape in ((len(weight), 3), (3, 2)))
    ids = torch.ones(1, 3, dtype=torch.long, device=weight.device)
    try:
        of_table, of_product = (rows_by(module, table, (ids,), {}) for table in (T, T @ M))
        if of_table.shape[-1] != 3 or of_product.shape != (*of_table.shape[:-1], 2):
            return False
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it takes something else
        return False
    if of_product.is_meta:
        return True
    error = (of_table.float() @ M - of_product.float()).norm()
    return bool(error <= 0.02 * of_product.float().norm())
