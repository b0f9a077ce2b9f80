from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from genlora_lightning import (
    LoRAConfig,
    export_lora,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    unmerge_adapters,
)
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.attention import AdaptedAttention
from tests.conftest import perturb, small_config

KINDS = {"genlora": small_config(rank=3), "lora": LoRAConfig(rank=3)}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("settings", [{"batch_first": True}, {}, {"bias": False, "add_bias_kv": True}], ids=str)
def test_outputs_and_gradients_are_those_of_the_update_added_to_the_projection(config, settings):
    layer = AdaptedAttention(nn.MultiheadAttention(8, 2, **settings).double(), config).double()
    perturb(layer)
    base, x = layer.base_layer, torch.randn(3, 4, 8).double()
    parameters = [p for p in layer.update.parameters() if p.requires_grad]
    changed = {"in_proj_weight": base.in_proj_weight + layer.delta_weight()}
    wanted, weights = functional_call(base, changed, (x, x, x))
    given, given_weights = layer(x, x, x)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given_weights, weights, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(given, base(x, x, x)[0], rtol=1e-3)
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (given, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    with torch.no_grad():  # torch's fused kernel, where the settings allow it
        torch.testing.assert_close(layer.eval()(x, x, x)[0], wanted, rtol=1e-9, atol=1e-11)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_attention_in_torch_transformer_is_trained_saved_merged_and_taken_off(tmp_path):
    model, x = encoder(), torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
    report = inject_adapters(model, small_config(target_modules=["self_attn", "linear1"]))
    assert [row.shape for row in report.adapted] == ["(24, 8)", "(16, 8)"] * 2
    assert next(iter(adapter_layers(model))) == "layers.0.self_attn"
    perturb(model)
    wanted = model(x, src_key_padding_mask=padding)
    wanted.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.layers[0].self_attn.update.parameters())
    wanted = wanted.detach()
    with torch.no_grad():
        given = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(given[~padding], wanted[~padding], rtol=1e-4, atol=1e-5)
        again = encoder()
        load_adapter(again, save_adapter(model, tmp_path / "adapter"))
        assert torch.equal(again(x, src_key_padding_mask=padding), given)
        merge_adapters(model)
        merged = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(merged[~padding], wanted[~padding], rtol=1e-4, atol=1e-5)
        unmerge_adapters(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), given)
        remove_adapters(model)
        assert torch.equal(model(x, src_key_padding_mask=padding), before)


def test_attention_with_several_projections_is_refused_and_none_is_exported(tmp_path):
    several = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, kdim=6)})
    with pytest.raises(ValueError, match=r"attn cannot be adapted: its queries, keys and values have parameters of th"):
        inject_adapters(several, small_config(target_modules=["attn"]))
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    inject_adapters(model, small_config(target_modules=["attn"]))
    with pytest.raises(ValueError, match=r"PEFT's LoRA of an nn.MultiheadAttention adapts its `out_proj`, too"):
        export_lora(model, tmp_path / "lora")


def test_all_linear_leaves_attention_alone():
    model = encoder()
    inject_adapters(model, small_config())
    assert not any(isinstance(layer, AdaptedAttention) for layer in adapter_layers(model).values())
