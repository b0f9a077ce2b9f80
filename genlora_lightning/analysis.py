"""Analysis: the effective rank that the generated updates reach.

Shapes: R rank, I in_features, O out_features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from genlora_lightning.injection import require_adapters

RankKind = Literal["entropy", "stable"]


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Singular values of ``B @ A`` from its factors, without forming the product.

    With ``B = Q_B R_B`` and ``Aᵀ = Q_A R_A`` they are those of the small matrix ``R_B R_Aᵀ``.

    Args:
        A: ``(R, I)``.
        B: ``(O, R)``.

    Returns:
        ``(min(R, I, O))`` values in descending order, computed in float64.
    """
    r_b = torch.linalg.qr(B.double(), mode="r").R
    r_a = torch.linalg.qr(A.double().T, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values


@torch.no_grad()
def effective_rank(A: Tensor, B: Tensor, kind: RankKind = "entropy") -> float:
    """Effective rank of ``B @ A``.

    ``"entropy"`` (Roy & Vetterli 2007): ``exp(−Σ p_i log p_i)``, ``p_i = σ_i / Σ σ``: 1 for a rank-1 matrix, n for n
    equal singular values. ``"stable"``: ``Σ σ_i² / σ_1²``.

    Args:
        A: ``(R, I)``.
        B: ``(O, R)``.
        kind: Which of the two.

    Returns:
        The effective rank; 0.0 for a product that is zero, such as a new adapter's.
    """
    values = singular_values(A, B)
    if not values.numel() or values[0] <= 0:
        return 0.0
    if kind == "stable":
        return float(values.square().sum() / values[0].square())
    if kind != "entropy":
        raise ValueError(f"`kind` must be 'entropy' or 'stable', got {kind!r}.")
    p = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


@torch.no_grad()
def effective_ranks(model: nn.Module, kind: RankKind = "entropy") -> dict[str, float]:
    """Effective rank of the update of each adapted linear, by module name.

    Raises:
        ValueError: The model has no adapters.
    """
    return {name: effective_rank(*layer.factors(), kind=kind) for name, layer in require_adapters(model).items()}
