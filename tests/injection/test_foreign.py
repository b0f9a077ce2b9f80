"""Models that other libraries have changed, or save."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genlora_lightning import inject_adapters, merge_adapters, remove_adapters
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from tests.conftest import perturb, small_config
from tests.models import tiny_llama, tiny_t5

IDS = torch.arange(12).view(2, 6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model", "modules_to_save"])
def test_adapters_of_peft_are_refused_and_left_as_they_are(rank, way):
    import peft

    model = tiny_llama()
    trained = ["norm"] if way == "modules_to_save" else None
    config = peft.LoraConfig(r=rank, target_modules=["q_proj"], modules_to_save=trained)
    if way == "add_adapter":
        try:
            model.add_adapter(config)
        except ValueError as error:  # transformers asks for a PEFT that is newer than the newest
            if "version of PEFT you are using is not compatible" in str(error):
                pytest.skip(str(error))
            raise
    else:
        model = peft.get_peft_model(model, config)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"has adapters of peft \(.* is a .*\), .*`model = peft_model.merge_and_un"):
        inject_adapters(nn.ModuleDict({"inner": model}), small_config())
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    if way == "get_peft_model":
        assert len(inject_adapters(model.merge_and_unload(), small_config()).adapted) == 14


@pytest.mark.filterwarnings("ignore:`save_pretrained` saves the base")
def test_saved_pretrained_model_is_the_base_and_an_adapted_model_loads_it(tmp_path):
    from transformers import LlamaForCausalLM

    base = tiny_llama(tie_word_embeddings=False).eval()
    model = copy.deepcopy(base)
    inject_adapters(model, small_config(modules_to_train=["lm_head"]))
    perturb(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
        base.lm_head.weight.mul_(1.1)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())  # as transformers' Trainer does
    model.save_pretrained(tmp_path / "again", is_main_process=True)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) == set(base.state_dict()) | set(adapter_parameters(model))
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(saved)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(IDS).logits, base(IDS).logits)

    other = tiny_llama(tie_word_embeddings=False, num_hidden_layers=2).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    inject_adapters(other, small_config(modules_to_train=["lm_head"]))
    other.load_state_dict(saved)  # each of its names is known
    assert torch.equal(other(IDS).logits, expected)


def test_saved_pretrained_model_says_what_it_leaves_out_and_is_merged_if_the_adapters_are(tmp_path, recwarn):
    from transformers import LlamaForCausalLM

    holder = nn.ModuleDict({"lm": tiny_llama().eval()})
    model = holder["lm"]
    inject_adapters(holder, small_config())
    perturb(model)
    with pytest.warns(UserWarning, match=r"gives the base without them. Keep what was trained with `save_adapter"):
        model.save_pretrained(tmp_path / "adapted")
    merge_adapters(model)
    recwarn.clear()
    model.save_pretrained(tmp_path / "merged")
    assert not [w for w in recwarn if "save_pretrained" in str(w.message)]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    remove_adapters(holder)
    model.save_pretrained(tmp_path / "plain")
    assert set(load_file(tmp_path / "plain" / "model.safetensors")) <= set(tiny_llama().state_dict())


@pytest.mark.filterwarnings("ignore:`save_pretrained` saves the base")
def test_model_of_which_a_part_was_adapted_saves_all_of_its_base(tmp_path):
    from transformers import T5ForSequenceClassification

    base = tiny_t5().eval()
    whole = copy.deepcopy(base)
    part = whole.transformer.encoder
    inject_adapters(part, small_config())
    perturb(part)
    whole.save_pretrained(tmp_path / "whole")
    ids = torch.tensor([[5, 6, 7, 1]])
    loaded, info = T5ForSequenceClassification.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"]
    torch.testing.assert_close(loaded.eval()(ids).logits, base(ids).logits)
    assert (whole(ids).logits - base(ids).logits).abs().max() > 1e-3

    merge_adapters(part)
    whole.save_pretrained(tmp_path / "merged")
    merged = T5ForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, whole(ids).logits)


@pytest.mark.filterwarnings("ignore:`save_pretrained` saves the base")
def test_copy_of_an_adapted_model_saves_itself(tmp_path):
    model = tiny_llama().eval()
    inject_adapters(model, small_config())
    for way, twin in (("copied", copy.deepcopy(model)), ("pickled", pickle.loads(pickle.dumps(model)))):
        perturb(twin)
        twin.save_pretrained(tmp_path / way)
        saved = load_file(tmp_path / way / "model.safetensors")
        assert all(torch.equal(saved[name], p) for name, p in adapter_parameters(twin).items())
        assert adapter_layers(twin)["model.layers.0.mlp.up_proj"].acts()


def test_quantized_model_with_adapters_says_how_to_save(tmp_path):
    model = tiny_llama()
    model.hf_quantizer = object()
    inject_adapters(model, small_config())
    with pytest.raises(ValueError, match=r"cannot save a quantized model .*`save_adapter\(model, folder\)`"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
