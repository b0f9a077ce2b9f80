"""Of a fused projection chosen outputs alone are adapted, by every kind, and nothing else has to know it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning import (
    CompacterConfig,
    GenLoRAConfig,
    LoRAConfig,
    PoLARConfig,
    describe_adapter,
    export_lora,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from genlora_lightning.injection.inject import adapter_layers, check_configuration
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import perturb
from tests.models import tiny_gpt2
from tests.test_kinds_and_sites import OuterConfig

IDS = torch.tensor([[1, 2, 5, 7, 3, 60]])
QUERIES_AND_VALUES = [[0, 16], [32, 48]]  # of GPT-2's c_attn: queries, keys, values
WHERE = {"target_modules": ["c_attn", "c_fc"], "target_rows": {"c_attn": QUERIES_AND_VALUES}}
KINDS = {
    "genlora": GenLoRAConfig(rank=4, num_groups_b=3, **WHERE),
    "lora": LoRAConfig(rank=3, **WHERE),
    "polar": PoLARConfig(rank=3, **WHERE),
    "compacter": CompacterConfig(rank=4, num_products=2, **WHERE),
}
each_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@each_kind
def test_chosen_outputs_are_adapted_saved_merged_and_exported(config, tmp_path):
    from peft import PeftModel

    model = tiny_gpt2()
    before = logits(model)
    report = inject_adapters(model, config)
    assert torch.equal(logits(model), before)
    layers = adapter_layers(model)
    counted = sum(layer.config.count_all(layer.shape) for layer in layers.values()) + config.count_shared()
    assert report.adapter_parameters == report.trainable_parameters == counted
    perturb(model, 0.1)
    for name, layer in layers.items():
        rows = layer.delta_weight().abs().sum(1) > 0
        keys = torch.zeros(len(rows), dtype=torch.bool)
        keys[16:32] = "c_attn" in name
        assert torch.equal(rows, ~keys), name
    wanted = logits(model)
    assert not torch.allclose(wanted, before, atol=1e-3)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    check_configuration(model, config)

    folder = save_adapter(model, tmp_path / "adapter")
    assert describe_adapter(folder).parameters == report.trainable_parameters
    again = tiny_gpt2()
    load_adapter(again, folder)
    assert torch.equal(logits(again), wanted)
    export_lora(model, tmp_path / "lora")
    theirs = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "lora")
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-4, atol=1e-5)


@each_kind
def test_gradients_are_the_same_for_a_layer_alone_and_by_plain_autograd_and_for_a_step(config):
    def gradients(way: str) -> list[torch.Tensor]:
        model = tiny_gpt2().eval()
        inject_adapters(model, config)
        torch.manual_seed(1)
        perturb(model, 0.1)
        set_fused(model, way != "plain")
        if way == "step":
            with generated_once(model):
                model(input_ids=IDS).logits.square().mean().backward()
        else:
            model(input_ids=IDS).logits.square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    wanted = gradients("fused")
    assert all(bool(gradient.any()) for gradient in wanted)
    for way in ("plain", "step"):
        for given, expected in zip(gradients(way), wanted, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(target_modules=["c_attn"], target_rows={"c_attn": [[0, 49]]}), "there are 48 outputs"),
        (LoRAConfig(target_modules=["c_attn"], target_rows={"c_proj": [[0, 4]]}), "c_proj is not adapted"),
        (LoRAConfig(target_modules=["wte"], target_rows={"wte": [[0, 4]]}), "`target_rows` is for linears"),
        (OuterConfig(target_modules=["c_attn"], target_rows={"c_attn": [[0, 4]]}), "for kinds with two factors"),
        (GenLoRAConfig(target_modules=["c_attn"], target_rows={"c_attn": [[0, 4]]}), "has only 4 outputs"),
    ],
)
def test_rows_that_cannot_be_chosen_are_refused(config, message):
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, config)
    assert not adapter_layers(model)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([1], TypeError, "dictionary by names"),
        ({"c_attn": ["q", "v"]}, TypeError, r"ranges of outputs.*head by head in GPT-NeoX"),
        ({"c_attn": [[0, 4, 8]]}, TypeError, "ranges of outputs"),
        ({"c_attn": []}, TypeError, "ranges of outputs"),
        ({"c_attn": [[4, 4]]}, ValueError, "rising ranges"),
        ({"c_attn": [[4, 8], [6, 9]]}, ValueError, "rising ranges"),
        ({"c_attn": [[-4, 8]]}, ValueError, "rising ranges"),
        ({"(": [[0, 8]]}, ValueError, "valid regular expression"),
    ],
)
def test_configuration_says_what_ranges_must_be(rows, error, message):
    with pytest.raises(error, match=message):
        LoRAConfig(target_rows=rows)
