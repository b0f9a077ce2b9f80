from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning import effective_ranks, inject_adapters
from genlora_lightning.adapters.low_rank import effective_rank, singular_values
from tests.conftest import perturb, small_config


def test_singular_values_of_the_factors_are_those_of_the_product():
    A, B = torch.randn(3, 12, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    torch.testing.assert_close(singular_values(A, B), torch.linalg.svdvals(B @ A)[:3])
    wide_A, wide_B = torch.randn(9, 5, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(singular_values(wide_A, wide_B)[:4], torch.linalg.svdvals(wide_B @ wide_A))


@pytest.mark.parametrize("kind", ["entropy", "stable"])
def test_effective_rank_of_equal_singular_values_is_their_number(kind):
    A, _ = torch.linalg.qr(torch.randn(12, 5))
    assert effective_rank(A.T, torch.eye(5), kind=kind) == pytest.approx(5, rel=1e-5)


def test_effective_rank_of_known_singular_values():
    A, B = torch.eye(2), torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(A, B) == pytest.approx(4 / 3**0.75, rel=1e-6)  # exp of the entropy of (3/4, 1/4)
    assert effective_rank(A, B, kind="stable") == pytest.approx(10 / 9, rel=1e-6)


def test_effective_rank_of_a_zero_update_is_zero():
    assert effective_rank(torch.randn(3, 8), torch.zeros(8, 3)) == 0.0


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="`kind` must be 'entropy' or 'stable', got 'trace'"):
        effective_rank(torch.eye(2), torch.eye(2), kind="trace")  # type: ignore[arg-type]


def test_effective_ranks_of_a_model_are_those_of_its_updates():
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    inject_adapters(model, small_config())
    assert effective_ranks(model) == {"0": 0.0, "1": 0.0}
    perturb(model)
    ranks = effective_ranks(model)
    values = torch.linalg.svdvals(model[0].delta_weight().detach().double())[:4]
    p = values / values.sum()
    assert ranks["0"] == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-4)
    with pytest.raises(ValueError, match="no adapters"):
        effective_ranks(nn.Linear(2, 2))
