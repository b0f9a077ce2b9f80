from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from torch import nn

from genlora_lightning import inject_adapters
from genlora_lightning.injection.heads import UNTIED
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.targets import STACK, match_modules
from tests.conftest import small_config
from tests.models import tiny_llama


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": {"q_prj": 2}}, r"`rank_pattern` has 'q_prj', which no adapted linear matches. Near .*q_proj"),
        ({"alpha_pattern": {"_proj": 2.0}}, r"`alpha_pattern` has '_proj', which no adapted linear matches"),
        ({"rank_pattern": {"^q_proj": 2}}, r"has '\^q_proj', which no adapted linear matches"),
        (
            {"rank_pattern": {"k_proj": 2}},
            r"'k_proj', but model.layers.0.self_attn.k_proj is not adapted: it is no",
        ),
        ({"layers_to_transform": [0, 7]}, r"`layers_to_transform` has \[7\], .* The numbers .* are from 0 to 1\."),
        (
            {"layers_to_transform": [0], "rank_pattern": {r"layers\.1\..*": 2}},
            r"but model.layers.1.self_attn is not adapted: it is no linear",
        ),
        (
            {"layers_to_transform": [0], "target_modules": ["model.layers.1.mlp.up_proj"]},
            r"model.layers.1.mlp.up_proj cannot be adapted: in no layer of `layers_to_transform`",
        ),
    ],
)
def test_patterns_and_layers_that_match_nothing_are_errors(changes, message):
    base = tiny_llama()
    with pytest.raises(ValueError, match=message):
        inject_adapters(base, small_config(**{"target_modules": ["q_proj", "v_proj"], **changes}))
    assert not adapter_layers(base)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank_pattern": {"q": 0}}, ValueError, r"`rank_pattern\['q'\]` must be at least 1, got 0"),
        ({"rank_pattern": {"q": 2.0}}, TypeError, r"`rank_pattern\['q'\]` must be an integer"),
        ({"rank_pattern": ["q"]}, TypeError, r"`rank_pattern` must be a dictionary by names of linears, got \['q'\]"),
        ({"rank_pattern": {0: 2}}, TypeError, r"`rank_pattern` must have non-empty names of linears as keys, got 0"),
        ({"alpha_pattern": {"(q": 2}}, ValueError, r"`alpha_pattern` has '\(q', which is neither a name nor a valid"),
        ({"alpha_pattern": {"q": 0}}, ValueError, r"`alpha_pattern\['q'\]` must be finite and not zero"),
        ({"layers_to_transform": []}, ValueError, r"`layers_to_transform` is an empty list"),
        ({"layers_to_transform": 3}, TypeError, r"`layers_to_transform` must be a list of layer numbers, got 3"),
        ({"layers_to_transform": [-1]}, ValueError, r"`layers_to_transform` must be at least 0, got -1"),
    ],
)
def test_patterns_and_layers_that_cannot_be_are_errors(changes, error, message):
    with pytest.raises(error, match=message):
        small_config(**changes)


def test_a_shared_linear_has_the_rank_of_each_of_its_names_and_of_the_first_pattern():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "o": nn.Linear(4, 4)})
    inject_adapters(model, small_config(rank_pattern={"b": 2, "a|o": 3}))
    assert {name: layer.config.rank for name, layer in adapter_layers(model).items()} == {"a": 2, "o": 3}


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


class Reader(nn.Module):
    """Computes with the weight of one linear, calls another, and asks a third for facts."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.asked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.both, self.outside = nn.Linear(4, 4), nn.Linear(4, 4)
        nn.init.zeros_(self.outside.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.asked(x.to(self.asked.weight.dtype)))

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.called(x) + self.both(x) @ self.both.weight

    def reset(self) -> None:
        nn.init.zeros_(self.called.weight)


def test_linear_that_is_read_and_never_called_is_left_alone():
    model = nn.ModuleDict({"a": Reader()})
    report = inject_adapters(model, small_config())
    assert [row.module for row in report.adapted] == ["a.called", "a.asked", "a.both", "a.outside"]
    assert report.skipped == {"a.read": "Reader reads its weight without calling it"}
    with pytest.raises(ValueError, match=r"a.read cannot be adapted: Reader reads its weight without calling it"):
        inject_adapters(nn.ModuleDict({"a": Reader()}), small_config(target_modules=["read"]))


@pytest.mark.skipif(version("transformers") < "5", reason="transformers 4 calls it where mamba-ssm is absent")
def test_linear_of_mamba_that_never_acts_is_left_alone():
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 8, "time_step_rank": 4}
    report = inject_adapters(MambaForCausalLM(MambaConfig(**sizes)), small_config())
    assert {row.module.rsplit(".", 1)[-1] for row in report.adapted} == {"in_proj", "x_proj", "out_proj"}
    assert report.skipped["backbone.layers.0.mixer.dt_proj"] == "MambaMixer reads its weight without calling it"


@pytest.mark.parametrize(("trained", "other"), [("embed_tokens", "lm_head"), ("lm_head", "model.embed_tokens")])
def test_summary_says_what_training_in_full_unties(trained, other):
    report = inject_adapters(tiny_llama(), small_config(modules_to_train=[trained]))
    assert report.skipped[other] == UNTIED
    assert f"Left alone: {other} (tied before to a module that is trained in full" in report.summary()
    both = inject_adapters(tiny_llama(), small_config(modules_to_train=["embed_tokens", "lm_head"]))
    assert UNTIED not in both.skipped.values()


def test_parameter_of_experts_that_is_named_as_a_target_is_an_error_that_says_what_it_is():
    model = nn.ModuleDict({"v_proj": nn.Linear(4, 4), "experts": nn.Module()})
    model["experts"].gate_up_proj = nn.Parameter(torch.zeros(3, 4, 4))
    message = r"experts.gate_up_proj is a parameter of shape \(3, 4, 4\): put it into `target_parameters`, as"
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, small_config(target_modules=["gate_up_proj"]))
