r"""Define PoLAR: two matrices with orthonormal columns and a small one between them (Lion et al., arXiv 2506.03133).

Shapes: R rank, n entries of a direction (in_features for Y, out_features for X). The columns of the paper's matrices
are rows here, as all factors are (rank, n).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from genlora_lightning.adapters.base import FactorPair, MatrixShape, Role
from genlora_lightning.adapters.config import AdapterConfig, ScalingRule, explain_arguments
from genlora_lightning.adapters.lora import StoredFactor
from genlora_lightning.fields import check_number

DIRECTIONS, CORE = "polar_directions", "polar_core"
#: Name of the figure ``‖XᵀX − I‖``.
ORTHOGONALITY = "orthogonality_gap"


def landing_field(matrix: Tensor, gradient: Tensor, landing: float | Tensor) -> Tensor:
    r"""Compute the landing field, which leads along matrices with orthonormal rows and back to them.

    .. math:: \Gamma(X) = (G X^\top - X G^\top) X + \lambda X (X^\top X - I)

    computed in O(n R²), without an n × n matrix, as ``G (XᵀX) − X (GᵀX) + λ X (XᵀX − I)``.

    Args:
        matrix: ``Xᵀ (…, R, n)``.
        gradient: ``Gᵀ (…, R, n)``.
        landing: λ.

    Returns:
        ``Γ(X)ᵀ (…, R, n)``.
    """
    gram = matrix @ matrix.mT
    return gram @ gradient + (landing * _minus_identity(gram) - matrix @ gradient.mT) @ matrix


class Directions(StoredFactor):
    """A matrix ``M (rank, num_entries)`` whose rows start orthonormal and are led back by the landing field.

    Args:
        num_entries: Length n of a row; at least ``rank``.
        rank: Number of rows.
        landing: λ of :func:`landing_field`.
        device: Where the parameter is made.
        generator: Random number generator for the initial values.
    """

    must_be_whole = "the landing field needs its matrices whole"

    def __init__(
        self,
        num_entries: int,
        *,
        rank: int,
        landing: float,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_entries, rank=rank, group=DIRECTIONS, device=device, generator=generator)
        # Weight decay would pull the rows away from the length that the landing field gives them.
        self.roles = {"matrix": Role(DIRECTIONS, decayed=False)}
        self.landing = landing

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.matrix.is_meta:
            return
        normal = torch.empty(self.num_entries, self.rank, dtype=torch.float64, device=self.matrix.device)
        q, r = torch.linalg.qr(normal.normal_(generator=generator))
        self.matrix.copy_((q * r.diagonal().sign()).T)  # with the signs they are uniformly distributed

    @classmethod
    @override
    def directions(cls, modules: Sequence[Self], name: str, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        if name != "matrix":
            return gradients
        landings = {module.landing for module in modules}
        landing = (
            torch.tensor([[[m.landing]] for m in modules]).to(gradients[0]) if len(landings) > 1 else max(landings)
        )
        matrices = torch.stack([module.matrix for module in modules])
        return landing_field(matrices, torch.stack([*gradients]), landing).unbind()

    @override
    def diagnostics(self) -> Mapping[str, Tensor]:
        return {ORTHOGONALITY: _minus_identity(self.matrix @ self.matrix.mT).norm()}


class ScaledDirections(Directions):
    """A matrix ``M = Θᵀ D (rank, num_entries)`` of directions D and a square matrix Θ, which starts at zero."""

    is_stored: ClassVar[bool] = False

    def __init__(
        self,
        num_entries: int,
        *,
        rank: int,
        landing: float,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(num_entries, rank=rank, landing=landing, device=device, generator=generator)
        self.roles = {**self.roles, "core": Role(CORE)}
        self.core = nn.Parameter(torch.zeros(rank, rank, dtype=torch.float32, device=device))

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        core = self._parameters.get("core")  # absent while the class above is made
        if core is not None and not core.is_meta:
            core.zero_()

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        return _scaled(self.core, self.matrix, dtype)

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        matrices, cores = zip(*(factor.parts() for factor in factors), strict=True)
        return _scaled(torch.stack(cores), torch.stack(matrices), dtype).unbind()


@explain_arguments
@dataclass(frozen=True, kw_only=True)
class PoLARConfig(AdapterConfig):
    """Configure PoLAR: ``ΔW = s · X Θ Yᵀ`` with directions X, Y and a small matrix Θ (arXiv 2506.03133).

    X ``(out, rank)`` and Y ``(in, rank)`` start with orthonormal columns, Θ ``(rank, rank)`` at zero. One adapted
    linear has ``rank · (in + out + rank)`` parameters. In each optimizer step the gradients G of X and Y are replaced
    by the landing field ``(G Xᵀ − X Gᵀ) X + λ X (XᵀX − I)``, after averaging and clipping, whatever the optimizer: the
    callback and ``build_optimizer`` see to it; in a loop of your own with another optimizer call
    ``genlora_lightning.adapters.steps.hook_steps(model, optimizer)`` once. The largest ``‖XᵀX − I‖`` is logged as
    ``orthogonality_gap``. The groups of parameters are ``polar_directions`` (X, Y; no weight decay) and ``polar_core``
    (Θ).

    Args:
        rank: Number of columns of X and Y; at most the smaller side of each adapted matrix.
        alpha: Numerator of the scaling ``s``.
        scaling: ``"rank"``: ``s = alpha / rank``; ``"sqrt_rank"``: ``s = alpha / √rank``.
        landing: λ, how strongly X and Y are led back to orthonormal columns. The authors trained language models with
            0.005, and DeBERTa on GLUE with 1.
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

    kind: ClassVar[str] = "polar"
    title: ClassVar[str] = "PoLAR"
    usual_rates: ClassVar[tuple[float, float] | None] = (4e-4, 4e-3)  # the authors'

    rank: int = 16
    alpha: float = 32.0
    scaling: ScalingRule = "rank"
    landing: float = 5e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("landing", self.landing, least=0.0)

    @override
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> FactorPair:
        self.check_shape(shape, "the matrix")
        same: dict[str, Any] = {"rank": self.rank, "landing": self.landing, "device": device, "generator": generator}
        return FactorPair(
            Directions(shape.in_features, **same),
            ScaledDirections(shape.out_features, **same),
            self.scaling_factor,
        )

    @override
    def check_shape(self, shape: MatrixShape, name: str) -> None:
        if self.rank > min(shape):
            raise ValueError(
                f"`rank` is {self.rank}, but {name} has {shape.out_features} outputs and {shape.in_features} inputs: "
                f"no more than {min(shape)} directions can be orthonormal. Lower `rank` to {min(shape)}, give it a "
                "rank of its own in `rank_pattern`, or name it in `exclude_modules`."
            )

    @override
    def count_parameters(self, shape: MatrixShape) -> int:
        """Count the trainable parameters of one adapted matrix: ``rank · (in + out + rank)``."""
        return self.rank * (sum(shape) + self.rank)


def _scaled(core: Tensor, matrix: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast(matrix.device.type, enabled=False):
        made: Tensor = core.mT @ matrix
    return made if dtype is None else made.to(dtype)


def _minus_identity(gram: Tensor) -> Tensor:
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
