"""Stand in the place of an embedding, or of an output head, with the rows of chosen tokens that are trained in full.

The base gives all that it gives, and the rows take the place of its own: nothing of the table's size is made, and what
other tokens get is untouched in every bit.

Shapes: V rows of the table, D entries of a row, k tokens; ``...`` the shape of the ids.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.autograd import in_transform
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.low_rank import RankKind, effective_rank
from genlora_lightning.adapters.token_rows import RowTable, TokenRowsConfig
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.by_name import AdaptedByName
from genlora_lightning.layers.embedding import AdaptedEmbedding, has_own_forward, rows_by
from genlora_lightning.layers.linear import AdaptedLinear


class AdaptedRows(AdaptedByName):
    """A frozen table ``W (V, D)`` some of whose rows are trained in full.

    Args:
        base_layer: The embedding or linear.
        config: The tokens.
        generator: Not used: the rows start as the base's.
    """

    noun: ClassVar[str] = "token rows"

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__(base_layer, config, generator)
        assert isinstance(config, TokenRowsConfig)
        self.tokens = tuple(config.tokens)
        if not self.weight.is_meta:
            self.start_from(self.weight[list(self.tokens)])

    @property
    def table(self) -> RowTable:
        """The rows' module, which tied layers have in common."""
        table = self.update.table
        assert isinstance(table, RowTable)
        return table

    @torch.no_grad()
    def start_from(self, rows: Tensor) -> None:
        """Have the rows be the base's ``(k, D)``."""
        self.table.rows.copy_(rows)
        self.table.start.copy_(rows)

    def ids(self, device: torch.device) -> Tensor:
        """The tokens' ids ``(k,)``, rising, on a device."""
        return self.table.ids.to(device)

    # -- what is trained, as an update ---------------------------------------------------------------------------------

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        """Compute ``A (k, D)``, what the rows differ by, and ``B (V, k)``, which chooses them."""
        A = self._differences()
        B = A.new_zeros(self.out_features, len(self.tokens))
        return A, B.index_put_((self.ids(A.device), torch.arange(len(self.tokens), device=A.device)), A.new_ones(()))

    @override
    def effective_rank(self, kind: RankKind = "entropy") -> float:
        A = self._differences()
        return effective_rank(A, torch.eye(len(A), dtype=A.dtype, device=A.device), kind)

    @override
    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        A = self._differences()
        return A.new_zeros(*self.shape).index_copy_(0, self.ids(A.device), A)

    @override
    def acts(self) -> bool:
        return bool(self._differences().any())

    @torch.no_grad()
    def _differences(self) -> Tensor:
        return self.table.rows.detach() - self.table.start

    @property
    @override
    def merged_with(self) -> Hashable:
        return id(self.base_weight), id(self.table)

    @override
    def _sum(self, weight: Tensor, delta: Tensor) -> Tensor:
        rows = self.table.rows.detach().to(torch.promote_types(weight.dtype, torch.float32))
        return weight.to(rows).index_copy(0, self.ids(rows.device), rows)


class EmbeddingRows(AdaptedRows, AdaptedEmbedding):
    """An embedding some of whose rows are trained in full, that of ``padding_idx`` too if it is named."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer, as the base; ``(..., D)``."""
        output: Tensor = self.base_layer(*args, **kwargs)
        if not self.is_active:
            return output
        place, scale = self._places(args, kwargs, output.dtype)
        rows = F.embedding(place.clamp(min=0), self.table().to(output.dtype))
        return torch.where((place >= 0).unsqueeze(-1), rows if scale is None else rows * scale, output)

    @torch.no_grad()
    def _places(self, args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Which row each id takes, -1 for none, ``(...)``; and by what the base multiplies it."""
        base = self.base_layer
        if not has_own_forward(base):
            given: Tensor = next(iter((*args, *kwargs.values())))
            tokens = self.ids(given.device)
            place = torch.searchsorted(tokens, given).clamp(max=len(tokens) - 1)
            return torch.where(tokens[place] == given, place, -1), None
        # What it makes of numbers in the place of rows tells which it takes, and by what it scales.
        tokens = self.ids(self.weight.device)
        table = torch.ones(self.out_features, 2, device=tokens.device)
        table[:, 1] = 0
        table[tokens, 1] = torch.arange(1.0, len(tokens) + 1, device=tokens.device)
        scale, number = rows_by(base, table, args, kwargs).unbind(-1)
        scales = rows_by(base, torch.ones(self.out_features, 1, dtype=dtype, device=tokens.device), args, kwargs)
        return (number / scale).round().long() - 1, scales.to(dtype)


class HeadRows(AdaptedRows, AdaptedLinear):
    """An output head some of whose rows are trained in full."""

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer, as the base; ``(..., V)``."""
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.is_active:
            return output
        # What the rows differ by, so that new ones change nothing: a product of fewer rows rounds in another way.
        more = F.linear(x, (self.table() - self.table.start).to(x.dtype)).to(output.dtype)
        tokens = self.ids(output.device)
        if type(self.base_layer) is not nn.Linear or in_transform() or torch.compiler.is_compiling():
            return output.index_add(-1, tokens, more)
        return output.index_add_(-1, tokens, more)  # no copy of all logits; nobody else has them


def rows_layer(module: nn.Module) -> type[AdaptedLayer]:
    """The class that trains rows of a module."""
    return EmbeddingRows if isinstance(module, nn.Embedding) else HeadRows
