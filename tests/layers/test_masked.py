"""With `keep_zeros` an update acts on the base's non-zero weights alone: in forwards, gradients and merged weights."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genlora_lightning import (
    CompacterConfig,
    LoRAConfig,
    PoLARConfig,
    export_lora,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    save_merged,
    unmerge_adapters,
)
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.artifacts.adapter_set import AdapterSet
from genlora_lightning.injection.elastic import set_active_rank
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.interop.peft_folders import export_peft
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.layers.masked import masked_linear
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import perturb, small_config
from tests.models import tiny_gpt2, tiny_llama
from tests.test_kinds_and_sites import OuterConfig

KINDS = {
    "genlora": small_config(keep_zeros=True),
    "lora": LoRAConfig(rank=3, alpha=5.0, keep_zeros=True),
    "polar": PoLARConfig(rank=3, alpha=5.0, keep_zeros=True),
    "compacter": CompacterConfig(rank=4, alpha=3.0, num_products=2, keep_zeros=True),
    "outer": OuterConfig(keep_zeros=True),
}
each = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
IDS = torch.tensor([[3, 5, 7, 2, 9, 4], [1, 2, 3, 4, 5, 6]])


def pruned(make: Any = tiny_llama, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = make().eval().to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "emb" not in name and "wte" not in name and "wpe" not in name:
                parameter[torch.rand(parameter.shape, generator=generator) < 0.4] = 0
                parameter[0, 0] = -0.0  # of which the sign is a bit, too
    return model


def adapted(config: AdapterConfig, make: Any = tiny_llama, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = pruned(make, dtype)
    inject_adapters(model, config)
    perturb(model)
    return model


def logits(model: Any) -> Tensor:
    output: Tensor = model(input_ids=IDS).logits
    return output


def by_hand(model: nn.Module, make: Any = tiny_llama) -> Tensor:
    """What the base gives with the masked updates added to its weights."""
    plain = pruned(make)
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            weight = plain.get_submodule(name).weight
            weight += layer.to_stored(layer.update.delta_weight()) * (weight != 0)
        return logits(plain)


def signs_and_zeros(model: nn.Module) -> dict[str, Tensor]:
    layers = adapter_layers(model)
    return {name: torch.where(m.weight == 0, m.weight.signbit() + 1, 0) for name, m in layers.items()}


@each
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_forward_is_the_base_with_masked_updates_on_every_path(config, make):
    model = adapted(config, make)
    wanted = by_hand(model, make)
    free = adapted(dataclasses.replace(config, keep_zeros=False), make)
    with torch.no_grad():
        assert (logits(free) - wanted).abs().max() > 100 * (logits(model) - wanted).abs().max()  # the mask matters
    for fused in (True, False):
        set_fused(model, fused)
        torch.testing.assert_close(logits(model).detach(), wanted, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    set_fused(model, True)
    with generated_once(model):
        torch.testing.assert_close(logits(model).detach(), wanted, rtol=1e-4, atol=1e-5)


@each
def test_gradients_are_autograds(config):
    model = adapted(config)
    gradients: list[dict[str, Tensor]] = []
    for fused in (True, False):
        set_fused(model, fused)
        model.zero_grad()
        F.cross_entropy(logits(model).flatten(0, 1), IDS.flatten()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 2e-5 * gradients[1][name].norm(), name


@pytest.mark.parametrize("transposed", [False, True])
def test_function_has_the_derivatives_of_its_formula(transposed):
    generator = torch.Generator().manual_seed(0)
    W, x, A, B, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (2, 3, 4), (2, 4), (2, 5), 5)
    )
    W[W.abs() < 0.5] = 0
    stored = W.T.contiguous() if transposed else W
    options = {"scaling": 1.5, "transposed": transposed, "dtype": torch.float64}

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return masked_linear(x, stored, bias, A, B, **options)

    inputs = tuple(tensor.requires_grad_() for tensor in (x, A, B))
    expected = F.linear(x, W + 1.5 * (B.T @ A) * (W != 0), bias)
    torch.testing.assert_close(function(*inputs), expected)
    assert torch.autograd.gradcheck(function, inputs)
    with pytest.raises(RuntimeError, match="linear with masked updates has a backward of its own"):
        torch.autograd.grad(function(*inputs).sum(), x, create_graph=True)


def test_small_updates_act_in_16_bits_and_have_gradients_near_those_of_32():
    config = LoRAConfig(rank=3, alpha=1e-3, keep_zeros=True)
    narrow, wide = adapted(config, dtype=torch.bfloat16), adapted(config)
    name, layer = next(iter(adapter_layers(narrow).items()))
    x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
    other = adapter_layers(wide)[name]
    base = layer.base_layer(x.bfloat16()).float()
    added, exact = layer(x.bfloat16()).float() - base, other(x) - other.base_layer(x)
    assert exact.abs().max() < 1e-2
    # The sum of weight and update would have lost most of the update in its rounding.
    merged = F.linear(x.bfloat16(), layer.merged_weight()).float() - base
    assert (added - exact).norm() < (merged - exact).norm()
    for model, inputs in ((layer, x.bfloat16()), (other, x)):
        (model(inputs).float() ** 2).sum().backward()
    for parameter, exact_one in zip(layer.update.parameters(), other.update.parameters(), strict=True):
        assert (parameter.grad - exact_one.grad).norm() < 0.05 * exact_one.grad.norm()


def test_inputs_are_dropped_in_training_alone():
    config = LoRAConfig(rank=3, alpha=5.0, dropout=0.5, keep_zeros=True)
    model = adapted(config)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), by_hand(model), rtol=1e-4, atol=1e-5)
        model.train()
        assert not torch.equal(logits(model), logits(model))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Rounding to bfloat16 changed")
def test_merging_keeps_every_zero_and_unmerging_restores_every_bit(config, dtype):
    model = adapted(config, dtype=dtype)
    before = {name: layer.weight.clone() for name, layer in adapter_layers(model).items()}
    zeros, wanted = signs_and_zeros(model), logits(model)
    report = merge_adapters(model)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.weight == 0, before[name] == 0) or dtype == torch.bfloat16
        kept = zeros[name] > 0
        assert torch.equal(layer.weight[kept].signbit(), before[name][kept].signbit())
        assert not layer.weight[kept].any()
        assert not torch.equal(layer.weight, before[name])
    if dtype == torch.float32:
        assert report.worst.relative_error < 1e-4
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.weight.view(torch.uint8), before[name].view(torch.uint8))


def test_merged_folder_is_as_sparse_as_the_base(tmp_path):
    from transformers import AutoModelForCausalLM

    model = adapted(KINDS["genlora"])
    save_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, parameter in pruned().named_parameters():
        assert torch.equal(parameter == 0, merged.get_parameter(name) == 0), name


def test_adapter_is_loaded_as_it_was_and_says_so(tmp_path):
    model = adapted(KINDS["lora"])
    save_adapter(model, tmp_path / "adapter")
    again = pruned()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"keep_zeros: True there, None asked for"):
        inject_adapters(again, dataclasses.replace(KINDS["lora"], keep_zeros=False))


def test_elastic_ranks_are_masked_too():
    model = adapted(LoRAConfig(rank=4, elastic=[2, 4], keep_zeros=True))
    whole = logits(model)
    set_active_rank(model, 2)
    layer = next(iter(adapter_layers(model).values()))
    update: Any = layer.update
    delta = update.scaling * update.B.matrix[:2].T @ update.A.matrix[:2]
    torch.testing.assert_close(layer.stored_delta(), delta * (layer.weight != 0))
    assert not torch.allclose(logits(model), whole)
    torch.testing.assert_close(logits(model), by_hand(model), rtol=1e-4, atol=1e-5)


def test_report_says_how_many_zeros_there_are():
    model = pruned()
    shares = [(m.weight == 0).sum() / m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    text = inject_adapters(model, KINDS["lora"]).summary()
    assert min(shares[:-1]) > 0.3
    assert "% of the adapted weights are 0 and stay so." in text
    dense = tiny_llama()
    assert (
        "`keep_zeros` has no effect: none of the adapted weights is 0"
        in inject_adapters(dense, KINDS["lora"]).summary()
    )
    assert "zero" not in inject_adapters(tiny_llama(), LoRAConfig()).summary()


def test_what_cannot_be_said_of_a_masked_update_is_refused(tmp_path):
    model = adapted(KINDS["genlora"])
    for write in (export_lora, export_peft):
        with pytest.raises(ValueError, match=r"`keep_zeros`.*[Mm]erge the adapter into the base instead"):
            write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantized = pruned()
    layer: Any = quantized.get_submodule("model.layers.0.self_attn.q_proj")
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    before = copy.deepcopy(list(quantized.state_dict()))
    with pytest.raises(ValueError, match=r"`keep_zeros` is set, and .*q_proj is quantized"):
        inject_adapters(quantized, KINDS["lora"])
    assert list(quantized.state_dict()) == before
    with pytest.raises(TypeError, match="`keep_zeros` must be true or false"):
        LoRAConfig(keep_zeros="yes")


def test_several_adapters_are_summed_if_all_keep_zeros_and_not_computed_by_row():
    model = pruned()
    adapters = AdapterSet(model)
    for name, config in {"one": KINDS["lora"], "two": KINDS["genlora"]}.items():
        adapters.add(name, config)
    adapters.add("free", LoRAConfig(rank=2))
    adapters.activate({"one": 1.0, "two": -0.5})
    perturb(adapters)
    torch.testing.assert_close(logits(model), by_hand(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="some keep the base's zeros"):
        adapters.activate(["one", "free"])
    with pytest.raises(ValueError, match=r"'one' keeps the base's zeros .* not computed by row"):
        adapters.activate(rows=["one", "free"])
