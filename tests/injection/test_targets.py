from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning import inject_adapters
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.targets import STACK, match_modules
from tests.conftest import small_config


def model() -> nn.Module:
    return nn.ModuleDict(
        {"q_proj": nn.Linear(2, 2), "my_q_proj": nn.Linear(2, 2), "a": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})}
    )


def test_a_name_matches_whole_or_after_a_dot_never_inside_a_part():
    assert list(match_modules(model(), ["q_proj"], "exclude_modules")) == ["q_proj", "a.q_proj"]
    assert list(match_modules(model(), ["a.q_proj"], "exclude_modules")) == ["a.q_proj"]


def test_no_patterns_match_nothing():
    assert match_modules(model(), [], "exclude_modules") == {}


def test_a_pattern_without_a_match_is_an_error_with_the_names_that_are_near():
    with pytest.raises(
        ValueError, match=r"`exclude_modules` names 'q_prj', which no module matches. Near matches: q_p"
    ):
        match_modules(model(), ["a", "q_prj"], "exclude_modules")


def test_a_shared_module_matches_by_each_of_its_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "o": nn.Linear(4, 4)})
    assert list(match_modules(model, ["b"], "modules_to_train")) == ["a"]
    inject_adapters(model, small_config(target_modules=["b"]))
    assert list(adapter_layers(model)) == ["a"]
    by_expression = nn.ModuleDict({"a": (twin := nn.Linear(4, 4)), "b": twin, "o": nn.Linear(4, 4)})
    inject_adapters(by_expression, small_config(target_modules="b|o"))
    assert list(adapter_layers(by_expression)) == ["a", "o"]


def test_a_parameter_named_as_a_module_is_an_error_that_says_so():
    model = nn.Module()
    model.scale, model.linear = nn.Parameter(torch.ones(1)), nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"names 'scale', which is a parameter. Name the module"):
        inject_adapters(model, small_config(modules_to_train=["scale"]))


def test_experts_in_one_parameter_are_reported_as_left_alone():
    model = nn.ModuleDict({"router": nn.Linear(4, 4), "experts": nn.Module(), "conv": nn.Conv2d(3, 4, 3)})
    model["experts"].gate = nn.Parameter(torch.zeros(3, 4, 4))
    report = inject_adapters(model, small_config())
    assert report.skipped == {"experts": STACK}
    assert "Left alone: experts (several matrices" in report.summary()


def test_names_are_listed_where_all_of_them_are_numbers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    for field in ("modules_to_train", "target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=r"names 'head', which no (module|linear) matches. There are: 0, (1, )?2"):
            inject_adapters(model, small_config(**{field: ["head"]}))
