"""The command line's tools on folders in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from genlora_lightning.cli.main import main
from genlora_lightning.injection.inject import effective_ranks
from genlora_lightning.interop.lora_import import import_lora
from genlora_lightning.interop.peft_report import describe_peft
from tests.mixtures import PARAMETERS, mixture
from tests.models import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

IDS = torch.arange(12).view(2, 6)
LINEARS = ["q_proj", "v_proj", "down_proj"]


def write(folder: Path, config: Any, make: Any = tiny_llama, *, trained: bool = True) -> Path:
    """A folder that PEFT writes, no tensor of which is zero."""
    model = peft.get_peft_model(make(), config)
    for name, parameter in model.named_parameters():
        if trained and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)
    return folder


def change(folder: Path, edit: Any) -> None:
    """Change the tensors of a folder as something else than PEFT would."""
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def tool(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # what was written before
    code = main([str(argument) for argument in arguments])
    text = capsys.readouterr()
    return code, text.out, text.err


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_lora_is_described_by_layer_with_its_own_ranks_and_scalings(tmp_path, capsys):
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=LINEARS, use_rslora=True, rank_pattern={"v_proj": 2}, modules_to_save=["norm"]
    )
    folder = write(tmp_path / "lora", config)
    code, text, _ = tool(capsys, "inspect", folder, "--json")
    found = json.loads(text)
    assert code == 0
    rows = {row["module"]: row for row in found["rows"]}
    assert len(rows) == 6
    wide, narrow = rows["model.layers.0.mlp.down_proj"], rows["model.layers.1.self_attn.v_proj"]
    assert (wide["shape"], wide["rank"], wide["scaling"]) == ([16, 24], 4, 4.0)
    assert (narrow["shape"], narrow["rank"], narrow["scaling"]) == ([8, 16], 2, pytest.approx(8 / 2**0.5))
    assert 1 < narrow["effective_rank"] <= 2 < wide["effective_rank"] <= 4
    norms = [f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")]
    assert found["saved"] == dict.fromkeys(["model.norm", *norms], 16)  # PEFT matches parts of names, too
    assert found["settings"] == {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "modules_to_save": ["norm"]}
    assert found["problems"] == []
    code, text, _ = tool(capsys, "inspect", folder)
    assert "no manifest of ours says what they were" in text
    assert "PEFT adapter of type LORA (use_rslora=True" in text


@pytest.mark.parametrize("kind", ["dora", "vera", "ia3", "embedding"])
def test_other_kinds_are_described_and_fit_their_base(tmp_path, capsys, base, kind):
    configs = {
        "dora": peft.LoraConfig(r=2, target_modules=LINEARS, use_dora=True),
        "vera": peft.VeraConfig(r=2, target_modules=LINEARS),
        "ia3": peft.IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"]),
        "embedding": peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        model = peft.get_peft_model(tiny_llama(tie_word_embeddings=False), configs[kind])
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / kind, save_embedding_layers=False)
    code, text, error = tool(capsys, "verify", tmp_path / kind, "--base", base)
    assert (code, error) == (0, "")
    assert "which has all its names and shapes" in text
    description = describe_peft(str(tmp_path / kind))
    assert description.parameters == sum(
        t.numel() for t in load_file(tmp_path / kind / "adapter_model.safetensors").values()
    )
    if kind == "embedding":
        shapes = {row.module: row.shape for row in description.rows}
        assert shapes["model.embed_tokens"] == (64, 16)


def test_what_makes_an_adapter_useless_is_found(tmp_path, capsys, base):
    config = peft.LoraConfig(r=2, target_modules=LINEARS)
    idle = write(tmp_path / "idle", config, trained=False)
    code, _, error = tool(capsys, "verify", idle)
    assert code == 1
    assert "It does nothing: B or A is zero in all 6 modules" in error
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"

    def broken(tensors):
        tensors[first + "A.weight"][0, 0] = float("nan")

    def half(tensors):
        del tensors[first + "B.weight"]

    def zero(tensors):
        tensors[first + "B.weight"].zero_()

    def renamed(tensors):
        for name in list(tensors):
            tensors[name.replace("base_model.model.model.", "base_model.model.net.model.")] = tensors.pop(name)

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    def wide(tensors):
        tensors[first + "A.weight"] = torch.ones(2, 17)

    for edit, words in (
        (broken, "1 tensors hold NaN or infinite values"),
        (half, "1 modules have no A and B that belong together"),
        (zero, "In 1 of 6 modules B or A is zero"),
        (renamed, "All adapted modules are not there in this LlamaForCausalLM"),
        (bare, "PEFT would load none of them"),
        (wide, "1 modules have another shape: model.layers.0.self_attn.q_proj is (16, 16) there"),
    ):
        folder = write(tmp_path / edit.__name__, config)
        change(folder, edit)
        code, _, error = tool(capsys, "verify", folder, "--base", base)
        assert code == 1, edit
        assert words in error
    assert "begin without 'net.'" in tool(capsys, "verify", tmp_path / "renamed", "--base", base)[2]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_llama, {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"down_proj": 32}}),
        (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_merged_folder_is_that_of_peft_to_rounding(tmp_path, capsys, make, settings):
    make().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**{"r": 4, "target_modules": LINEARS, **settings})
    folder = write(tmp_path / "lora", config, make)
    code, text, error = tool(capsys, "merge", folder, tmp_path / "base", tmp_path / "merged")
    assert (code, error) == (0, "")
    assert "relative error of ΔW" in text
    theirs = peft.PeftModel.from_pretrained(make(), folder).merge_and_unload().eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    changed = 0
    plain = make().state_dict()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)
        changed += not torch.equal(tensor, plain[name])
    assert changed == (2 if make is tiny_gpt2 else 6)
    torch.testing.assert_close(merged(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_kinds_that_are_more_than_a_lora_are_not_merged_and_named(tmp_path, capsys, base):
    folder = write(tmp_path / "dora", peft.LoraConfig(r=2, target_modules=LINEARS, use_dora=True))
    code, _, error = tool(capsys, "merge", folder, base, tmp_path / "merged")
    assert code == 1
    assert "has `use_dora`: DoRA's magnitudes are more than a plain LoRA's" in error
    folder = write(tmp_path / "vera", peft.VeraConfig(r=2, target_modules=LINEARS))
    assert "describes a PEFT adapter of type VERA, not a LoRA" in tool(capsys, "merge", folder, base, tmp_path / "m")[2]


def test_folder_with_our_manifest_is_proved_to_be_for_its_base(tmp_path, capsys, base):
    from genlora_lightning import save_adapter
    from genlora_lightning.injection.peft_adapters import PeftAdapter, inject_peft

    model = AutoModelForCausalLM.from_pretrained(base)
    inject_peft(model, PeftAdapter.of(peft.LoraConfig(r=2, target_modules=LINEARS, init_lora_weights=False)))
    folder = save_adapter(model, tmp_path / "adapter", training={"global_step": 3})
    code, text, error = tool(capsys, "verify", folder, "--base", base)
    assert (code, error) == (0, "")
    assert "their digests are those in its manifest" in text
    assert "is the base it was trained on" in text
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 0.1
    other.save_pretrained(tmp_path / "other")
    for command in (
        ("verify", folder, "--base", tmp_path / "other"),
        ("merge", folder, tmp_path / "other", tmp_path / "m"),
    ):
        code, _, error = tool(capsys, *command)
        assert code == 1
        assert "was trained on another base" in error
    assert not (tmp_path / "m").exists()
    assert tool(capsys, "merge", folder, base, tmp_path / "m")[0] == 0


def test_our_own_folder_is_proved_to_be_for_its_base(tmp_path, capsys, base):
    from genlora_lightning import LoRAConfig, inject_adapters, save_adapter

    model = AutoModelForCausalLM.from_pretrained(base)
    inject_adapters(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    code, text, _ = tool(capsys, "verify", tmp_path / "adapter", "--base", base)
    assert code == 0
    assert "is the base it was trained on" in text


def test_trained_tokens_are_among_the_settings(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[9, 3])
    found = describe_peft(str(write(tmp_path / "lora", config)))
    assert found.settings == {"trainable_token_indices": [9, 3]}
    assert found.saved == {"model.embed_tokens.token_adapter.trainable_tokens_delta": 32}
    assert found.problems == ()


def test_experts_are_described_matrix_by_matrix(tmp_path, capsys):
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj"], target_parameters=PARAMETERS)
    folder = write(tmp_path / "lora", config, mixture)
    described = describe_peft(str(folder), mixture())
    assert not described.problems
    assert set(described.settings["target_parameters"]) == set(PARAMETERS)
    rows = {row.module.removeprefix("model.layers.1."): row for row in described.rows}
    inner, outer = rows["mlp.experts.base_layer"], rows["mlp.experts"]
    assert (inner.shape, inner.rank, inner.scaling) == ((5, 24, 16), 2, 4.0)
    assert (outer.shape, outer.rank, outer.parameters) == ((5, 16, 12), 2, 5 * 2 * (16 + 12))
    assert (rows["self_attn.q_proj"].shape, rows["self_attn.q_proj"].rank) == ((16, 16), 2)
    model = mixture()
    import_lora(model, folder)
    measured = effective_ranks(model)
    assert inner.effective_rank == pytest.approx(measured["model.layers.1.mlp.experts.gate_up_proj"])
    assert outer.effective_rank == pytest.approx(measured["model.layers.1.mlp.experts.down_proj"])

    mixture().save_pretrained(tmp_path / "base")
    code, printed, _ = tool(capsys, "merge", folder, tmp_path / "base", tmp_path / "merged")
    assert code == 0, printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, model.eval()(IDS).logits, rtol=1e-3, atol=1e-3)

    # With ranks of their own the files do not say for how many matrices a pair is.
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"experts.down_proj": 1}}))
    own = {row.module: row for row in describe_peft(str(folder)).rows}["model.layers.1.mlp.experts"]
    assert (own.shape, own.rank, own.effective_rank, own.scaling) == ((16, 12), None, None, None)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("lora_alpha", [8]), ("alpha_pattern", {"q_proj": None}), ("modules_to_save", 3), ("modules_to_save", "lm_head")],
)
def test_setting_of_another_type_is_told_with_its_file(tmp_path, setting, value):
    folder = write(tmp_path / "lora", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(ValueError, match=rf"adapter_config.json .*{setting}"):
        describe_peft(str(folder))


def test_factors_without_values_are_described(tmp_path):
    folder = write(tmp_path / "lora", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_"

    def empty(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{first}A.weight"], tensors[f"{first}B.weight"] = torch.zeros(0, 16), torch.zeros(16, 0)

    change(folder, empty)
    found = describe_peft(str(folder))
    assert (found.rows[0].rank, found.rows[0].effective_rank, found.rows[0].scaling) == (0, None, None)
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["shape"] == [16, 16]
    assert "In 1 of 2 modules B or A is zero" in str(found)
