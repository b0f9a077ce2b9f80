from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.artifacts.adapter_io import load_adapter, save_adapter
from genlora_lightning.cli.main import main
from genlora_lightning.injection.inject import adapter_layers, inject_adapters
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.interop.peft_folders import export_peft, import_peft
from tests.conftest import perturb, small_config
from tests.models import tiny_bert, tiny_gpt2, tiny_llama


def peft_with_genlora():
    peft = pytest.importorskip("peft")
    if not peft.__version__.startswith("0.21."):
        pytest.skip("GenLoRA is a tuner of PEFT 0.21")
    importlib.import_module("genlora_lightning.interop.peft")
    return peft


def adapted(make=tiny_llama, **changes):
    model = make().eval()
    inject_adapters(model, small_config(**changes))
    perturb(model)
    return model


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (tiny_llama, {}),
        (tiny_gpt2, {"learn_centers": False, "learn_widths": False, "num_centers": 2, "num_latents_b": 2}),
        (tiny_bert, {"modules_to_train": ["classifier"], "target_modules": ["query", "value"], "dropout": 0.2}),
    ],
)
def test_every_bit_and_setting_goes_there_and_back(make, changes, tmp_path):
    model = adapted(make, **changes)
    export_peft(model, tmp_path / "peft")
    back = make().eval()
    import_peft(back, tmp_path / "peft")
    expected, found = adapter_state_dict(model), adapter_state_dict(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    mine, theirs = (next(iter(adapter_layers(m).values())).config for m in (model, back))
    assert set(mine.differences(theirs, run_only=True)) <= {"target_modules", "modules_to_train"}  # names in full
    assert adapter_layers(model).keys() == adapter_layers(back).keys()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_peft_loads_it_and_gives_the_same(make, tmp_path):
    peft = peft_with_genlora()
    model = adapted(make)
    export_peft(model, tmp_path / "peft")
    assert "import genlora_lightning.interop.peft" in (tmp_path / "peft" / "README.md").read_text()
    tokens = torch.randint(0, 64, (2, 9))
    loaded = peft.PeftModel.from_pretrained(make().eval(), tmp_path / "peft").eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_linears_whose_names_end_alike_are_told_apart(tmp_path):
    peft = peft_with_genlora()

    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"fc": nn.Linear(8, 6), "inner": nn.ModuleDict({"fc": nn.Linear(8, 6)})})

    model = make()
    inject_adapters(model, small_config(target_modules="fc"))
    assert list(adapter_layers(model)) == ["fc"]
    export_peft(model, tmp_path / "peft")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "peft")
    assert loaded.targeted_module_names == ["fc"]
    back = make()
    import_peft(back, tmp_path / "peft")
    assert list(adapter_layers(back)) == ["fc"]


def test_one_command_converts_both_ways(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    base = str(tmp_path / "base")
    assert main(["convert", str(tmp_path / "adapter"), base, str(tmp_path / "peft")]) == 0
    assert main(["convert", str(tmp_path / "peft"), base, str(tmp_path / "back")]) == 0
    assert "The PEFT folder is" in capsys.readouterr().out
    loaded = tiny_llama()
    load_adapter(loaded, tmp_path / "back")
    expected, found = adapter_state_dict(model), adapter_state_dict(loaded)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert main(["convert", str(tmp_path / "peft"), base, str(tmp_path / "back")]) == 1
    assert "holds an adapter. Give another OUT, or --overwrite" in capsys.readouterr().err


def test_other_kinds_and_several_configurations_are_not_written(tmp_path):
    model = tiny_llama()
    inject_adapters(model, LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=r"of kind 'lora', not 'genlora': `export_lora`"):
        export_peft(model, tmp_path / "peft")
    several = tiny_llama()
    inject_adapters(several.model.layers[0], small_config())
    inject_adapters(several.model.layers[1], small_config(rank=2))
    with pytest.raises(ValueError, match=r"several configurations \(.*'rank': \(4, 2\)"):
        export_peft(several, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_folder_of_others_is_not_replaced(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a PEFT folder as this library wrote it"):
        export_peft(adapted(), tmp_path / "peft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "is no PEFT folder of kind GENLORA"),
        ({"bias": "all"}, "`bias` is 'all', which an adapter of this library cannot say"),
        ({"r": 0}, "`r` must be"),
        ({"r": 3}, "does not fit|has another shape|shape"),
        ({"num_groups_b": 4000}, "does not fit this LlamaForCausalLM"),
    ],
)
def test_bad_folders_are_refused_and_the_model_is_as_it_was(changes, message, tmp_path):
    export_peft(adapted(), tmp_path / "peft")
    edit(tmp_path / "peft", **changes)
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        import_peft(model, tmp_path / "peft")
    assert not adapter_layers(model)


def test_damaged_tensors_are_refused(tmp_path):
    export_peft(adapted(), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * torch.nan}, path)
    with pytest.raises(ValueError, match="which is not finite"):
        import_peft(tiny_llama(), tmp_path / "peft")
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, path)
    with pytest.raises(ValueError, match=r"update\.A"):
        import_peft(tiny_llama(), tmp_path / "peft")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        import_peft(tiny_llama(), tmp_path / "peft")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="has no adapter_model"):
        import_peft(tiny_llama(), tmp_path / "peft")
