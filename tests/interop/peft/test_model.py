from __future__ import annotations

import peft
import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, save_as_lora
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from genlora_lightning.artifacts.adapter_io import save_adapter
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.layers.sharing import sharing_modules
from tests.conftest import small_config
from tests.interop.peft.conftest import move, small
from tests.models import tiny_bert, tiny_llama


def test_new_adapter_changes_nothing(llama, tokens):
    expected = llama(tokens).logits
    model = get_peft_model(llama, small())
    assert torch.equal(model(tokens).logits, expected)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".genlora_" in name and name.endswith(("latent", "weight")) for name in trained)


def test_saved_adapter_loads_with_every_bit(llama, tokens, tmp_path):
    llama.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()  # which knows where it came from
    model = get_peft_model(base, small(task_type="CAUSAL_LM"))
    move(model)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.equal(
            PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / "adapter")(tokens).logits, expected
        )
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        assert torch.equal(loaded.eval()(tokens).logits, expected)
        lean = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path / "adapter", low_cpu_mem_usage=True)
        assert torch.equal(lean(tokens).logits, expected)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") and ".genlora_" in name for name in stored)


def test_adapter_loads_into_a_bfloat16_base_without_rounding(llama, tmp_path):
    model = get_peft_model(llama, small())
    move(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path)
    expected = {name: value for name, value in model.state_dict().items() if ".genlora_" in name}
    found = {name: value for name, value in loaded.state_dict().items() if ".genlora_" in name}
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_adapters_are_switched_off_deleted_and_taken_out(llama, tokens):
    with torch.no_grad():
        base = llama(tokens).logits
        model = get_peft_model(llama, small())
        model.add_adapter("other", small(r=2))
        move(model)
        first = model(tokens).logits
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, base)
        assert torch.equal(model(tokens).logits, first)
        model.set_adapter("other")
        model.delete_adapter("default")
        assert not [name for name in model.state_dict() if ".default." in name]
        assert torch.equal(model(tokens).logits, base)
        plain = model.unload()
        assert torch.equal(plain(tokens).logits, base)
    assert not sharing_modules(plain)


def test_merged_model_is_a_plain_one(llama, tokens):
    model = get_peft_model(llama, small())
    move(model)
    with torch.no_grad():
        expected = model(tokens).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert not [module for module in merged.modules() if hasattr(module, "base_layer")]
    assert not sharing_modules(merged)


def test_modules_to_save_are_trained_and_saved(tmp_path):
    tokens = torch.randint(0, 64, (2, 9))
    model = get_peft_model(tiny_bert().eval(), small(modules_to_save=["classifier"], task_type="SEQ_CLS"))
    move(model)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
        model.save_pretrained(tmp_path)
        expected = model(tokens).logits
        assert torch.equal(PeftModel.from_pretrained(tiny_bert().eval(), tmp_path)(tokens).logits, expected)


def test_lora_of_its_rank_is_exact(llama, tokens, tmp_path):
    model = get_peft_model(llama, small())
    move(model)
    save_as_lora(tmp_path, model, rank=4)
    with torch.no_grad():
        expected = model(tokens).logits
        served = PeftModel.from_pretrained(tiny_llama().eval(), tmp_path)
        assert served.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(served(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason=f"transformers needs PEFT {MIN_PEFT_VERSION} for it"
)
def test_transformers_adds_loads_and_switches_adapters(llama, tokens, tmp_path):
    with torch.no_grad():
        base = llama(tokens).logits
        llama.add_adapter(small(), adapter_name="own")
        move(llama, "own")
        expected = llama(tokens).logits
        assert not torch.allclose(expected, base)
        llama.save_pretrained(tmp_path)
        other = tiny_llama().eval()
        other.load_adapter(str(tmp_path), adapter_name="theirs")
        assert torch.equal(other(tokens).logits, expected)
        other.disable_adapters()
        assert torch.equal(other(tokens).logits, base)


def test_generated_text_is_that_of_the_merged_model(llama):
    model = get_peft_model(llama, small(task_type="CAUSAL_LM"))
    move(model)
    prompt = torch.tensor([[1, 2, 3]])
    own = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    merged = model.merge_and_unload().generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(own, merged)


def test_tuners_are_not_mixed(llama):
    model = get_peft_model(llama, small())
    with pytest.raises(ValueError, match=r"Cannot combine adapters with different peft types\. .*GENLORA"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))


def test_model_with_adapters_of_the_library_is_refused(llama):
    inject_adapters(llama, small_config(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"q_proj has an adapter of genlora_lightning itself. .* `genlora convert"):
        get_peft_model(llama, small(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "target", [nn.Embedding(4, 8), nn.Conv2d(2, 2, 1), nn.LayerNorm(4), nn.MultiheadAttention(4, 2)]
)
def test_what_is_no_linear_is_refused(target):
    with pytest.raises(TypeError, match=rf"0 is a {type(target).__name__}, which GenLoRA cannot adapt"):
        get_peft_model(nn.Sequential(target), small(target_modules=["0"]))


def test_more_groups_than_outputs_are_refused():
    with pytest.raises(ValueError, match=r"`num_groups_b` is 8, but a linear of .* has only 3 outputs"):
        get_peft_model(nn.Sequential(nn.Linear(5, 3)), small(target_modules=["0"], num_groups_b=8))


def test_peft_that_does_not_know_the_kind_names_it(llama, tmp_path, monkeypatch):
    get_peft_model(llama, small()).save_pretrained(tmp_path)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, peft.PeftType("GENLORA"))
    with pytest.raises(KeyError, match="GENLORA"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_peft_that_is_given_a_folder_of_the_library_says_what_to_do(llama, tmp_path):
    inject_adapters(llama, small_config())
    save_adapter(llama, tmp_path / "adapter")
    with pytest.raises(KeyError, match="genlora convert"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
