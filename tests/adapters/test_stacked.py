from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genlora_lightning import CompacterConfig, GenLoRAConfig, LoRAConfig, PoLARConfig
from genlora_lightning.adapters.base import FactorPair, StackShape
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.adapters.stacked import StackedUpdate, make_stack

SHAPE = StackShape(3, 8, 12)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (GenLoRAConfig(rank=4), FactorPair),
        (LoRAConfig(rank=4), FactorPair),
        # What acts on its factors by their class, or is shared between them, is left as it is.
        (PoLARConfig(rank=4), StackedUpdate),
        (CompacterConfig(rank=4, num_products=2), StackedUpdate),
    ],
)
def test_parameters_are_stacked_where_factors_are_nothing_else(config, kind):
    update = make_stack(config, SHAPE)
    assert type(update) is kind
    assert update.delta_weight().shape == (3, 8, 12)
    assert not update.delta_weight().any()
    A, B = update.factors()
    assert (A.shape[-1], B.shape[-2]) == (12, 8)


EXPERTS = ["experts.down_proj"]
SHARED = {
    "genlora, generator": GenLoRAConfig(
        rank=4, learn_centers=True, target_parameters=EXPERTS, share_over_experts="generator"
    ),
    "genlora, a": GenLoRAConfig(rank=4, learn_widths=True, target_parameters=EXPERTS, share_over_experts="a"),
    "lora, a": LoRAConfig(rank=4, target_parameters=EXPERTS, share_over_experts="a"),
}
each_shared = pytest.mark.parametrize("config", SHARED.values(), ids=SHARED)


@each_shared
def test_what_experts_share_is_there_once_and_counted_once(config):
    update = make_stack(config, SHAPE)
    trained = {name: p for name, p in update.named_parameters() if p.requires_grad}
    assert config.count_all(SHAPE) == sum(p.numel() for p in trained.values())
    assert not update.delta_weight().any()
    alone = type(config).from_dict({**config.to_dict(), "share_over_experts": None})
    assert alone.count_all(SHAPE) == 3 * config.count_parameters(SHAPE) > config.count_all(SHAPE)
    own = {name for name, p in trained.items() if len(p) == 3}
    kind, what = config.kind, config.share_over_experts
    assert own == ({"B.matrix"} if kind == "lora" else {"B.latent"} | ({"A.latent"} if what == "generator" else set()))
    assert read_config(config.to_dict()).to_dict() == config.to_dict()
    assert "share_over_experts" not in alone.to_dict()


@each_shared
def test_new_values_are_drawn_for_what_is_shared_too(config):
    update = make_stack(config, SHAPE)
    before = {name: p.clone() for name, p in update.named_parameters()}
    for factor in (update.A, update.B):
        factor.reset_parameters()
    assert not update.delta_weight().any()
    changed = {name for name, p in update.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("A.") for name in changed)


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += 1
        return func(*args, **(kwargs or {}))


@each_shared
def test_shared_factors_are_made_with_no_more_operators(config):
    def operators(config) -> int:
        update = make_stack(config, SHAPE)
        with Count() as count:
            update.A(), update.B()
        return count.found

    alone = type(config).from_dict({**config.to_dict(), "share_over_experts": None})
    assert operators(config) <= operators(alone)


def test_sharing_is_refused_where_it_means_nothing():
    with pytest.raises(ValueError, match="no experts are adapted"):
        GenLoRAConfig(share_over_experts="generator")
    with pytest.raises(ValueError, match="must be one of 'a'"):
        LoRAConfig(share_over_experts="generator", target_parameters=EXPERTS)
    for kind in (PoLARConfig, CompacterConfig):
        with pytest.raises(TypeError, match=r"Unknown .* fields .'share_over_experts'"):
            kind(share_over_experts="a", target_parameters=EXPERTS)
