from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning import inject_adapters
from genlora_lightning.injection.state import adapter_state_dict, check_adapter_state, load_adapter_state
from tests.conftest import perturb, small_config


def make() -> nn.Module:
    return nn.ModuleDict(
        {"body": nn.Linear(8, 8), "head": nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)), "other": nn.Linear(8, 8)}
    )


def adapted() -> nn.Module:
    model = make()
    inject_adapters(model, small_config(target_modules=["body"], modules_to_train=["head"], learn_centers=False))
    return model


def test_state_holds_adapters_fixed_parts_and_trained_modules_with_buffers_and_no_base():
    names = set(adapter_state_dict(adapted()))
    parts = {f"body.{g}.{p}" for g in ("update.A", "update.B") for p in ("latent", "weight", "centers", "log_widths")}
    head = {"head.0.weight", "head.0.bias", "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked"}
    assert names == parts | head | {"head.1.weight", "head.1.bias"}
    assert names <= set(adapted().state_dict())


def test_loaded_state_is_the_saved_one():
    source, target = adapted(), adapted()
    perturb(source)
    source["head"][0].running_mean.fill_(3.0)
    load_adapter_state(target, adapter_state_dict(source), "here")
    for name, tensor in adapter_state_dict(target).items():
        assert torch.equal(tensor, adapter_state_dict(source)[name]), name


def test_missing_left_over_and_misshapen_tensors_are_one_error_that_lists_them_and_loads_nothing():
    source, target = adapted(), adapted()
    perturb(source)
    before = {name: t.clone() for name, t in adapter_state_dict(target).items()}
    state = dict(adapter_state_dict(source))
    del state["head.1.bias"]
    state["stranger"] = torch.zeros(1)
    state["body.update.A.latent"] = torch.zeros(9)
    with pytest.raises(
        ValueError,
        match=r"in FILE does not fit.*1 tensors are missing \(head.1.bias\); 1 tensors have no place in the model "
        r"\(stranger\).*update.A.latent: stored \(9,\), needed \(8, 1\).*another base model",
    ):
        load_adapter_state(target, state, "FILE")
    for name, tensor in adapter_state_dict(target).items():
        assert torch.equal(tensor, before[name])


def test_equal_states_pass():
    state = adapter_state_dict(adapted())
    check_adapter_state(state, dict(state), "here")
    assert len(state) == 15


def test_model_without_adapters_is_an_error():
    with pytest.raises(ValueError, match="no adapters"):
        adapter_state_dict(make())


def test_adapter_of_a_wrapped_model_is_an_error_that_names_the_prefix():
    inner = adapted()
    outer = nn.ModuleDict({"net": adapted()})
    with pytest.raises(ValueError, match=r"its tensors have the prefix 'net\.', so it was saved from a module that"):
        load_adapter_state(inner, adapter_state_dict(outer), "here")
    with pytest.raises(ValueError, match=r"this model's tensors have the prefix 'net\.', so it was saved from a part"):
        load_adapter_state(outer, adapter_state_dict(inner), "here")
