from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.injection.inject import adapter_layers, inject_adapters
from genlora_lightning.injection.restoring import restored_after_error
from genlora_lightning.layers.sharing import sharing_modules
from tests.conftest import perturb, small_config
from tests.models import tiny_llama


class Mixed(nn.Module):
    """A base of 16 bits with a head that has a norm in float32 and a weight tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8).bfloat16()
        self.body = nn.Linear(8, 8).bfloat16()
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 10).bfloat16())
        nn.init.normal_(self.head[0].weight)
        self.head[1].weight = self.embed.weight
        self.embed.weight.requires_grad_(False)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that an injection could change."""
    return {
        "kinds": [(name, type(module)) for name, module in model.named_modules()],
        "places": [
            (name, id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)
        ],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "attributes": [
            {name: value for name, value in vars(m).items() if not name.startswith(("_forward", "_parameters"))}.keys()
            for m in model.modules()
        ],
        "fast paths": [getattr(m, "use_nested_tensor", None) for m in model.modules()],
    }


def inject_and_fail(model: nn.Module, part: nn.Module, config: GenLoRAConfig) -> None:
    with restored_after_error(model):
        inject_adapters(part, config)
        raise KeyError("late")


def test_all_that_an_injection_changes_is_taken_back_in_every_bit():
    model = Mixed()
    before, bits = everything(model), copy.deepcopy(model.state_dict())
    config = small_config(target_modules=["body", "linear1"], modules_to_train=["head"])
    with pytest.raises(KeyError, match="late"):
        inject_and_fail(model, model, config)
    assert everything(model) == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, bits[name])


def test_adapters_that_a_part_of_the_model_got_are_taken_off():
    model = nn.ModuleDict({"inner": tiny_llama()})
    before = everything(model)
    with pytest.raises(KeyError, match="late"):
        inject_and_fail(model, model["inner"], small_config())
    assert everything(model) == before


def test_adapters_that_were_there_stay_with_their_dropout_and_flags():
    model = tiny_llama()
    inject_adapters(model, small_config(dropout=0.5))
    perturb(model)
    model.lm_head.weight.requires_grad_(True)
    before, bits = everything(model), copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError, match="late"):
        inject_and_fail(model, model, small_config(dropout=0.0))
    assert everything(model) == before
    assert {layer.dropout.p for layer in adapter_layers(model).values()} == {0.5}
    assert {layer.config.dropout for layer in adapter_layers(model).values()} == {0.5}
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_taken_back_without_an_error():
    model = tiny_llama()
    with restored_after_error(model):
        inject_adapters(model, small_config())
    assert len(adapter_layers(model)) == 14
    assert model in sharing_modules(model)
