"""Define plain LoRA: two stored factors (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from genlora_lightning.adapters.base import Factor, FactorPair, MatrixShape, Role
from genlora_lightning.adapters.config import AdapterConfig, ScalingRule, explain_arguments


class StoredFactor(Factor):
    """A matrix ``M (rank, num_entries)`` that is a parameter.

    Args:
        num_entries: Length n of a row.
        rank: Number of rows.
        group: The optimizer group of it.
        zero_start: Start at zero, exactly; else uniform in ±1/√n, as PEFT's A does.
        device: Where the parameter is made.
        generator: Random number generator for the initial values.
    """

    is_stored: ClassVar[bool] = True
    ROWS_ALONG: ClassVar[Mapping[str, int]] = {"matrix": -2}

    def __init__(
        self,
        num_entries: int,
        *,
        rank: int,
        group: str,
        zero_start: bool = False,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rank, num_entries)
        self.roles = {"matrix": Role(group)}
        self.zero_start = zero_start
        # dtype named: Lightning builds models under a default dtype of bfloat16 with precision "bf16-true"
        self.matrix = nn.Parameter(torch.empty(rank, num_entries, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.matrix.is_meta:
            return
        if self.zero_start:
            self.matrix.zero_()
        else:
            bound = 1 / math.sqrt(self.num_entries)
            self.matrix.uniform_(-bound, bound, generator=generator)

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self.rank, self.num_entries

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        matrix = self.matrix if dtype is None else self.matrix.to(dtype)
        # Where FSDP1 shards the factor, it has put a view in the parameter's place, and frees it after this forward.
        return matrix.clone() if matrix is self.matrix and not isinstance(matrix, nn.Parameter) else matrix

    @override
    def extra_repr(self) -> str:
        return f"rank={self.rank}, num_entries={self.num_entries}"


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """Configure LoRA: ``ΔW = s · B · A`` with two stored matrices (arXiv 2106.09685).

    One adapted linear has ``rank · (in + out)`` parameters: A ``(rank, in)`` starts uniform in ±1/√in, B ``(out,
    rank)`` at zero. A trained adapter is PEFT's LoRA to the last bit (``export_lora``, ``import_lora``).

    LoRA+ (arXiv 2402.12354) is a matter of the optimizer: give the group ``lora_b`` a higher rate, such as
    ``OptimizerConfig(lr_factors={"lora_b": 16})``.

    Args:
        rank: Number of rows of A and columns of B; PEFT's ``r``.
        alpha: Numerator of the scaling ``s``; PEFT's ``lora_alpha``.
        scaling: ``"rank"``: ``s = alpha / rank``; ``"sqrt_rank"``: ``s = alpha / √rank``, which is rsLoRA (arXiv
            2312.03732).
        dropout: Probability of dropping an entry of the adapter's input while training.
        target_modules: Linear layers to adapt: ``"all-linear"`` (each but the output head), a list of module names or
            their last parts (``["q_proj", "v_proj"]``), or a regular expression that must match the whole module name.
        target_parameters: Parameters to adapt that hold a stack of matrices, such as a mixture's experts
            (``["experts.gate_up_proj"]``): names, their last parts, or regular expressions of either.
        exclude_modules: Names, or last parts of names, of linears not to adapt; all in a named module are left out.
        modules_to_train: Names, or last parts of names, of modules trained in full beside the adapters and saved
            with them, such as a classification head.
        tokens_to_train: Tokens whose rows of the input embedding, and of a head tied to it, are trained in full: ids,
            or strings that a text module's tokenizer looks up; or such lists by names of embeddings and linears.
        layers_to_transform: Numbers of the layers to adapt: the first number in a linear's name. All if ``None``.
        rank_pattern: Ranks other than ``rank``, by a name, its last part, or a regular expression of either; the first
            that matches counts.
        alpha_pattern: Likewise for ``alpha``.
        target_rows: Ranges of outputs ``[[start, end], …]`` to adapt of linears that are adapted in part, by names as
            in ``rank_pattern``: the queries and values of a fused projection.
        elastic: Ranks to train for, rising, the last of them ``rank``; each step draws one for each layer. Afterwards
            the adapter may be used at any of them, and cut to it (``genlora slice``).
        keep_zeros: Update the weights alone that are not 0 in the base, ``W + ΔW ⊙ (W ≠ 0)``: a pruned base stays as
            sparse when the adapter is merged.
        share_over_experts: What the experts of a stack (``target_parameters``) have together, each stack its own.
            ``None``: nothing; ``"a"``: A, so that each expert has a B of its own alone.

    Raises:
        ValueError: A value is out of its range; the message gives the field, the value, and what is allowed.
        TypeError: A value has the wrong type.
    """

    kind: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    can_be_elastic: ClassVar[bool] = True
    usual_rates: ClassVar[tuple[float, float] | None] = (1e-4, 2e-3)

    rank: int = 16
    alpha: float = 32.0
    scaling: ScalingRule = "rank"
    share_over_experts: Literal["a"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_shared(self.share_over_experts, ("a",))

    @property
    @override
    def shared_over_experts(self) -> tuple[Collection[str], Collection[str]]:
        return (("matrix",) if self.share_over_experts else (), ())

    @override
    def count_shared_over_experts(self, shape: MatrixShape) -> int:
        return self.rank * shape.in_features if self.share_over_experts else 0

    @override
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> FactorPair:
        def factor(num_entries: int, group: str, zero_start: bool) -> StoredFactor:
            return StoredFactor(
                num_entries, rank=self.rank, group=group, zero_start=zero_start, device=device, generator=generator
            )

        return FactorPair(
            factor(shape.in_features, "lora_a", False),
            factor(shape.out_features, "lora_b", True),
            self.scaling_factor,
        )

    @override
    def lora_settings(self) -> dict[str, Any]:
        return {"lora_alpha": self.alpha, "use_rslora": self.scaling == "sqrt_rank"}

    @override
    def count_parameters(self, shape: MatrixShape) -> int:
        """Count the trainable parameters of one adapted matrix: ``rank · (in + out)``."""
        return self.rank * sum(shape)
