from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from genlora_lightning.adapters.genlora.generator import RBFGenerator
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.injection.state import load_adapter_state
from genlora_lightning.interop.peft import GenLoraLinear
from genlora_lightning.layers.sharing import set_fused
from tests.interop.peft.conftest import move, small
from tests.models import tiny_gpt2, tiny_llama


def layers(model: nn.Module) -> list[GenLoraLinear]:
    return [module for module in model.modules() if isinstance(module, GenLoraLinear)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_is_the_library_s_own_layer_bit_for_bit(make, tokens):
    model = get_peft_model(make().train(False), small())
    move(model)
    ours = make().train(False)
    inject_adapters(ours, small().to_adapter_config())
    prefix = "base_model.model."
    state = {
        name.removeprefix(prefix).replace(".genlora_", ".update.").replace(".default.", "."): value
        for name, value in model.state_dict().items()
        if ".genlora_" in name
    }
    load_adapter_state(ours, state, "PEFT")
    output, expected = model(tokens).logits, ours(tokens).logits
    assert torch.equal(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    mine = [g for name, g in gradients(model).items() if ".genlora_" in name]
    theirs = [g for name, g in gradients(ours).items() if ".update." in name]
    assert len(mine) == 4 * len(layers(model))
    assert all(map(torch.equal, mine, theirs))


def test_one_function_and_plain_autograd_give_the_same(llama, tokens):
    model = get_peft_model(llama, small()).double()
    move(model)
    model(tokens).logits.square().sum().backward()
    fused = gradients(model)
    model.zero_grad()
    set_fused(model, False)
    model(tokens).logits.square().sum().backward()
    plain = gradients(model)
    assert fused.keys() == plain.keys()
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-12)


def test_matrices_of_one_shape_are_made_at_once_and_kept(llama, tokens, monkeypatch):
    model = get_peft_model(llama, small())
    made = []
    original = RBFGenerator.make_many.__func__
    monkeypatch.setattr(
        RBFGenerator, "make_many", classmethod(lambda cls, f, **k: (made.append(len(f)), original(cls, f, **k))[1])
    )
    model(tokens)
    assert sum(made) == 2 * len(layers(model)) == 28
    assert len(made) == 5  # A of 16 and 24 inputs, B of 8, 16 and 24 outputs
    with torch.no_grad():
        model(tokens)
        made.clear()
        model(tokens)
    assert not made


def test_adapters_that_are_switched_without_autograd_are_those_that_act(llama, tokens):
    model = get_peft_model(llama, small())
    model.add_adapter("other", small())
    move(model, "default")
    move(model, "other")
    with torch.no_grad():
        first = model(tokens).logits
        model.set_adapter("other")
        second = model(tokens).logits
        assert not torch.allclose(first, second)
        model.set_adapter("default")
        assert torch.equal(model(tokens).logits, first)


def test_several_active_adapters_add_up(tokens):
    x = torch.randn(5, 8)
    base = nn.Linear(8, 6)
    expected = base(x)
    model = get_peft_model(nn.Sequential(base), small(target_modules=["0"]))
    model.add_adapter("other", small(target_modules=["0"], r=3))
    move(model, "default")
    move(model, "other")
    layer = layers(model)[0]
    for name in ("default", "other"):
        expected = expected + x @ layer.get_delta_weight(name).T
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


def test_casts_are_obeyed_and_what_is_fixed_takes_part():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6).bfloat16()), small(target_modules=["0"]))
    factor = layers(model)[0].genlora_A["default"]
    assert {tensor.dtype for tensor in factor.parts()} == {torch.float32}  # PEFT's own rule for small dtypes
    assert sorted(dict(factor.named_buffers())) == ["centers", "log_widths"]
    model.half()
    assert {tensor.dtype for tensor in factor.parts()} == {torch.float16}
    kept = get_peft_model(
        nn.Sequential(nn.Linear(8, 6).bfloat16()), small(target_modules=["0"]), autocast_adapter_dtype=False
    )
    assert {tensor.dtype for tensor in layers(kept)[0].genlora_A["default"].parts()} == {torch.bfloat16}
    assert kept(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_give_the_same_and_the_base_comes_back(dtype, tokens):
    model = get_peft_model(tiny_gpt2().to(dtype).eval(), small())
    start = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    move(model, scale=0.1)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (5e-2, 5e-2)
    with torch.no_grad():
        expected = model(tokens).logits
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=rtol, atol=atol)
        model.unmerge_adapter()
    for name, value in start.items():
        rounding = 4 * torch.finfo(dtype).eps * value.abs().max().item()
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0.0, atol=rounding)


