r"""Define an update that is a sum of Kronecker products, as Compacter's weights are (arXiv 2106.04647).

.. math:: \Delta W = s \sum_{i=1}^{P} C_i \otimes (s_i t_i) = s \sum_i (C_i \otimes s_i) (I_P \otimes t_i)

The second form is a product of two matrices of rank R = P²·K, as small as there is for matrices C of full rank.

Shapes: P number of products, which is the side of the matrices C; K inner rank; n entries of a factor's rows
(in_features for t, out_features for s).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from genlora_lightning.adapters.base import AdapterModule, Factor, FactorPair, MatrixShape, Role
from genlora_lightning.adapters.config import AdapterConfig, ScalingRule, explain_arguments
from genlora_lightning.fields import check_flag, check_integer

FACTORS, SHARED = "compacter_factors", "compacter_shared"


class KroneckerMatrices(AdapterModule):
    """The matrices C ``(P, P, P)`` on the left of the Kronecker products; they start normal, of variance 1/P.

    Args:
        num_products: P.
        shared: Whether all layers of a model have the same.
        device: Where the parameter is made.
        generator: Random number generator for the initial values.
    """

    ROLES: ClassVar[Mapping[str, Role]] = {"matrices": Role(SHARED)}

    def __init__(
        self,
        num_products: int,
        *,
        shared: bool,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if shared:
            self.tie_key = ("kronecker", num_products)
            self.must_be_whole = "all layers share the matrices of its Kronecker products"
        shape = (num_products,) * 3
        self.matrices = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if not self.matrices.is_meta:
            self.matrices.normal_(0.0, self.matrices.shape[0] ** -0.5, generator=generator)

    @override
    def forward(self) -> Tensor:
        """The matrices: as a forward, before which FSDP gathers them."""
        # Where FSDP1 shards them, a view stands in the parameter's place, and is freed after this forward.
        return self.matrices if isinstance(self.matrices, nn.Parameter) else self.matrices.clone()


class KroneckerFactor(Factor):
    """A matrix ``(P²·K, n)`` of the Kronecker products of small matrices with ``vectors (P, K, n/P)``.

    Args:
        num_entries: Length n of a row; P divides it.
        num_products: P.
        inner_rank: K.
        device: Where the parameter is made.
        generator: Random number generator for the initial values.
    """

    ROLES: ClassVar[Mapping[str, Role]] = {"vectors": Role(FACTORS)}

    def __init__(
        self,
        num_entries: int,
        *,
        num_products: int,
        inner_rank: int,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_products**2 * inner_rank, num_entries)
        self.num_products = num_products
        self.inner_rank = inner_rank
        self.vectors = nn.Parameter(torch.empty(self.first_shape, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self.num_products, self.inner_rank, self.num_entries // self.num_products

    @override
    def batch_key(self) -> Hashable:
        return self.first_shape

    @override
    def extra_repr(self) -> str:
        return f"num_products={self.num_products}, inner_rank={self.inner_rank}, num_entries={self.num_entries}"


class InputVectors(KroneckerFactor):
    r"""The matrix of all ``I ⊗ t_i``, which starts at zero: ``M[(i, b, k), (c, q)] = δ_bc t[i, k, q]``."""

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if not self.vectors.is_meta:
            self.vectors.zero_()

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        return _diagonal_blocks(self.vectors, dtype)

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        return _diagonal_blocks(torch.stack([factor.vectors for factor in factors]), dtype).unbind()


class OutputVectors(KroneckerFactor):
    """The transposed matrix of all ``C_i ⊗ s_i``: ``M[(i, b, k), (a, p)] = C[i, a, b] s[i, k, p]``.

    s starts as Compacter's does: uniform in ±√2·√(6/(n/P + K)).

    Args:
        matrices: C.
        sizes: Of :class:`KroneckerFactor`.
    """

    def __init__(self, num_entries: int, matrices: KroneckerMatrices, **sizes: Any) -> None:
        super().__init__(num_entries, **sizes)
        self.matrices = matrices

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if not self.vectors.is_meta:
            bound = math.sqrt(2.0) * math.sqrt(6.0 / (self.num_entries // self.num_products + self.inner_rank))
            self.vectors.uniform_(-bound, bound, generator=generator)

    @override
    def parts(self) -> tuple[Tensor, ...]:
        return *super().parts(), self.matrices.matrices

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        return _products(self.matrices(), self.vectors, dtype)

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        matrices: list[Tensor] = [factor.matrices.matrices for factor in factors]
        is_one = all(one is matrices[0] for one in matrices)
        left = matrices[0] if is_one else torch.stack(matrices)
        return _products(left, torch.stack([factor.vectors for factor in factors]), dtype).unbind()


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class CompacterConfig(AdapterConfig):
    """Configure an update by Kronecker products: ``ΔW = s · Σ_i C_i ⊗ (s_i t_i)``, with Compacter's (arXiv 2106.04647).

    With P products the matrices C_i ``(P, P)`` are the same in all layers, and s_i ``(out/P, K)`` and t_i ``(K, in/P)``
    the layer's own, with an inner rank ``K = rank / P²``. One adapted linear has ``K · (in + out)`` parameters, and all
    together P³ more. t starts at zero, so that ΔW does. The groups of parameters are ``compacter_factors`` (s, t) and
    ``compacter_shared`` (C).

    Compacter itself is a bottleneck with a nonlinearity behind the attention and feed-forward blocks, whose two
    matrices are made like this; such a bottleneck is no update of a weight, and can be neither merged nor exported.

    Args:
        rank: The rank of ΔW: a multiple of ``num_products²``.
        alpha: Numerator of the scaling ``s``. The defaults give 1, which is Compacter's.
        scaling: ``"rank"``: ``s = alpha / rank``; ``"sqrt_rank"``: ``s = alpha / √rank``.
        num_products: P, the number of Kronecker products and the side of their left matrices; it must divide the inputs
            and outputs of each adapted matrix.
        shared: Whether all layers have the same matrices C; else each has P³ parameters more of its own.
        dropout: Probability of dropping an entry of the adapter's input while training.
        target_modules: Linear layers to adapt: ``"all-linear"`` (each but the output head), a list of module names or
            their last parts (``["q_proj", "v_proj"]``), or a regular expression that must match the whole module name.
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
        keep_zeros: Update the weights alone that are not 0 in the base, ``W + ΔW ⊙ (W ≠ 0)``: a pruned base stays as
            sparse when the adapter is merged.

    Raises:
        ValueError: A value is out of its range; the message gives the field, the value, and what is allowed.
        TypeError: A value has the wrong type.
    """

    kind: ClassVar[str] = "compacter"
    title: ClassVar[str] = "Compacter"

    rank: int = 16
    alpha: float = 16.0
    scaling: ScalingRule = "rank"
    num_products: int = 4
    shared: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_products", self.num_products, least=1)
        check_flag("shared", self.shared)
        for name, rank in {
            "rank": self.rank,
            **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()},
        }.items():
            if rank % self.rank_unit:
                raise ValueError(
                    f"`{name}` is {rank}, and {self.num_products} Kronecker products (`num_products`) make ranks that "
                    f"are multiples of {self.num_products}² = {self.rank_unit}: give {self.rank_unit}, "
                    f"{2 * self.rank_unit}, …, or fewer products."
                )

    @property
    @override
    def rank_unit(self) -> int:
        return self.num_products**2

    @override
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> FactorPair:
        self.check_shape(shape, "the matrix")
        where: dict[str, Any] = {"device": device, "generator": generator}
        sizes = {"num_products": self.num_products, "inner_rank": self.rank // self.rank_unit, **where}
        matrices = KroneckerMatrices(self.num_products, shared=self.shared, **where)
        return FactorPair(
            InputVectors(shape.in_features, **sizes),
            OutputVectors(shape.out_features, matrices, **sizes),
            self.scaling_factor,
        )

    @override
    def check_shape(self, shape: MatrixShape, name: str) -> None:
        if shape.out_features % self.num_products or shape.in_features % self.num_products:
            both = math.gcd(*shape)
            allowed = [str(number) for number in range(2, min(both, 16) + 1) if both % number == 0]
            lower = f"Set `num_products` to {' or '.join(allowed)}, or" if allowed else "No other number does:"
            raise ValueError(
                f"`num_products` is {self.num_products}, which does not divide both the {shape.out_features} outputs "
                f"and the {shape.in_features} inputs of {name}. {lower} add {name!r} to `exclude_modules`."
            )

    @override
    def count_parameters(self, shape: MatrixShape) -> int:
        """Count the trainable parameters of one adapted matrix: ``K · (in + out)``, and P³ if C is not shared."""
        own = 0 if self.shared else self.num_products**3
        return self.rank // self.rank_unit * sum(shape) + own

    @override
    def count_shared(self) -> int:
        """Count the trainable parameters that all matrices have together: P³, or 0 if C is not shared."""
        return self.num_products**3 if self.shared else 0


def _diagonal_blocks(vectors: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``(…, P, K, q)`` to ``(…, P·P·K, P·q)``: each vector once in each block of columns. No matrix product."""
    *outer, products, inner, width = vectors.shape
    eye = torch.eye(products, dtype=vectors.dtype, device=vectors.device)
    made = vectors[..., None, :, None, :] * eye[:, None, :, None]  # (…, i, b, k, c, q)
    made = made.reshape(*outer, products**2 * inner, products * width)
    return made if dtype is None else made.to(dtype)


def _products(matrices: Tensor, vectors: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``C (…, P, P, P)`` and ``(…, P, K, p)`` to ``(…, P·P·K, P·p)``. No matrix product."""
    *outer, products, inner, width = vectors.shape
    made = matrices.mT[..., :, :, None, :, None] * vectors[..., None, :, None, :]  # (…, i, b, k, a, p)
    made = made.reshape(*outer, products**2 * inner, products * width)
    return made if dtype is None else made.to(dtype)
