"""Two baselines that PEFT does not have: orthonormal directions (PoLAR), and an elementwise sine of a low-rank product.

Shapes: R rank, I in_features, O out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PolarLinear(nn.Module):
    """PoLAR (arXiv 2506.03133): ``ΔW = s · U Θ Vᵀ`` with orthonormal columns in ``U (O, R)`` and ``V (I, R)``.

    Θ ``(R, R)`` is free and starts at zero. The paper lets a landing field pull U and V towards the Stiefel manifold;
    here they stay on it: their gradients are projected to its tangent space before AdamW sees them, and each step is
    followed by a retraction (to the polar factor, the nearest orthonormal matrix) when the factor is next used.
    ``s = √O``: then a step of Θ moves the outputs about as far as the same step of LoRA's B does.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base
        self.scaling = math.sqrt(base.out_features)
        self.U = nn.Parameter(_polar(torch.randn(base.out_features, rank, generator=generator)))
        self.V = nn.Parameter(_polar(torch.randn(base.in_features, rank, generator=generator)))
        self.theta = nn.Parameter(torch.zeros(rank, rank))
        for factor in (self.U, self.V):
            factor.register_post_accumulate_grad_hook(_project_gradient)

    @torch.no_grad()
    def retract(self) -> None:
        """Bring the directions back to the manifold."""
        for factor in (self.U, self.V):
            factor.copy_(_polar(factor))

    def delta_weight(self) -> Tensor:
        """ΔW ``(O, I)``."""
        self.retract()
        return self.scaling * self.U @ self.theta @ self.V.T

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus update."""
        self.retract()
        up = (self.scaling * self.U @ self.theta).to(x.dtype)
        return self.base_layer(x) + F.linear(F.linear(x, self.V.T.to(x.dtype)), up)


class SineLinear(nn.Module):
    """Sine-activated low rank (ICLR 2025): ``ΔW = (alpha / R) · sin(ω · B A) / ω``, elementwise on the product.

    The paper divides by a constant of its own; dividing by ω makes the slope at zero 1, so that a small update is
    LoRA's and LoRA's rates carry over. A is initialised as in LoRA, B is zero.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, omega: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base_layer = base
        self.omega = omega
        self.scaling = alpha / rank
        bound = 1 / math.sqrt(base.in_features)
        self.A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def delta_weight(self) -> Tensor:
        """ΔW ``(O, I)``."""
        return self.scaling / self.omega * torch.sin(self.omega * (self.B @ self.A))

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus update."""
        return self.base_layer(x) + F.linear(x, self.delta_weight().to(x.dtype))


def replace_linears(base: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what `make` makes of it in the place of every linear."""
    for name, module in list(base.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, make(module))


def _polar(matrix: Tensor) -> Tensor:
    """``X (XᵀX)^(−1/2)``, by the eigenvalues of the small matrix."""
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    return matrix @ (vectors * values.clamp_min(1e-12).rsqrt()) @ vectors.T


def _project_gradient(factor: Tensor) -> None:
    """Replace the gradient G at X by its tangent part ``G − X · sym(Xᵀ G)``."""
    assert factor.grad is not None
    product = factor.detach().T @ factor.grad
    factor.grad -= factor.detach() @ ((product + product.T) / 2)