def test_weight_that_would_not_be_finite_is_not_merged():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), small(target_modules=["0"], init_weights=False))
    layer = layers(model)[0]
    before = layer.weight.clone()
    with torch.no_grad():
        layer.genlora_B["default"].weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


def test_dropout_acts_in_training_alone():
    model = get_peft_model(nn.Sequential(nn.Linear(64, 6)), small(target_modules=["0"], lora_dropout=0.5))
    move(model)
    x = torch.randn(3, 64)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_gradient_checkpointing_gives_the_same_gradients(tokens):
    found = []
    for kind in (None, True, False):
        torch.manual_seed(1)
        model = get_peft_model(tiny_llama().train(), small())
        torch.manual_seed(2)
        move(model)
        if kind is not None:
            model.enable_input_require_grads()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # its name in transformers to come
                model.gradient_checkpointing_enable({"use_reentrant": kind})
            model.config.use_cache = False
        model(tokens).logits.square().sum().backward()
        found.append(gradients(model))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, found[0][name])


def test_copy_of_a_model_is_a_model_of_its_own(llama, tokens):
    model = get_peft_model(llama, small())
    move(model)
    with torch.no_grad():
        expected = model(tokens).logits
        other = copy.deepcopy(model)
        move(other)
        assert not torch.equal(other(tokens).logits, expected)
        assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_bases_quantized_by_bitsandbytes_are_trained_and_merged(kind):
    bnb = pytest.importorskip("bitsandbytes")
    make = bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt
    options = {"compute_dtype": torch.float32, "quant_type": "nf4"} if kind == "nf4" else {"has_fp16_weights": False}
    base = nn.Sequential(make(64, 64, **options))
    base[0].load_state_dict(nn.Linear(64, 64).state_dict())
    base.to("cpu")
    x = torch.randn(4, 64)
    expected = base(x)
    model = get_peft_model(base, small(target_modules=["0"]))
    assert torch.equal(model(x), expected)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    trained = model.eval()(x).detach()
    model.merge_adapter()  # to the rounding of the quantization
    assert (model(x) - trained).norm() < 0.5 * (trained - expected).norm() + 0.2 * expected.norm()


def test_weights_that_bitsandbytes_packed_in_a_forward_are_unpacked():
    bnb = pytest.importorskip("bitsandbytes")
    base = nn.Sequential(bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"))
    base[0].load_state_dict(nn.Linear(64, 64).state_dict())
    weight = base.to("cpu")[0].weight
    loaded, x = weight.data.clone(), torch.randn(4, 64)
    expected = base(x)
    packed = bnb.functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    weight.data, weight.quant_state = packed  # as in a forward without gradients on CPUs with bfloat16 arithmetic
    assert weight.shape != loaded.shape or not torch.equal(weight, loaded)
    model = get_peft_model(base, small(target_modules=["0"]))
    assert torch.equal(weight, loaded)
    torch.testing.assert_close(model.eval()(x), expected, rtol=0.02, atol=0.02)  # the scales were rounded


def test_base_quantized_by_torchao_is_trained():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    class Config:
        @staticmethod
        def get_apply_tensor_subclass() -> Int8WeightOnlyConfig:
            return Int8WeightOnlyConfig()

    class Base(nn.Sequential):
        hf_quantizer = type("Quantizer", (), {"quantization_config": Config})

    base = Base(nn.Linear(64, 64))
    quantize_(base, Config.get_apply_tensor_subclass())
    x = torch.randn(4, 64)
    expected = base(x)
    model = get_peft_model(base, small(target_modules=["0"]))
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    move(model)
    trained = model(x).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(x), trained, rtol=0.1, atol=0.1)
