"""Measure and cut low-rank products from their factors: singular values, effective rank, best approximation.

Shapes: R rank, I in_features, O out_features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

RankKind = Literal["entropy", "stable"]


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of ``B @ A`` from its factors, without forming the product.

    With ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` they are those of the small matrix ``R_B R_Aᵀ``.

    Args:
        A: ``(..., R, I)``.
        B: ``(..., O, R)``.

    Returns:
        ``(..., min(R, I, O))`` values in descending order, computed in float64.
    """
    r_b = torch.linalg.qr(B.double(), mode="r").R
    r_a = torch.linalg.qr(A.double().mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.mT)
    return values


@torch.no_grad()
def effective_rank(A: Tensor, B: Tensor, kind: RankKind = "entropy") -> float:
    """Effective rank of ``B @ A``.

    ``"entropy"`` (Roy & Vetterli 2007): ``exp(−Σ p_i log p_i)``, ``p_i = σ_i / Σ σ``: 1 for a rank-1 matrix, n for n
    equal singular values. ``"stable"``: ``Σ σ_i² / σ_1²``.

    Args:
        A: ``(R, I)``, or those of a stack of matrices.
        B: ``(O, R)``.
        kind: Which of the two.

    Returns:
        The effective rank; 0.0 for a product that is zero, such as a new adapter's. Of a stack the mean.
    """
    values = singular_values(A, B)
    ranks = [_effective_rank(own, kind) for own in values.reshape(-1, values.shape[-1])]
    return sum(ranks) / len(ranks)


def _effective_rank(values: Tensor, kind: RankKind) -> float:
    if not values.numel() or values[0] <= 0:
        return 0.0
    if kind == "stable":
        return float(values.square().sum() / values[0].square())
    if kind != "entropy":
        raise ValueError(f"`kind` must be 'entropy' or 'stable', got {kind!r}.")
    p = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def truncate_factors(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Best approximation of ``B @ A`` of a lower rank, from the factors; the product is never formed.

    With ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` the singular values of ``B A`` are those of the small ``R_B R_Aᵀ``.
    Computed in float64.

    Args:
        A: ``(R, I)``, or those of a stack of matrices.
        B: ``(O, R)``.
        rank: r. Where ``B @ A`` has fewer singular values, the rest is zeros.

    Returns:
        A ``(r, I)`` and B ``(O, r)``, of equal norms, in the dtype of the arguments; and the share of ‖B A‖²_F that is
        kept, 1 for a product that is zero.
    """
    q_b, r_b = torch.linalg.qr(B.double())
    q_a, r_a = torch.linalg.qr(A.double().mT)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    total = float(s.square().sum())
    kept = float(s[..., :rank].square().sum())
    root = s[..., :rank].sqrt()
    low_b = (q_b @ u[..., :rank]) * root.unsqueeze(-2)
    low_a = root.unsqueeze(-1) * (vh[..., :rank, :] @ q_a.mT)
    missing = rank - root.shape[-1]
    if missing > 0:
        low_b = nn.functional.pad(low_b, (0, missing))
        low_a = nn.functional.pad(low_a, (0, 0, 0, missing))
    return low_a.to(A.dtype), low_b.to(B.dtype), kept / total if total > 0 else 1.0
