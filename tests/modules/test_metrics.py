from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from genlora_lightning.modules.metrics import Perplexity, WeightedMean


def test_mean_is_over_tokens_and_not_over_batches() -> None:
    mean, perplexity = WeightedMean(), Perplexity()
    for metric in (mean, perplexity):
        metric.update(torch.tensor(6.0), torch.tensor(2))
        metric.update(torch.tensor(1.0), torch.tensor(8))
        metric.update(torch.tensor(0.0), 0)
    assert float(mean.compute()) == pytest.approx(0.7)
    assert float(perplexity.compute()) == pytest.approx(math.exp(0.7))


def test_sums_stay_in_float32_when_the_module_is_cast() -> None:
    holder = nn.ModuleDict({"mean": WeightedMean()})
    holder.to(torch.bfloat16)
    metric = holder["mean"]
    for _ in range(600):
        metric.update(torch.tensor(1.0, dtype=torch.bfloat16), 1)
    assert float(metric.count) == 600
    metric.reset()
    assert metric.count.dtype == torch.float32


def test_nan_is_seen_in_the_mean() -> None:
    mean = WeightedMean()
    mean.update(torch.tensor(float("nan")), 3)
    assert math.isnan(float(mean.compute()))


def test_sums_can_be_added_to_after_a_run_under_inference_mode() -> None:
    metric = WeightedMean()
    with torch.inference_mode():
        metric.update(torch.tensor(1.0), 1)
    metric.update(torch.tensor(3.0), 1)
    assert float(metric.compute()) == 2.0
