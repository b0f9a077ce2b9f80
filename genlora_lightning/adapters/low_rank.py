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
def singular_values_of_many(A: Tensor, B: Tensor) -> Tensor:
    """Compute the singular values of many products at once: faster than :func:`singular_values`, and less exact.

    They are the roots of the eigenvalues of ``G_B^½ G_A G_B^½`` with the Gram matrices ``G_A = A Aᵀ``, ``G_B = Bᵀ B``,
    which are formed in float64 where A and B lie, and decomposed on the CPU. What is below about 1e-7 of a product's
    largest value is rounding.

    Args:
        A: ``(N, R, I)``.
        B: ``(N, R, O)``: transposed, as factors are made.

    Returns:
        ``(N, R)`` values in descending order, float64, on the CPU; all NaN for a product with values that are not
        finite.
    """
    gram_a, gram_b = ((one @ one.mT).cpu() for one in (A.double(), B.double()))
    finite = (gram_a.isfinite() & gram_b.isfinite()).all(dim=-1).all(dim=-1)
    gram_a, gram_b = (torch.where(finite[:, None, None], gram, 0.0) for gram in (gram_a, gram_b))
    weights, vectors = torch.linalg.eigh(gram_b)
    root = weights.clamp_min(0).sqrt()[..., None] * vectors.mT
    squares = torch.linalg.eigvalsh(root @ gram_a @ root.mT).clamp_min(0)
    return torch.where(finite[:, None], squares.sqrt().flip(-1), torch.nan)


def entropy_rank(values: Tensor) -> Tensor:
    """Compute ``exp(−Σ p_i log p_i)``, ``p_i = σ_i / Σ σ``, of singular values ``(..., R)``; 0 where all are zero."""
    p = values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    found = torch.exp(-torch.special.xlogy(p, p).sum(dim=-1))
    return torch.where(values[..., 0] == 0, 0.0, found)


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
    return float(entropy_rank(values))


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
