"""Kinds that PEFT does not have: orthonormal directions, and an elementwise sine of a low-rank product.

Shapes: R rank, I in_features, O out_features, n entries of a factor's rows (I or O).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from genlora_lightning.adapters.base import FactorPair, MatrixShape, Role, WeightUpdate
from genlora_lightning.adapters.config import AdapterConfig, ScalingRule

from .factors import FormulaFactor


class Directions(FormulaFactor):
    """``M = Xᵀ`` with orthonormal columns in ``X (n, R)``, or ``M = s · (X Θ)ᵀ`` with a free Θ ``(R, R)``.

    X starts at random, Θ at zero. X's gradient is projected to the manifold's tangent space before the optimizer sees
    it, and each step is followed by a retraction (to the polar factor, the nearest orthonormal matrix) when the factor
    is next used.

    Args:
        num_entries: n.
        rank: R.
        mixed: s; ``None``: without Θ.
        device: Where the parameters are made.
        generator: Random number generator for the initial values.
    """

    def __init__(
        self,
        num_entries: int,
        rank: int,
        *,
        mixed: float | None = None,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(rank, num_entries)
        self.mixed = mixed
        self.roles = {"frame": Role("frame")}
        self.frame = nn.Parameter(torch.empty(num_entries, rank, dtype=torch.float32, device=device))
        self.frame.register_post_accumulate_grad_hook(_project_gradient)
        if mixed is not None:
            self.roles = {**self.roles, "theta": Role("core")}
            self.theta = nn.Parameter(torch.empty(rank, rank, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.is_meta:
            return
        self.frame.copy_(_polar(self.frame.normal_(generator=generator)))
        if self.mixed is not None:
            self.theta.zero_()

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self.num_entries, self.rank

    @override
    def matrix(self) -> Tensor:
        with torch.no_grad():
            self.frame.copy_(_polar(self.frame))
        return self.frame.T if self.mixed is None else (self.mixed * self.frame @ self.theta).T


@dataclass(frozen=True, kw_only=True)
class StiefelConfig(AdapterConfig):
    """``ΔW = alpha · √O · U Θ Vᵀ`` with orthonormal U ``(O, R)`` and V ``(I, R)``, by retraction after each step.

    PoLAR's form under another algorithm. With √O a step of Θ moves the outputs about as far as the same step of LoRA's
    B does; ``scaling`` decides nothing.
    """

    kind: ClassVar[str] = "stiefel"
    title: ClassVar[str] = "Stiefel retraction"

    rank: int = 2
    alpha: float = 1.0
    scaling: ScalingRule = "rank"

    @override
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> FactorPair:
        scale = self.alpha * math.sqrt(shape.out_features)
        U = Directions(shape.out_features, self.rank, mixed=scale, device=device, generator=generator)
        return FactorPair(Directions(shape.in_features, self.rank, device=device, generator=generator), U, 1.0)

    @override
    def count_parameters(self, shape: MatrixShape) -> int:
        return self.rank * (sum(shape) + self.rank)


class SineUpdate(WeightUpdate):
    """``ΔW = s · sin(ω · B A) / ω``, elementwise on the product of ``B (O, R)`` and ``A (R, I)``; B starts at zero."""

    ROLES: ClassVar[Mapping[str, Role]] = {"A": Role("a"), "B": Role("b")}

    def __init__(
        self,
        shape: MatrixShape,
        config: SineConfig,
        *,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(shape)
        self.omega = config.omega
        self.height = config.scaling_factor / config.omega
        self.A = nn.Parameter(torch.empty(config.rank, shape.in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.empty(shape.out_features, config.rank, dtype=torch.float32, device=device))
        self.reset_parameters(generator)

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if not self.is_meta:
            bound = 1 / math.sqrt(self.shape.in_features)
            self.A.uniform_(-bound, bound, generator=generator)
            self.B.zero_()

    @property
    @override
    def rank(self) -> int:
        return min(self.shape)  # an elementwise function leaves no rank as it was

    @override
    def delta_weight(self) -> Tensor:
        return self.height * torch.sin(self.omega * (self.B @ self.A))


@dataclass(frozen=True, kw_only=True)
class SineConfig(AdapterConfig):
    """Sine-activated low rank (ICLR 2025): ``ΔW = s · sin(ω · B A) / ω``, elementwise on the product.

    The paper divides by a constant of its own; dividing by ω makes the slope at zero 1, so that a small update is
    LoRA's and LoRA's rates carry over. A is initialised as in LoRA, B is zero.

    Args:
        omega: ω.
    """

    kind: ClassVar[str] = "sine"
    title: ClassVar[str] = "sine LoRA"

    rank: int = 2
    alpha: float = 4.0
    scaling: ScalingRule = "rank"
    omega: float = 200.0

    @override
    def make(
        self, shape: MatrixShape, *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> SineUpdate:
        return SineUpdate(shape, self, device=device, generator=generator)

    @override
    def count_parameters(self, shape: MatrixShape) -> int:
        return self.rank * sum(shape)


def _polar(matrix: Tensor) -> Tensor:
    """``X (XᵀX)^(−1/2)``, by the eigenvalues of the small matrix."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors * values.clamp_min(1e-12).rsqrt()) @ vectors.T


def _project_gradient(factor: Tensor) -> None:
    """Replace the gradient G at X by its tangent part ``G − X · sym(Xᵀ G)``."""
    assert factor.grad is not None
    product = factor.detach().T @ factor.grad
    factor.grad -= factor.detach() @ ((product + product.T) / 2)
