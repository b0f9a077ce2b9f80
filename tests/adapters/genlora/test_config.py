from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch

from genlora_lightning import GenLoRAConfig, LoRAConfig
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.layers.linear import AdaptedLinear


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"`rank` must be at least 1, got 0"),
        ({"rank": -3}, r"`rank` must be at least 1, got -3"),
        ({"num_latents_a": 0}, r"`num_latents_a` must be at least 1, got 0"),
        ({"num_latents_b": -1}, r"`num_latents_b` must be at least 1, got -1"),
        ({"num_groups_a": 0}, r"`num_groups_a` must be at least 1, got 0"),
        ({"num_groups_b": 0}, r"`num_groups_b` must be at least 1, got 0"),
        ({"num_centers": -1}, r"`num_centers` must be at least 1, got -1"),
        ({"weight_gain": 0.0}, r"`weight_gain` must be finite and greater than 0, got 0.0"),
        ({"alpha": 0.0}, r"`alpha` must be finite and not zero, got 0.0"),
        ({"alpha": float("nan")}, r"`alpha` must be finite"),
        ({"width": 0}, r"`width` must be finite and greater than 0, got 0"),
        ({"width": float("inf")}, r"`width` must be finite"),
        ({"dropout": 1.0}, r"`dropout` must be finite and at least 0 and less than 1, got 1.0"),
        ({"dropout": -0.1}, r"`dropout` must be finite and at least 0 and less than 1, got -0.1"),
        ({"kernel": "cubic"}, r"`kernel` must be one of 'gaussian', .*, got 'cubic'"),
        ({"init": "random"}, r"`init` must be one of 'zero_latent', 'zero_weight', got 'random'"),
        ({"scaling": "none"}, r"`scaling` must be one of 'sqrt_rank', 'rank', got 'none'"),
        ({"target_modules": ""}, r"`target_modules` is empty"),
        ({"target_modules": []}, r"`target_modules` is an empty list"),
        ({"target_modules": "q_proj("}, r"neither 'all-linear' nor a valid regular expression"),
        ({"target_modules": ["q", "v"], "exclude_modules": ["v"]}, r"\['v'\] stand both"),
    ],
)
def test_value_out_of_range_is_an_error_that_names_it(changes, message):
    with pytest.raises(ValueError, match=message):
        GenLoRAConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4.0}, r"`rank` must be an integer, got 4.0 of type float"),
        ({"rank": True}, r"`rank` must be an integer, got True"),
        ({"alpha": "2"}, r"`alpha` must be a number, got '2'"),
        ({"entry_signs": 1}, r"`entry_signs` must be true or false, got 1"),
        ({"weight_gain": "8"}, r"`weight_gain` must be a number, got '8'"),
        ({"learn_centers": 1}, r"`learn_centers` must be true or false, got 1"),
        ({"modules_to_train": "head"}, r"`modules_to_train` must be a list of module names, got 'head'"),
        ({"exclude_modules": [3]}, r"`exclude_modules` must hold non-empty module names, got 3"),
        ({"target_modules": 3}, r"`target_modules` must be a list"),
    ],
)
def test_value_of_wrong_type_is_an_error_that_names_it(changes, message):
    with pytest.raises(TypeError, match=message):
        GenLoRAConfig(**changes)


def test_dict_round_trip_goes_through_json_unchanged():
    config = GenLoRAConfig(rank=7, target_modules=["q", "v"], modules_to_train=["head"], kernel="inverse_quadratic")
    again = GenLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again == dataclasses.replace(config, weight_gain=config.gain)  # decided: a file's weights are divided by it


def test_a_configuration_cannot_be_changed_once_it_is_validated():
    config = GenLoRAConfig(rank=4)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'rank'"):
        config.rank = -3  # type: ignore[misc]
    with pytest.raises(ValueError, match="`rank` must be at least 1, got -3"):
        dataclasses.replace(config, rank=-3)
    assert dataclasses.replace(config, rank=8) == GenLoRAConfig(rank=8)


