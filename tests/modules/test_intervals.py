from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_f1_score

from genlora_lightning.modules.intervals import Scores, intervals, macro_f1, ratio


def means(values: torch.Tensor) -> Scores:
    return Scores(torch.stack([values, torch.ones_like(values)], 1), {"mean": ratio(0, 1)})


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1
    found = intervals(means(values), resamples=4000)[0]["mean"]
    error = 1.96 * values.std().item() / 20
    assert found.value == pytest.approx(values.mean().item())
    assert found.low == pytest.approx(found.value - error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + error, abs=0.1 * error)
    narrow = intervals(means(values), resamples=4000, confidence=0.5)[0]["mean"]
    assert found.low < narrow.low < narrow.high < found.high
    assert intervals(means(values), resamples=50) == intervals(means(values), resamples=50)


def test_a_difference_is_paired_example_by_example() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 100
    (own,), (apart,) = (part.values() for part in intervals(means(values + 0.5), means(values)))
    assert own.high - own.low > 10
    assert (apart.value, apart.low, apart.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="needs the same examples of both models, got 100 and 99"):
        intervals(means(values), means(values[:99]))


def test_macro_f1_is_that_of_torchmetrics_also_where_a_class_does_not_occur() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, true = (torch.randint(4, (50,), generator=generator) for _ in range(2))
    a, b = (torch.nn.functional.one_hot(x, 5).double() for x in (predicted, true))  # the fifth class is nowhere
    scores = Scores(torch.cat([a * b, a, b], 1), {"f1": macro_f1(0, 5)})
    expected = multiclass_f1_score(predicted, true, num_classes=5, average="macro").item()
    assert intervals(scores)[0]["f1"].value == pytest.approx(expected)


def test_a_metric_of_nothing_is_nan() -> None:
    scores = Scores(torch.zeros(5, 2), {"mean": ratio(0, 1)})
    assert math.isnan(intervals(scores)[0]["mean"].value)
