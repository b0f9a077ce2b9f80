"""Effective ranks of dense updates: the package computes them from factors, which not every method here has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

MOST_LINEARS = 36  # of a larger model every n-th linear is measured


def effective_ranks(delta: Tensor) -> tuple[float, float]:
    """Entropy and stable effective rank of a matrix; zeros for the zero matrix.

    The singular values come from the smaller Gram matrix in float64: those below 1e-8 of the largest are noise, which
    moves neither figure.
    """
    delta = delta.double()
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if values[-1] <= 0:
        return 0.0, 0.0
    values = values[values > 1e-7 * values[-1]]
    p = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum())), float(values.square().sum() / values[-1].square())


def mean_ranks(deltas: Iterable[tuple[str, Tensor]]) -> tuple[float, float]:
    """Entropy and stable rank, averaged over the linears."""
    pairs = list(deltas)
    if not pairs:
        return 0.0, 0.0
    chosen = pairs[:: -(-len(pairs) // MOST_LINEARS)]
    ranks = [effective_ranks(delta) for _, delta in chosen]
    return sum(entropy for entropy, _ in ranks) / len(ranks), sum(stable for _, stable in ranks) / len(ranks)