def test_no_two_configurations_share_a_list():
    names = ["q", "v"]
    config = GenLoRAConfig(target_modules=names, modules_to_train=names)
    other = dataclasses.replace(config, rank=3)
    names.append("k")
    config.target_modules.append("o")  # type: ignore[union-attr]
    assert config.modules_to_train == other.target_modules == other.modules_to_train == ["q", "v"]
    described = other.to_dict()
    described["modules_to_train"].append("k")
    assert other.modules_to_train == ["q", "v"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_copies_are_equal(copied):
    config = GenLoRAConfig(rank=3, target_modules=["q"], weight_gain=2.0)
    assert copied(config) == config


def test_unknown_field_is_an_error_that_lists_the_fields():
    with pytest.raises(
        ValueError, match=r"Unknown GenLoRAConfig fields \['r'\]. PEFT's `r` is `rank` here. The fields are \['rank'"
    ):
        GenLoRAConfig.from_dict({"r": 8})
    with pytest.raises(ValueError, match=r"\['num_groups'\]. `num_groups` is now `num_groups_a` and `num_groups_b`"):
        GenLoRAConfig.from_dict({"num_groups": 8})


@pytest.mark.parametrize("kind", [GenLoRAConfig, LoRAConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, r"fields \['r'\]. PEFT's `r` is `rank` here"),
        ({"lora_alpha": 8}, "PEFT's `lora_alpha` is `alpha` here"),
        ({"rnak": 8}, "Did you mean `rank`?.* The fields are"),
    ],
)
def test_unknown_argument_is_an_error_that_says_what_it_is_called(kind, fields, message):
    with pytest.raises(TypeError, match=message):
        kind(**fields)
    assert list(inspect.signature(kind).parameters) == [field.name for field in dataclasses.fields(kind)]


def test_scaling_factor_follows_the_rule():
    assert GenLoRAConfig(rank=16, alpha=2.0).scaling_factor == 0.5
    assert GenLoRAConfig(rank=16, alpha=2.0, scaling="rank").scaling_factor == 0.125


@pytest.mark.parametrize("learn", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize(
    ("rank", "latents", "groups", "centers"), [(16, (1, 1), (8, 8), 1), (3, (1, 2), (2, 5), 4), (1, (3, 1), (1, 1), 1)]
)
def test_counted_parameters_are_those_that_train(learn, rank, latents, groups, centers):
    config = GenLoRAConfig(
        rank=rank,
        num_latents_a=latents[0],
        num_latents_b=latents[1],
        num_groups_a=groups[0],
        num_groups_b=groups[1],
        num_centers=centers,
        learn_centers=learn[0],
        learn_widths=learn[1],
    )
    layer = AdaptedLinear(torch.nn.Linear(40, 24), config)
    trained = sum(p.numel() for p in layer.adapter_parameters().values() if p.requires_grad)
    assert config.count_parameters(MatrixShape(24, 40)) == trained


def test_published_count_of_the_method_notes():
    # n + G·R·K + 2·R·K for n = 4096, R = 64, G = 8, K = 1, of one matrix
    config = GenLoRAConfig(rank=64, num_groups_a=8, num_groups_b=8, learn_centers=True, learn_widths=True)
    assert config.count_parameters(MatrixShape(4096, 4096)) == 2 * 4736


def test_gain_falls_with_the_root_of_the_rank_where_signs_are_and_may_be_given():
    assert [GenLoRAConfig(rank=rank).gain for rank in (16, 64, 256)] == [16.0, 8.0, 4.0]
    assert GenLoRAConfig(rank=16, entry_signs=False).gain == 1.0
    assert GenLoRAConfig(rank=16, weight_gain=3.0).gain == 3.0


def test_every_field_is_documented():
    text = inspect.getdoc(GenLoRAConfig)
    assert text is not None
    for field in dataclasses.fields(GenLoRAConfig):
        assert f"\n    {field.name}: " in text
