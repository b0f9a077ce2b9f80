from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from genlora_lightning import GenLoRAConfig, LoRAConfig, inject_adapters
from genlora_lightning.injection.inject import adapter_parameters
from genlora_lightning.training.checks import warn_of_low_rates


def adapted(config) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
    inject_adapters(model, config)
    return model


@pytest.mark.parametrize(
    ("config", "low", "good"), [(GenLoRAConfig(rank=4), 1e-4, 2e-3), (LoRAConfig(rank=4), 2e-5, 2e-4)]
)
def test_rate_for_a_whole_model_is_a_warning_that_names_the_usual_ones(config, low, good):
    model = adapted(config)
    with pytest.warns(UserWarning, match=rf"a rate of {low:g}\. .*{config.title} mostly learns at .* with Adam"):
        warn_of_low_rates([torch.optim.AdamW(model.parameters(), lr=low)], model)
    warm = torch.optim.AdamW(model.parameters(), lr=good)
    torch.optim.lr_scheduler.LinearLR(warm, start_factor=1e-3)  # now far below its rate
    own = [*adapter_parameters(model).values()]
    kept = {id(p) for p in own}
    others = [p for p in model.parameters() if id(p) not in kept]
    by_parts = torch.optim.AdamW([{"params": own, "lr": good}, {"params": others, "lr": low}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_low_rates([torch.optim.AdamW(model.parameters(), lr=good)], model)
        warn_of_low_rates([warm], model)
        warn_of_low_rates([by_parts], model)
        warn_of_low_rates([torch.optim.SGD(model.parameters(), lr=low)], model)
        warn_of_low_rates([torch.optim.AdamW(others, lr=low)], model)
