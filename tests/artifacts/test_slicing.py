"""A slice of an elastic adapter is what the whole one computes at that rank, bit for bit, without its base."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from genlora_lightning import (
    LoRAConfig,
    describe_adapter,
    inject_adapters,
    load_adapter,
    save_adapter,
    verify_adapter,
)
from genlora_lightning.artifacts.slicing import slice_adapter
from genlora_lightning.injection.elastic import set_active_rank
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.interop.peft_folders import peft_fields
from tests.conftest import perturb
from tests.injection.test_elastic import ELASTIC, adapted, each, llama, logits


@each
@pytest.mark.parametrize("rank", [1, 4, 5, {"q_proj": 1, r"layers\.1\..*(gate|down)_proj": 4}], ids=str)
def test_slice_equals_the_whole_at_that_rank_in_every_bit(config, rank, tmp_path):
    config = dataclasses.replace(
        config, modules_to_train=["lm_head"], target_modules=r".*(_proj|embed_tokens)", rank_pattern={"up_proj": 3}
    )
    model = llama()
    inject_adapters(model, config)
    perturb(model)
    whole = logits(model)
    save_adapter(model, tmp_path / "adapter", training={"global_step": 7, "metrics": {"loss": 1.5}})
    set_active_rank(model, rank)
    wanted = logits(model)
    assert not torch.allclose(wanted, whole)

    folder = slice_adapter(tmp_path / "adapter", tmp_path / "sliced", rank)
    verify_adapter(folder)
    again = llama()
    load_adapter(again, folder)
    assert torch.equal(logits(again), wanted)
    layers, sliced = adapter_layers(model), adapter_layers(again)
    assert [layer.config.rank for layer in sliced.values()] == [layer.active_config.rank for layer in layers.values()]
    for name, layer in sliced.items():
        assert layer.scaling == pytest.approx(layers[name].scaling, rel=1e-15)
        assert (layer.config.elastic is not None) == (layer.config.rank > 1)  # 1 is the lowest there is
    described = describe_adapter(folder)
    assert sum(layer.parameters for layer in described.layers) < sum(
        layer.parameters for layer in describe_adapter(tmp_path / "adapter").layers
    )
    facts = json.loads((folder / "manifest.json").read_text())["training"]
    assert facts == {"global_step": 7, "sliced_from_rank": 6}


@each
def test_slice_of_a_slice_is_the_slice(config, tmp_path):
    save_adapter(adapted(config), tmp_path / "adapter")
    slice_adapter(tmp_path / "adapter", tmp_path / "four", 4)
    model, other = llama(), llama()
    load_adapter(model, slice_adapter(tmp_path / "four", tmp_path / "one", 1))
    load_adapter(other, slice_adapter(tmp_path / "adapter", tmp_path / "at once", 1))
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(ValueError, match="`rank` is 2, and the adapter has 1 rows at most"):
        slice_adapter(tmp_path / "one", tmp_path / "none", 2)


def test_what_cannot_be_cut_is_refused_before_anything_is_written(tmp_path):
    save_adapter(adapted(LoRAConfig(rank=6)), tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"not made with `elastic`.*`genlora export-lora --rank` lower the rank of any"
    ):
        slice_adapter(tmp_path / "adapter", tmp_path / "out", 4)
    save_adapter(adapted(ELASTIC["lora"]), tmp_path / "adapter")
    for rank, message in ((0, "at least 1"), (9, "6 rows at most"), ({"x_proj": 1}, "'x_proj' matches no adapted")):
        with pytest.raises(ValueError, match=message):
            slice_adapter(tmp_path / "adapter", tmp_path / "out", rank)
    assert not (tmp_path / "out").exists()


def test_adapter_is_not_cut_in_its_own_place(tmp_path):
    save_adapter(adapted(ELASTIC["lora"]), tmp_path / "adapter")
    (tmp_path / "link").symlink_to(tmp_path / "adapter")
    for out in ("adapter", "link"):
        with pytest.raises(ValueError, match="is the adapter that is cut, and its other rows would be lost"):
            slice_adapter(tmp_path / "adapter", tmp_path / out, 4)
    assert {layer.rank for layer in describe_adapter(tmp_path / "adapter").layers} == {6}


def test_peft_folder_wants_a_slice():
    with pytest.raises(ValueError, match=r"`elastic` is \[1, 4, 6\].*`genlora slice`"):
        peft_fields(ELASTIC["genlora"])
