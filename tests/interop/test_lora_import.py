from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from genlora_lightning import LoRAConfig, export_lora, import_lora, inject_adapters, load_adapter, save_adapter
from genlora_lightning.injection.inject import adapter_config, adapter_configs, adapter_layers, adapter_parameters
from tests.mixtures import PARAMETERS, mixture
from tests.models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[3, 5, 7, 2, 9]])


# PEFT asks transformers for it, which is going to rename it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Embeddings that are tied are adapted here on purpose, of which PEFT warns.
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings=True`:UserWarning"),
]


def untied_llama() -> nn.Module:
    return tiny_llama(tie_word_embeddings=False)


def write_lora(folder: Path, make=tiny_llama, **settings: object) -> torch.Tensor:
    """Write a LoRA with PEFT, no tensor of which is zero; what the model gives with it."""
    given = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    model = get_peft_model(make(), LoraConfig(**given)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return logits(model)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    output: torch.Tensor = model(input_ids=IDS).logits
    return output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.1}]
)
def test_lora_of_peft_comes_in_and_goes_out_again_with_every_bit(tmp_path, settings):
    wanted = write_lora(tmp_path / "peft", untied_llama, **settings)
    model = untied_llama()
    import_lora(model, tmp_path / "peft")
    model.eval()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    config = adapter_config(model)
    assert (config.kind, config.rank, config.alpha) == ("lora", 4, 12.0)
    assert config.scaling == ("sqrt_rank" if settings.get("use_rslora") else "rank")
    assert config.dropout == settings.get("lora_dropout", 0.0)

    export_lora(model, tmp_path / "back")
    before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(untied_llama(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=0)


def test_lora_of_conv1d_comes_in(tmp_path):
    wanted = write_lora(tmp_path / "peft", tiny_gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = tiny_gpt2()
    import_lora(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model.eval()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_ranks_and_alphas_of_their_own_come_in_and_go_out_with_every_bit(tmp_path, settings):
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 3}}
    wanted = write_lora(tmp_path / "peft", untied_llama, **patterns, **settings)
    model = untied_llama()
    import_lora(model, tmp_path / "peft")
    assert {name.rpartition(".")[2]: (c.rank, c.alpha) for name, c in adapter_configs(model).items()} == {
        "q_proj": (4, 12.0),
        "v_proj": (2, 12.0),
        "down_proj": (4, 3.0),
    }
    torch.testing.assert_close(logits(model.eval()), wanted, rtol=1e-5, atol=1e-5)
    export_lora(model, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 12.0, bool(settings.get("use_rslora")))
    assert set(config["rank_pattern"].values()) == {2}
    assert set(config["alpha_pattern"].values()) == {3.0}
    before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(untied_llama(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=0)
    again = untied_llama()
    load_adapter(again, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(again.eval()), logits(model))


@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"v_proj": 2}}])
@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (tiny_llama, [9, 3]),
        (untied_llama, [9, 3]),
        (untied_llama, {"embed_tokens": [9, 3], "lm_head": [60]}),
    ],
)
def test_rows_of_tokens_come_in_and_go_out_with_every_bit(tmp_path, make, tokens, patterns):
    wanted = write_lora(tmp_path / "peft", make, trainable_token_indices=tokens, **patterns)
    without = make()
    model = make()
    report = import_lora(model, tmp_path / "peft")
    model.eval()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(without.eval()), atol=1e-2)
    assert "embed_tokens" in str(report.summary())
    again = make()
    load_adapter(again, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(again.eval()), logits(model))

    export_lora(model, tmp_path / "back")
    before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(before.pop(rows).flip(0), after.pop(rows))  # by rising id, as the configuration then has them
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "back").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3], r"holds rows \(2, 16\) of model.embed_tokens, .* name 1 of its tokens"),
        (None, r"holds rows \(2, 16\) of model.embed_tokens, .* name 0 of its tokens"),
        ({"embed_tokens": [9, 3], "lm_head": [5]}, "for lm_head, and holds no rows"),
        ([3, 3], "trainable_token_indices"),
        ({"embed_tokens": "all"}, "trainable_token_indices"),
        ([9, 64], "token 64"),
    ],
)
def test_rows_that_do_not_fit_their_tokens_are_refused(tmp_path, tokens, message):
    write_lora(tmp_path / "peft", trainable_token_indices=[9, 3])
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": tokens}))
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        import_lora(model, tmp_path / "peft")
    assert not adapter_layers(model)


def test_tokens_without_rows_are_refused(tmp_path):
    write_lora(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": [3]}))
    with pytest.raises(ValueError, match="for the input embedding, and holds no rows"):
        import_lora(tiny_llama(), tmp_path / "peft")


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3", {"target_parameters": PARAMETERS}),
        ("gpt_oss", {"target_parameters": PARAMETERS, "use_rslora": True}),
        ("qwen3", {"target_parameters": PARAMETERS, "alpha_pattern": {"experts.down_proj": 3}}),
        ("qwen3", {"target_parameters": ["1.mlp.experts.down_proj"], "target_modules": []}),
    ],
)
def test_lora_of_experts_comes_in_and_goes_out_again_with_every_bit(tmp_path, kind, settings):
    given = {"lora_alpha": 3, "target_modules": ["q_proj"], **settings}
    wanted = write_lora(tmp_path / "peft", partial(mixture, kind), **given)
    model = mixture(kind)
    report = import_lora(model, tmp_path / "peft")
    torch.testing.assert_close(logits(model.eval()), wanted, rtol=1e-4, atol=1e-4)
    stacks = [name for name in adapter_layers(model) if "experts" in name]
    assert len(stacks) == (4 if given["target_parameters"] == PARAMETERS else 1)
    assert "stack" in report.summary()
    assert adapter_layers(model)[stacks[-1]].active_config.alpha == 3.0

    export_lora(model, tmp_path / "back")
    before, after = tensors(tmp_path / "peft"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = PeftModel.from_pretrained(mixture(kind), tmp_path / "back").eval()
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=0)
    again = mixture(kind)
    load_adapter(again, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(again.eval()), logits(model))


def test_lora_of_parameters_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    write_lora(tmp_path / "a", mixture, target_parameters=PARAMETERS)
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    for names, message in (
        (["experts.down_proj", "q_proj.weight"], "with model.layers.0.self_attn.q_proj.weight, which is no stack"),
        (["experts.gate_up_proj"], "no place for 2 of the modules, model.layers.0.mlp.experts.base_layer"),
        ([], "no place for 4 of the modules"),
        ("experts.down_proj", "target_parameters"),
    ):
        path.write_text(json.dumps(config | {"target_parameters": names}))
        model = mixture()
        with pytest.raises(ValueError, match=message):
            import_lora(model, tmp_path / "a")
        assert not adapter_layers(model)
        assert all(parameter.requires_grad for parameter in model.parameters())
    path.write_text(json.dumps(config))
    stored = tensors(tmp_path / "a")
    place = "base_model.model.model.layers.1.mlp.experts"
    A, B = (stored.pop(f"{place}.lora_{letter}.weight") for letter in "AB")
    cut = {f"{place}.lora_A.weight": A[:-1], f"{place}.lora_B.weight": B[:, :-1].contiguous()}
    for pair, message in ((cut, r"A of 19 rows for its 5 matrices"), ({}, "no LoRA of it")):
        save_file(stored | pair, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=rf"name model.layers.1.mlp.experts.down_proj, and it has {message}"):
            import_lora(mixture(), tmp_path / "a")


def test_imported_lora_is_trained_on_and_saved(tmp_path):
    write_lora(tmp_path / "peft")
    model = tiny_llama()
    import_lora(model, tmp_path / "peft")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_parameters(model))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter_parameters(model).values())
    save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "`use_dora`: DoRA's magnitudes are more than a plain LoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "changed base weights"),
        ({"peft_type": "VERA"}, "a PEFT adapter of type VERA, not a LoRA"),
    ],
)
def test_what_is_more_than_a_plain_lora_is_refused(tmp_path, change, message):
    write_lora(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        import_lora(tiny_llama(), tmp_path / "peft")


def test_lora_of_another_base_leaves_the_model_as_it_was(tmp_path):
    write_lora(tmp_path / "peft")
    found = tensors(tmp_path / "peft")
    name = next(name for name in found if "v_proj.lora_A" in name)
    save_file({**found, name: torch.zeros(4, 99)}, tmp_path / "peft" / "adapter_model.safetensors")
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"have another shape .*\(4, 99\), needed \(4, 16\)"):
        import_lora(model, tmp_path / "peft")
    assert not adapter_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"v_proj": 2}}])
def test_lora_of_layers_that_the_model_does_not_have_is_refused(tmp_path, patterns):
    write_lora(tmp_path / "peft", trainable_token_indices=[9], **patterns)
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="does not fit this GPT2LMHeadModel"):
        import_lora(model, tmp_path / "peft")
    assert not adapter_layers(model)


def test_model_with_adapters_is_refused(tmp_path):
    write_lora(tmp_path / "peft")
    model = tiny_llama()
    inject_adapters(model, LoRAConfig())
    with pytest.raises(ValueError, match="already has adapters"):
        import_lora(model, tmp_path / "peft")
