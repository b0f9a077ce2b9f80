"""Hold the rows of chosen tokens that are trained in full, in an embedding and in the head that is tied to it.

The rows are values and no update of the base's: those of new tokens are random in a base, and others each time that it
is resized.

Shapes: k tokens, D entries of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from genlora_lightning.adapters.base import AdapterModule, MatrixShape, Role, WeightUpdate
from genlora_lightning.adapters.config import AdapterConfig, ScalingRule
from genlora_lightning.fields import check_flag, check_integer


class RowTable(AdapterModule):
    """The rows ``(k, D)``; zeros, until their layer fills in the base's.

    Args:
        tokens: The tokens' ids, rising.
        width: D.
        tied: Whether all layers with rows of these tokens have one table.
        device: Where the parameter is made.
    """

    # No parameters, and in no file.
    ids: Tensor  # (k,)
    start: Tensor  # (k, D): the base's rows

    ROLES: ClassVar[Mapping[str, Role]] = {"rows": Role("token_rows", decayed=False)}
    must_be_whole = "the rows of its `tokens_to_train` are few, and read in several places"

    def __init__(self, tokens: list[int], width: int, *, tied: bool, device: torch.device | None = None) -> None:
        super().__init__()
        if tied:
            self.tie_key = ("token rows", tuple(tokens), width)
        self.rows = nn.Parameter(torch.empty(len(tokens), width, dtype=torch.float32, device=device))
        self.tokens = tokens
        self.register_buffer("ids", torch.empty(len(tokens), dtype=torch.long, device=device), persistent=False)
        self.register_buffer("start", torch.empty_like(self.rows, requires_grad=False), persistent=False)
        self.reset_parameters()

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if not self.rows.is_meta:
            self.rows.zero_()
            self.start.zero_()
            self.ids.copy_(torch.tensor(self.tokens))

    @override
    def forward(self) -> Tensor:
        """The rows: as a forward, before which FSDP gathers them."""
        # Where FSDP1 shards them, a view stands in the parameter's place, and is freed after this forward.
        return self.rows if isinstance(self.rows, nn.Parameter) else self.rows.clone()


class TokenRows(WeightUpdate):
    """Rows that stand in the place of the base's. What they add to those, the layer knows.

    Args:
        shape: The embedding's.
        table: The rows.
    """

    def __init__(self, shape: MatrixShape, table: RowTable) -> None:
        super().__init__(shape)
        self.table = table

    @property
    @override
    def rank(self) -> int:
        return self.table.rows.shape[0]

    @override
    def delta_weight(self) -> Tensor:
        raise TypeError("Rows that are trained in full are no update without the base's: their layer computes it.")


@dataclass(frozen=True, kw_only=True)
class TokenRowsConfig(AdapterConfig):
    """What :attr:`~genlora_lightning.adapters.config.AdapterConfig.tokens_to_train` comes to at one layer.

    Args:
        tokens: The tokens' ids, rising.
        tied: Whether another layer has the same rows.
    """

    kind: ClassVar[str] = "token_rows"
    title: ClassVar[str] = "Token rows"
    is_derived: ClassVar[bool] = True

    rank: int = 1
    alpha: float = 1.0
    scaling: ScalingRule = "rank"
    tokens: list[int] = field(default_factory=lambda: [0])
    tied: bool = False

    def __post_init__(self) -> None:
        for token in self.tokens:
            check_integer("tokens", token, least=0)
        if not self.tokens or list(self.tokens) != sorted(set(self.tokens)):
            raise ValueError(f"`tokens` must be rising ids of tokens, got {self.tokens!r:.200}.")
        check_flag("tied", self.tied)
        object.__setattr__(self, "rank", len(self.tokens))
        super().__post_init__()

    @override
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> TokenRows:
        self.check_shape(shape, "the matrix")
        return TokenRows(shape, RowTable(self.tokens, shape.in_features, tied=self.tied, device=device))

    @override
    def check_shape(self, shape: MatrixShape, name: str) -> None:
        if self.tokens[-1] >= shape.out_features:
            raise ValueError(
                f"`tokens_to_train` has the token {self.tokens[-1]}, and {name} has {shape.out_features} rows. If the "
                "token is new, call `model.resize_token_embeddings(len(tokenizer))` before the adapters are injected."
            )

    @override
    def count_parameters(self, shape: MatrixShape) -> int:
        """Count the trainable parameters of one embedding: ``k · D``; tied ones have them together."""
        return len(self.tokens) * shape.in_features
