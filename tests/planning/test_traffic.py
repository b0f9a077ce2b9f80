from __future__ import annotations

import pytest
from torch import nn

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.planning.traffic import Setup, model_sizes, plan_traffic
from tests.conftest import small_config
from tests.models import tiny_llama, tiny_t5


def real(config: GenLoRAConfig) -> nn.Module:
    model = tiny_llama()
    inject_adapters(model, config)
    return model


def test_units_are_the_root_and_the_layers():
    model = real(small_config())
    sizes = model_sizes(model)
    for index, layer in enumerate(model.model.layers, 1):
        frozen = [tuple(p.shape) for p in layer.parameters() if not p.requires_grad]
        assert sorted(sizes.base[index]) == sorted(frozen)
    assert sorted(sizes.base[0]) == [(16,), (64, 16)]  # the norm, and the embedding with the head tied to it
    assert sizes.adapters[0] == sizes.lora[0] == []
    assert sizes.num_base + sizes.num_trainable == sum(p.numel() for p in model.parameters())


def test_units_of_an_encoder_and_a_decoder_are_the_layers_of_both():
    model = tiny_t5()
    inject_adapters(model, small_config())
    sizes = model_sizes(model)
    layers = [*model.transformer.encoder.block, *model.transformer.decoder.block]
    assert len(sizes.base) == 1 + len(layers)
    for unit, layer in zip(sizes.base[1:], layers, strict=True):
        assert sorted(unit) == sorted(tuple(p.shape) for p in layer.parameters() if not p.requires_grad)


def test_one_gpu_sends_nothing_and_accumulation_repeats_the_gathers_but_not_the_all_reduce():
    sizes = model_sizes(real(small_config()))
    assert plan_traffic(sizes, Setup(strategy="fsdp2", gpus=1)).sent == 0
    once, twice = (plan_traffic(sizes, Setup(strategy="fsdp2", gpus=4, accumulate=n)) for n in (1, 2))
    assert twice.base_gathered == 2 * once.base_gathered
    assert twice.all_reduced == once.all_reduced == sizes.num_trainable
    assert once.sent == round(2 * 3 / 4 * 4 * sizes.num_trainable)


def test_padding_is_to_multiples_of_the_ranks():
    sizes = model_sizes(real(small_config(rank=5)))
    plain = plan_traffic(sizes, Setup(strategy="fsdp2", gpus=2, adapter_sharding="shard"))
    wide = plan_traffic(sizes, Setup(strategy="fsdp2", gpus=64, adapter_sharding="shard"))
    assert sizes.num_trainable < plain.reduce_scattered < wide.reduce_scattered
    assert wide.reduce_scattered % 64 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "`gpus` must be greater than 0, got 0"),
        ({"strategy": "single", "gpus": 2}, "'single' is for one GPU, got 2"),
        ({"strategy": "ddp", "gpus": 2, "adapter_sharding": "shard"}, "not by 'ddp'"),
    ],
)
def test_impossible_setups_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        Setup(**changes)
