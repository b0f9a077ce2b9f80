from __future__ import annotations

import torch
from torch import nn

from genlora_lightning.distributed.shards import part_of, plain_name, state_names, trained_tensors, whole_tensors
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.injection.state import adapter_state_dict
from tests.conftest import small_config
from tests.models import tiny_bert, tiny_llama


def test_names_are_those_without_wrappers():
    assert plain_name("_fsdp_wrapped_module.net.0._checkpoint_wrapped_module.weight") == "net.0.weight"
    assert plain_name("net._fsdp_wrapped_modules.weight") == "net._fsdp_wrapped_modules.weight"


def test_on_one_device_what_is_trained_is_the_adapter_s_state_and_what_else_is_trainable():
    model = tiny_bert()
    inject_adapters(model, small_config(modules_to_train=["classifier"]))
    bias = model.bert.embeddings.LayerNorm.bias.requires_grad_(True)
    expected = {**adapter_state_dict(model), "bert.embeddings.LayerNorm.bias": bias}
    found = whole_tensors(model)
    assert found.keys() == expected.keys() == trained_tensors(model).keys()
    assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in expected.items())


def test_state_names_hold_all_of_the_state_dict():
    for model in (tiny_llama(), tiny_bert(), nn.BatchNorm1d(2)):
        assert set(model.state_dict()) <= state_names(model)


def test_a_tensor_that_is_not_sharded_is_a_part_of_itself():
    whole = torch.randn(3, 2)
    assert part_of(whole, nn.Parameter(torch.zeros(3, 2))) is whole
