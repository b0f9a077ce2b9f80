from __future__ import annotations

import errno
import json
import os

import pytest
import torch
from torch import nn

from genlora_lightning import adapter_io, inject_adapters, load_adapter, save_adapter
from genlora_lightning.injection import adapter_layers
from tests.conftest import perturb, small_config
from tests.models import tiny_llama

IDS = torch.arange(12).view(2, 6)


def trained(**changes: object) -> nn.Module:
    model = tiny_llama().eval()
    inject_adapters(model, small_config(**changes))
    perturb(model)
    return model


def test_saved_adapter_gives_the_same_logits_in_a_fresh_base_bit_for_bit(tmp_path):
    model = trained(modules_to_train=["norm"])
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    expected = model(IDS).logits
    folder = save_adapter(model, tmp_path / "deep" / "adapter", training={"global_step": 3})
    fresh = tiny_llama().eval()
    assert not torch.allclose(fresh(IDS).logits, expected, atol=1e-3)
    report = load_adapter(fresh, folder)
    assert torch.equal(fresh(IDS).logits, expected)
    assert len(report.adapted) == 14
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    description = json.loads((folder / "adapter_config.json").read_text())
    assert description["training"] == {"global_step": 3}
    assert description["config"]["modules_to_train"] == ["norm"]


def test_folder_holds_the_adapter_only(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    values = sum(p.numel() for layer in adapter_layers(model).values() for p in layer.adapter_parameters().values())
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * values + 16_384
    assert adapter_io.adapter_bytes(folder) == sum(f.stat().st_size for f in folder.iterdir())


def test_merged_model_saves_the_same_adapter(tmp_path):
    model = trained()
    plain = save_adapter(model, tmp_path / "plain")
    from genlora_lightning import merge_adapters

    merge_adapters(model)
    merged = save_adapter(model, tmp_path / "merged")
    assert (plain / "adapter_model.safetensors").read_bytes() == (merged / "adapter_model.safetensors").read_bytes()


def test_saving_again_replaces_an_adapter_and_never_another_folder(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    first = (folder / "adapter_model.safetensors").read_bytes()
    perturb(model)
    save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert os.listdir(tmp_path) == ["adapter"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis exists and is not an adapter folder"):
        save_adapter(model, other)
    assert (other / "chapter1.txt").read_text() == "years of work"


def test_full_disk_leaves_the_older_adapter_and_nothing_else(tmp_path, monkeypatch):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    perturb(model)
    monkeypatch.setattr(adapter_io, "save_file", full)
    with pytest.raises(OSError, match=r"bytes\) could not be saved to .*No space left on device.*check that there is"):
        save_adapter(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_failed_rename_brings_the_older_adapter_back(tmp_path, monkeypatch):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    rename, calls = os.rename, []

    def second_fails(source: object, target: object) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter_io.os, "rename", second_fails)
    with pytest.raises(OSError, match="Input/output error"):
        save_adapter(model, folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["adapter"]


def test_adapter_with_nan_is_not_saved_over_a_good_one(tmp_path):
    model = trained()
    folder = save_adapter(model, tmp_path / "adapter")
    good = (folder / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(iter(adapter_layers(model).values())).generator_A.latent[0] = float("nan")
    with pytest.raises(ValueError, match=r"1 of 112 tensors hold NaN or infinite values \(model.layers.0"):
        save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == good


def damage_weights(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    edit(folder, config=config | changes)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_weights, ValueError, r"safetensors \([\d,]+ bytes\) is damaged or incomplete"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), FileNotFoundError, r"no complete adapter folder"),
        (
            lambda f: (f / "adapter_config.json").unlink(),
            FileNotFoundError,
            r"it has no adapter_config.json \(it holds ad",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), ValueError, r"adapter_config.json is damaged"),
        (lambda f: edit(f, format_version=2), ValueError, r"has format version 2; .* update genlora-lightning"),
        (lambda f: edit(f, format=None, peft_type="LORA"), ValueError, r"It is a PEFT adapter of type LORA"),
        (lambda f: edit(f, config={"rank": 0}), ValueError, r"holds no valid configuration: `rank` must be at least 1"),
        (lambda f: edit(f, config={"r": 8}), ValueError, r"holds no valid configuration: Unknown GenLoRAConfig"),
        (lambda f: edit_config(f, rank=5), ValueError, r"another shape .*stored \(2, 4, 1\), needed \(2, 5, 1\)"),
        (lambda f: edit_config(f, target_modules=["q_proj"]), ValueError, r"96 tensors have no place in the model"),
    ],
)
def test_damaged_or_disagreeing_folder_is_a_clear_error_and_leaves_the_model_as_it_was(
    tmp_path, damage, error, message
):
    folder = save_adapter(trained(), tmp_path / "adapter")
    damage(folder)
    fresh = tiny_llama().eval()
    expected, names = fresh(IDS).logits, list(fresh.state_dict())
    fresh.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in fresh.parameters()]
    with pytest.raises(error, match=message):
        load_adapter(fresh, folder)
    assert list(fresh.state_dict()) == names
    assert [p.requires_grad for p in fresh.parameters()] == flags
    assert torch.equal(fresh(IDS).logits, expected)


def test_adapter_of_another_base_is_an_error_that_says_so(tmp_path):
    folder = save_adapter(trained(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not fit this model: .* It was probably trained on another base model"):
        load_adapter(tiny_llama(num_hidden_layers=3), folder)
    with pytest.raises(ValueError, match=r"does not fit this Sequential: This Sequential has no nn.Linear"):
        load_adapter(nn.Sequential(nn.ReLU()), folder)


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no adapter folder"):
        load_adapter(tiny_llama(), tmp_path / "nowhere")


def test_loading_into_a_model_with_adapters_of_another_configuration_is_an_error(tmp_path):
    folder = save_adapter(trained(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"another configuration \(rank: 6 there, 4 asked for\)"):
        load_adapter(trained(rank=6), folder)


def test_base_model_name_is_that_of_the_transformers_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert adapter_io.base_model_name(nn.ModuleDict({"m": model})) == str(tmp_path / "base")
    assert adapter_io.base_model_name(nn.Linear(2, 2)) is None
