from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from genlora_lightning import inject_adapters, remove_adapters
from genlora_lightning.injection.full_training import trained_modules
from tests.conftest import small_config


def net(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.BatchNorm1d(8)).to(dtype)


CONFIG = small_config(target_modules=["0", "2"], modules_to_train=["1", "3"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_in_a_16_bit_base_trains_in_float32_and_the_base_around_it_does_not_notice(dtype):
    model = net(dtype).train()
    x = torch.randn(16, 8, dtype=dtype)
    expected = model(x)
    inject_adapters(model, CONFIG)
    assert {p.dtype for m in trained_modules(model).values() for p in m.parameters()} == {torch.float32}
    output = model(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
    before = model[1].weight.clone()
    (output.float() * torch.randn(16, 8)).sum().backward()
    torch.optim.SGD(model[1].parameters(), lr=1e-5).step()
    assert not torch.equal(model[1].weight, before)  # a step that bfloat16 would round away
    assert torch.equal(model[1].weight.to(dtype), before.to(dtype))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_later_cast_of_the_model_leaves_every_bit_of_the_module(cast):
    model = net(torch.bfloat16)
    inject_adapters(model, CONFIG)
    with torch.no_grad():
        model[1].weight.add_(1e-6)
    before = {name: t.clone() for name, t in model[3].state_dict().items()} | {"1": model[1].weight.clone()}
    model.to(cast)
    assert model[0].weight.dtype == cast
    assert torch.equal(model[1].weight, before["1"])
    for name, tensor in model[3].state_dict().items():
        assert torch.equal(tensor, before[name])


def test_module_of_a_float32_base_is_untouched_by_hooks():
    model = net(torch.float32)
    inject_adapters(model, CONFIG)
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks
    assert all(p.requires_grad for p in model[1].parameters())


def test_removal_gives_the_module_its_dtype_and_its_freedom_back():
    model = net(torch.bfloat16)
    inject_adapters(model, CONFIG)
    remove_adapters(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not trained_modules(model)
    assert not model[1]._forward_hooks
    assert model.to(torch.float16)[1].weight.dtype == torch.float16


def test_embedding_in_a_16_bit_base_gives_the_bases_dtype():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8)).bfloat16()
    inject_adapters(model, small_config(modules_to_train=["0"]))
    assert model[0].weight.dtype == torch.float32
    assert model(torch.arange(5)).dtype == torch.bfloat16


def test_tied_weight_becomes_the_trained_modules_own_and_the_other_side_keeps_its_bits():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    model.bfloat16()
    inject_adapters(model, small_config(target_modules=["body"], modules_to_train=["head"]))
    assert model["head"].weight is not model["embed"].weight
    assert torch.equal(model["head"].weight, model["embed"].weight.float())
    assert model["embed"].weight.dtype == torch.bfloat16
    assert not model["embed"].weight.requires_grad
    assert model["head"](model["body"](model["embed"](torch.arange(5)))).dtype == torch.bfloat16


def test_two_trained_modules_that_share_a_weight_go_on_sharing_it():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    model.bfloat16()
    inject_adapters(model, small_config(target_modules=["body"], modules_to_train=["head", "embed"]))
    assert model["head"].weight is model["embed"].weight
    assert model["head"](model["body"](model["embed"](torch.arange(5)))).dtype == torch.bfloat16


def test_module_named_twice_by_its_parent_and_itself_is_held_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))).bfloat16()
    report = inject_adapters(model, small_config(target_modules=["0"], modules_to_train=["1", "1.0"]))
    assert [row.module for row in report.trained] == ["1"]
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_model_with_such_a_module_can_be_copied_and_pickled():
    model = net(torch.bfloat16).eval()
    inject_adapters(model, CONFIG)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        twin.to(torch.float16)
        assert twin[1].weight.dtype == torch.float32
        assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_module_of_a_float32_base_that_is_cast_later_goes_on_fitting_into_it(dtype):
    model = net(torch.float32).eval()
    inject_adapters(model, CONFIG)
    before = model[1].weight.clone()
    x = torch.randn(4, 8)
    expected = model(x)
    model.to(dtype)
    assert torch.equal(model[1].weight, before)
    output = model(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=5e-2, atol=5e-2)
    model.float()
    assert not model[1]._forward_hooks
    assert model(x).dtype == torch.float32
