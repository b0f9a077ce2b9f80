from __future__ import annotations

import importlib
from dataclasses import fields, replace

import peft
import pytest
from peft import PeftConfig

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.interop import peft as interop
from genlora_lightning.interop.peft import GenLoraConfig


@pytest.mark.parametrize("version", ["0.15.2", "0.20.9", "0.22.0", "1.0"])
def test_other_releases_of_peft_are_refused_with_one_line(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=rf"needs peft 0.21, and {version} is installed: pip install") as error:
        importlib.reload(interop)
    assert "\n" not in str(error.value)


def test_registering_twice_does_nothing():
    importlib.reload(interop)
    assert peft.PeftType("GENLORA").value == "GENLORA"
    assert [str(kind.value) for kind in peft.PeftType].count("GENLORA") == 1


def test_defaults_are_those_of_the_library():
    assert GenLoraConfig(target_modules="all-linear").to_adapter_config() == replace(
        GenLoRAConfig(), weight_gain=None, target_modules="all-linear"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_train": ["score"], "dropout": 0.1},
        {"rank": 8, "alpha": 16.0, "scaling": "rank", "weight_gain": 3.0, "entry_signs": False},
        {"num_latents_a": 2, "num_latents_b": 3, "num_groups_a": 4, "num_groups_b": 1, "num_centers": 2, "width": 0.5},
        {"learn_centers": True, "learn_widths": True, "init": "zero_weight", "kernel": "inverse_quadratic"},
    ],
)
def test_every_field_goes_to_peft_and_back(changes):
    config = GenLoRAConfig(**changes)
    back = GenLoraConfig.from_adapter_config(config, task_type="CAUSAL_LM").to_adapter_config()
    assert not back.differences(config, run_only=True)


def test_what_is_excluded_is_excluded_with_all_that_is_in_it():
    import re

    pattern = GenLoraConfig.from_adapter_config(GenLoRAConfig(exclude_modules=["mlp", "a.b"])).exclude_modules
    matched = [name for name in ("h.mlp", "mlp.up", "x.a.b.c", "h.mlp2", "a.c") if re.fullmatch(pattern, name)]
    assert matched == ["h.mlp", "mlp.up", "x.a.b.c"]


def test_config_file_says_the_gain_and_loads_through_peft(tmp_path):
    config = GenLoraConfig(r=16, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GenLoraConfig)
    assert loaded.weight_gain == GenLoRAConfig(rank=16).gain
    ours = {field.name for field in fields(GenLoraConfig)} - {"weight_gain"}
    assert {name: getattr(loaded, name) for name in ours} == {name: getattr(config, name) for name in ours}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, r"`r` must be .* got 0"),
        ({"lora_alpha": 0}, r"`lora_alpha` must be .* got 0"),
        ({"lora_dropout": 1.5}, r"`lora_dropout` must be .* got 1.5"),
        ({"num_groups_b": 0}, r"`num_groups_b` must be .* got 0"),
        ({"kernel": "cubic"}, "cubic"),
        ({"bias": "some"}, "`bias` must be 'none', 'all' or 'genlora_only', got 'some'"),
        ({"layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_bad_values_are_named_as_peft_names_them(values, message):
    with pytest.raises(ValueError, match=message):
        GenLoraConfig(**values)


@pytest.mark.parametrize(
    "changes", [{"rank_pattern": {"q": 2}}, {"alpha_pattern": {"q": 2}}, {"layers_to_transform": [0]}]
)
def test_what_peft_cannot_say_is_refused(changes):
    with pytest.raises(ValueError, match=rf"`{next(iter(changes))}` is .*, which PEFT's GenLoraConfig does not say"):
        GenLoraConfig.from_adapter_config(GenLoRAConfig(**changes))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "`target_modules` is None"),
        ({"target_modules": ["a"], "bias": "all"}, "`bias` is 'all', which .* cannot say: leave it at 'none'"),
        ({"target_modules": ["a"], "layers_to_transform": [0]}, r"`layers_to_transform` is \[0\]"),
        ({"target_modules": ["a"], "exclude_modules": "b.*"}, "`exclude_modules` is the regular expression 'b"),
    ],
)
def test_what_the_library_cannot_say_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GenLoraConfig(**values).to_adapter_config()
