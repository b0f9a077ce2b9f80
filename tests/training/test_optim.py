from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from genlora_lightning.adapters.genlora.generator import RBFGenerator
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.training.optim import (
    OptimizerConfig,
    build_optimizer,
    build_scheduler,
    parameter_groups,
    schedule_factor,
)
from tests.conftest import small_config


class Classifier(nn.Module):
    """A body and a head whose names say nothing of adapters; one of them misleads."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Linear(8, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.latent(x)))


def adapted(**changes: object) -> Classifier:
    model = Classifier()
    inject_adapters(model, small_config(modules_to_train=["head"], **changes))
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0}, "`lr` must be finite and greater than 0, got 0"),
        ({"lr": float("nan")}, "`lr` must be finite"),
        ({"lr": "1e-3"}, "`lr` must be a number, got '1e-3' of type str. YAML reads"),
        ({"weight_decay": -0.1}, "`weight_decay` must be finite and at least 0"),
        ({"betas": (0.9, 1.0)}, r"`betas\[1\]` must be finite and at least 0 and less than 1, got 1.0"),
        ({"betas": 0.9}, "`betas` must be two numbers, got 0.9"),
        ({"eps": 0.0}, "`eps` must be"),
        ({"lr_factors": {"latents": -1}}, "`lr_factors.latents` must be finite and at least 0"),
        ({"schedule": "cosin"}, "`schedule` must be one of 'cosine', 'linear', 'constant', got 'cosin'"),
        ({"warmup_steps": -1}, "`warmup_steps` must be at least 0"),
        ({"warmup_steps": 0.1}, "`warmup_steps` must be an integer, got 0.1. For a share of the run"),
        ({"warmup_ratio": 1.0}, "`warmup_ratio` must be finite and at least 0 and less than 1"),
        ({"min_lr_ratio": 1.5}, "`min_lr_ratio` must be finite and at least 0 and at most 1"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, r"Give `warmup_steps` \(3\) or `warmup_ratio` \(0.1\), not both"),
    ],
)
def test_bad_value_is_refused_with_what_is_allowed(changes: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        OptimizerConfig(**changes)  # type: ignore[arg-type]


def test_config_survives_the_way_through_plain_values() -> None:
    config = OptimizerConfig(lr=1e-3, betas=(0.8, 0.95), schedule="linear", warmup_ratio=0.1)
    assert config.to_dict()["betas"] == [0.8, 0.95]
    assert OptimizerConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"Unknown OptimizerConfig fields \['rate'\]. The fields are \['lr',"):
        OptimizerConfig.from_dict({"rate": 1})


def test_groups_hold_each_trainable_parameter_once_by_its_role() -> None:
    model = adapted()
    config = OptimizerConfig(
        lr=0.1, weight_decay=0.5, lr_factors={"latents": 2.0, "rbf_weights": 3.0, "rbf_shapes": 3.0}, head_lr_factor=4.0
    )
    groups = {group["name"]: group for group in parameter_groups(model, config)}
    generators = [module for module in model.modules() if isinstance(module, RBFGenerator)]
    assert len(generators) == 4  # two linears; the one named `latent` is no latent

    expected = {
        "latents": [g.latent for g in generators],
        "rbf_weights": [g.weight for g in generators],
        "rbf_shapes": [p for g in generators for p in (g.centers, g.log_widths)],
        "head": [model.head[1].weight],
        "head_no_decay": [model.head[0].weight, model.head[0].bias, model.head[1].bias],
    }
    assert list(groups) == list(expected)
    for name, parameters in expected.items():
        assert {id(p) for p in groups[name]["params"]} == {id(p) for p in parameters}, name
        assert len(groups[name]["params"]) == len(parameters), name
    rates = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert rates == {
        "latents": (0.2, 0.5),
        "rbf_weights": (pytest.approx(0.3), 0.5),
        "rbf_shapes": (pytest.approx(0.3), 0.0),
        "head": (0.4, 0.5),
        "head_no_decay": (0.4, 0.0),
    }


def test_groups_keep_their_order_and_leave_out_what_is_frozen() -> None:
    model = adapted(learn_centers=False, learn_widths=False)
    first, second = (parameter_groups(model, OptimizerConfig()) for _ in range(2))
    assert [group["name"] for group in first] == ["latents", "rbf_weights", "head", "head_no_decay"]
    assert [id(p) for g in first for p in g["params"]] == [id(p) for g in second for p in g["params"]]


def test_parameter_of_a_generator_that_has_no_group_stops_the_run() -> None:
    model = adapted()
    generator = next(module for module in model.modules() if isinstance(module, RBFGenerator))
    generator.second_latent = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="gives no role to its parameter 'second_latent'"):
        parameter_groups(model, OptimizerConfig())


def test_model_without_anything_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="This Classifier has no trainable parameter, so there is nothing to optimize"):
        parameter_groups(Classifier().requires_grad_(False), OptimizerConfig())


def test_optimizer_is_fused_where_it_applies_and_not_where_it_is_forbidden() -> None:
    model = adapted()
    assert build_optimizer(model, OptimizerConfig()).defaults["fused"] is True
    assert build_optimizer(model, OptimizerConfig(), fused=False).defaults["fused"] is False
    meta = build_optimizer(nn.Linear(2, 2, device="meta"), OptimizerConfig())
    assert not meta.defaults["fused"]


def test_weight_decay_reaches_weights_but_not_widths() -> None:
    model = adapted()
    generator = next(module for module in model.modules() if isinstance(module, RBFGenerator))
    with torch.no_grad():
        generator.log_widths.fill_(1.0)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    before = generator.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(generator.weight.detach(), before * 0.95)
    assert torch.equal(generator.log_widths.detach(), torch.ones_like(before[0]))


def test_schedule_rises_falls_and_ends_at_its_floor() -> None:
    cosine = OptimizerConfig(schedule="cosine", warmup_steps=4, min_lr_ratio=0.1)
    factors = [schedule_factor(step, cosine, 24) for step in range(30)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[14] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factors[24:] == pytest.approx([0.1] * 6)
    assert all(later < earlier for earlier, later in pairwise(factors[4:25]))

    linear = OptimizerConfig(schedule="linear", warmup_ratio=0.2)
    assert [schedule_factor(step, linear, 10) for step in (0, 1, 2, 6, 9, 10)] == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 0.5, 0.125, 0.0]
    )
    constant = OptimizerConfig(schedule="constant", warmup_steps=1)
    assert not constant.needs_total_steps
    assert [schedule_factor(step, constant) for step in (0, 1, 1000)] == [0.5, 1.0, 1.0]


def test_scheduler_keeps_the_ratio_between_groups() -> None:
    config = OptimizerConfig(lr=0.1, lr_factors={"latents": 3.0}, schedule="linear")
    optimizer = build_optimizer(adapted(), config)
    scheduler = build_scheduler(optimizer, config, total_steps=4)
    rates = []
    for _ in range(4):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        scheduler.step()
    assert [rate["head"] for rate in rates] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert [rate["latents"] for rate in rates] == pytest.approx([0.3, 0.225, 0.15, 0.075])


@pytest.mark.parametrize("total_steps", [None, float("inf"), -1])
def test_schedule_that_needs_the_end_asks_for_it(total_steps: float | None) -> None:
    optimizer = build_optimizer(adapted(), OptimizerConfig())
    with pytest.raises(ValueError, match=r"`schedule: cosine` needs to know how many optimizer steps .* `max_steps`"):
        build_scheduler(optimizer, OptimizerConfig(), total_steps)
    with pytest.raises(ValueError, match=r"warmup_ratio 0.1 needs to know how many optimizer steps"):
        build_scheduler(optimizer, OptimizerConfig(schedule="constant", warmup_ratio=0.1), total_steps)
    build_scheduler(optimizer, OptimizerConfig(schedule="constant", warmup_steps=3), total_steps)


def test_warmup_longer_than_the_run_is_said() -> None:
    config = OptimizerConfig(warmup_steps=10)
    with pytest.warns(UserWarning, match="The warm-up of 10 steps does not end within the run's 5 optimizer steps"):
        build_scheduler(build_optimizer(adapted(), config), config, total_steps=5)
