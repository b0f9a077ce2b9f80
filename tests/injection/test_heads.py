"""Output heads, found by where they stand and by their values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning import inject_adapters
from genlora_lightning.injection.heads import NEW_HEAD, NEW_LINEAR, is_new
from tests.conftest import small_config
from tests.models import tiny_bert


class Classifier(nn.Module):
    """A body with a head, as a user would write it."""

    def __init__(self, body: nn.Module, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(16, classes)


def trained_body() -> nn.Module:
    body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return body


@pytest.mark.parametrize("classes", [10, 4, 1])
@pytest.mark.parametrize(("make", "reason"), [(trained_body, NEW_LINEAR), (lambda: tiny_bert().bert, NEW_HEAD)])
def test_new_head_of_an_own_module_is_left_alone_and_the_summary_says_what_to_do(classes, make, reason):
    model = Classifier(make(), classes)
    config = small_config(num_groups=8)
    report = inject_adapters(model, config)
    assert report.skipped == {"head": reason}
    assert f"Left alone: head ({reason})" in report.summary()
    assert "name it in `modules_to_train`" in reason
    assert not model.head.weight.requires_grad
    trained = Classifier(make(), classes)
    report = inject_adapters(trained, small_config(modules_to_train=["head"]))
    assert [row.module for row in report.trained] == ["head"]
    by_name = inject_adapters(Classifier(make(), classes), small_config(target_modules=["head"], num_groups=1))
    assert [row.module for row in by_name.adapted] == ["head"]


def test_linear_that_may_be_a_head_is_adapted_and_named_where_nothing_was_trained():
    model = Classifier(nn.Sequential(nn.Linear(16, 16)), 10)
    report = inject_adapters(model, small_config())
    assert [row.module for row in report.adapted] == ["body.0", "head"]
    message = "The last linear, head, is adapted and has the values it was made with: if it is a new head, name it in"
    assert message in report.summary()
    assert message in inject_adapters(model, small_config()).summary()
    with pytest.raises(ValueError, match=r"head has only 4 outputs .* If it is a new head, name it in `modules_to"):
        inject_adapters(Classifier(nn.Linear(16, 16), 4), small_config(num_groups=8))


def test_trained_head_is_adapted_without_a_word():
    model = Classifier(trained_body(), 10)
    with torch.no_grad():
        model.head.weight.add_(0.1 * torch.randn_like(model.head.weight))
    report = inject_adapters(model, small_config())
    assert len(report.adapted) == 3
    assert "modules_to_train" not in report.summary()


@pytest.mark.parametrize("zeroed", [nn.Linear(16, 16), nn.Linear(16, 10)])
def test_weights_that_are_all_equal_do_not_make_the_others_new(zeroed):
    nn.init.zeros_(zeroed.weight)
    model = nn.Sequential(nn.Linear(16, 16), zeroed, nn.Linear(zeroed.out_features, 16))
    assert len(inject_adapters(model, small_config()).adapted) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 4), (10, 32), (600, 300)])
def test_weight_is_new_as_long_as_nothing_was_added(shape, dtype):
    linear = nn.Linear(shape[1], shape[0]).to(dtype)
    assert is_new(linear.weight)
    if linear.weight.numel() > 100:
        assert not is_new(linear.weight * 1.2)
        assert not is_new(linear.weight * 0.8)
        assert not is_new(torch.randn(shape, dtype=dtype) * 0.02)
    assert is_new(nn.Conv2d(3, 8, 3).weight)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(8, 8), torch.zeros(8, 8, device="meta"), torch.zeros(8, 8, dtype=torch.int8), torch.zeros(8), None],
)
def test_what_says_nothing_is_not_new(weight):
    assert not is_new(weight)
