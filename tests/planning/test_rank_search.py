"""A search finds the layers that need rank, and keeps to the budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning import GenLoRAConfig, LoRAConfig, inject_adapters
from genlora_lightning.injection.elastic import set_active_rank
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.planning.rank_search import search_ranks

CONFIGS = [LoRAConfig(rank=8, elastic=[1, 2, 4, 8]), GenLoRAConfig(rank=8, num_groups_b=2, elastic=[1, 2, 4, 8])]


def model_of(config: LoRAConfig | GenLoRAConfig) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    inject_adapters(model, config)
    return model


def ranks(model: nn.Module) -> list[int]:
    return [layer.active_config.rank for layer in adapter_layers(model).values()]


@pytest.mark.parametrize("config", CONFIGS, ids=["lora", "genlora"])
def test_search_moves_rank_to_the_layer_that_needs_it(config):
    model = model_of(config)
    layers = [*adapter_layers(model).values()]
    budget = sum(layer.config.of_first_rows(2).count_parameters(layer.shape) for layer in layers)
    seen = []

    def loss() -> float:
        own = ranks(model)
        assert sum(layer.active_config.count_parameters(layer.shape) for layer in layers) <= budget
        seen.append(own)
        return float(-own[2] - 0.01 * sum(own))  # only the third matters

    found = search_ranks(model, loss, budget=budget, evaluations=60)
    assert seen[0] == [2, 2, 2, 2]  # the middle
    assert len(seen) <= 60
    assert len({tuple(one) for one in seen}) == len(seen)
    assert ranks(model) == [8] * 4
    set_active_rank(model, found)
    assert ranks(model)[2] == max(one[2] for one in seen) > 2
    assert -ranks(model)[2] - 0.01 * sum(ranks(model)) == min(-one[2] - 0.01 * sum(one) for one in seen)


def test_groups_have_one_rank_and_others_stay_in_the_middle():
    model = model_of(CONFIGS[0])
    found = search_ranks(model, lambda: float(-sum(ranks(model))), budget=10**6, groups=[["0", "1"], ["3"]])
    assert found == {"^0": 8, "^1": 8, "^2": 2, "^3": 8}


def test_budget_below_the_lowest_ranks_and_names_that_are_none_are_errors():
    model = model_of(CONFIGS[0])
    with pytest.raises(ValueError, match=r"At the lowest ranks there are 64 parameters, more than 63\."):
        search_ranks(model, lambda: 0.0, budget=63)
    with pytest.raises(ValueError, match=r"'7' is no elastic layer of the model\. They are 0, 1, 2, 3"):
        search_ranks(model, lambda: 0.0, budget=640, groups=[["7"]])
    with pytest.raises(ValueError, match="nothing to search: the model's adapters were not made with `elastic`"):
        search_ranks(model_of(LoRAConfig(rank=8)), lambda: 0.0, budget=640)

    def fails() -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        search_ranks(model, fails, budget=640)
    assert ranks(model) == [8] * 4
