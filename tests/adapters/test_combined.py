from __future__ import annotations

import pytest
import torch

from genlora_lightning.adapters.base import FactorPair, MatrixShape, WeightUpdate
from genlora_lightning.adapters.combined import ConcatenatedFactor, combine_updates
from genlora_lightning.adapters.lora import LoRAConfig
from tests.conftest import small_config

SHAPE = MatrixShape(6, 5)
CONFIGS = (small_config(rank=2), LoRAConfig(rank=3), small_config(rank=4, alpha=2.0))


def random_update(config) -> WeightUpdate:
    update = config.make(SHAPE).double()
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.add_(torch.randn_like(parameter))
    return update


class Half(WeightUpdate):
    """ΔW that is no product: half of another one's."""

    def __init__(self, inner: WeightUpdate) -> None:
        super().__init__(inner.shape)
        self.inner = inner

    rank = 3

    def delta_weight(self) -> torch.Tensor:
        return self.inner.delta_weight() / 2


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -2.0, 3.0)])
@pytest.mark.parametrize("is_product", [True, False])
def test_combined_update_is_the_weighted_sum(weights, is_product):
    updates = [random_update(config) for config in CONFIGS]
    if not is_product:
        updates[1] = Half(updates[1])
    combined = combine_updates(updates, weights)
    expected = sum(weight * update.delta_weight() for weight, update in zip(weights, updates, strict=True))
    assert torch.allclose(combined.delta_weight(), expected, rtol=0, atol=1e-12)
    assert isinstance(combined, FactorPair) == is_product
    A, B = combined.factors()
    assert torch.allclose(combined.scaling * B @ A, expected, rtol=0, atol=1e-10)
    given = torch.autograd.grad(combined.delta_weight().sin().sum(), [p for u in updates for p in u.parameters()])
    wanted = torch.autograd.grad(expected.sin().sum(), [p for u in updates for p in u.parameters()])
    for one, other in zip(given, wanted, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_equal_scalings_are_not_multiplied_into_b():
    updates = [random_update(LoRAConfig(rank=2)) for _ in range(2)]
    combined = combine_updates(updates, (1.0, 1.0))
    assert combined.scaling == updates[0].scaling
    assert torch.equal(combined.B(), torch.cat([update.B() for update in updates]))


def test_concatenated_factors_of_many_layers_are_made_by_kind_at_once(monkeypatch):
    from genlora_lightning.adapters.genlora import generator

    def factor() -> ConcatenatedFactor:
        return ConcatenatedFactor([random_update(config).A for config in CONFIGS], (1.0, 2.0, -1.0))

    factors = [factor() for _ in range(5)]
    assert len({factor.batch_key() for factor in factors}) == 1
    expected = [factor() for factor in factors]
    calls = []
    original = generator.generate_matrices
    monkeypatch.setattr(generator, "generate_matrices", lambda *a, **k: calls.append(a) or original(*a, **k))
    made = ConcatenatedFactor.make_many(factors, dtype=torch.float32)
    assert len(calls) == 2  # two of the three are generated
    for one, other in zip(made, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other.float(), rtol=1e-6, atol=1e-6)
