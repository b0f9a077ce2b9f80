from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import genlora_lightning
from genlora_lightning import LoRAConfig, export_lora, inject_adapters, load_adapter, save_adapter
from genlora_lightning.artifacts.checkpoint import keep_adapters_only
from genlora_lightning.cli.main import main
from genlora_lightning.injection.elastic import set_active_rank
from genlora_lightning.injection.inject import adapter_layers
from tests.conftest import perturb, small_config
from tests.interop.test_lora_export import adapted, load_with_peft, logits
from tests.models import give_own_code, tiny_bert, tiny_llama

ROOT = Path(genlora_lightning.__file__).parents[1]


@pytest.fixture
def files(tmp_path):
    """A base model's folder, an adapter of it, and the adapted model."""
    model = adapted("llama")
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    return tmp_path, model


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def failure(capsys, *arguments: object) -> str:
    """The one line that a failing command prints."""
    capsys.readouterr()
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("genlora: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# --- commands ---------------------------------------------------------------------------------------------------------


def test_exported_lora_computes_what_the_adapter_computes(files, capsys):
    folder, model = files
    assert run("export-lora", folder / "adapter", folder / "base", folder / "lora") == 0
    readable = 0o666 & ~current_umask()
    assert {path.stat().st_mode & 0o777 for path in (folder / "lora").iterdir()} == {readable}
    assert capsys.readouterr().out.endswith("vLLM: --enable-lora --max-lora-rank 8\n")
    loaded = load_with_peft(tiny_llama().eval(), folder / "lora")
    assert (logits(loaded) - logits(model)).abs().max() <= 1e-5
    assert run("export-lora", folder / "adapter", folder / "base", folder / "lora", "--rank", 2) == 0
    assert "LoRA adapter of rank 2 for 14 layers" in capsys.readouterr().out


def test_slice_of_an_elastic_adapter_is_of_the_ranks_asked_for(tmp_path, capsys):
    model = tiny_llama().eval()
    inject_adapters(model, LoRAConfig(rank=4, elastic=[1, 2, 4]))
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    assert run("slice", tmp_path / "adapter", tmp_path / "two", "--rank", 2) == 0
    assert capsys.readouterr().out == f"The adapter of rank 2 is in {tmp_path / 'two'}.\n"
    set_active_rank(model, 2)
    sliced = tiny_llama().eval()
    load_adapter(sliced, tmp_path / "two")
    assert torch.equal(logits(sliced), logits(model))

    (tmp_path / "ranks.json").write_text('{"q_proj": 1, "mlp.*": 2}')
    assert run("slice", tmp_path / "adapter", tmp_path / "many", "--rank-pattern", tmp_path / "ranks.json") == 0
    assert capsys.readouterr().out.startswith("The adapter of rank 1, 2, 4 is in")
    assert "holds an adapter. Give another OUT, or --overwrite" in failure(
        capsys, "slice", tmp_path / "adapter", tmp_path / "many", "--rank", 1
    )
    assert run("slice", tmp_path / "adapter", tmp_path / "many", "--rank", 1, "--overwrite") == 0
    for text, message in (
        ("[2]", "must hold ranks by names of layers"),
        ("{", "is no JSON: "),
        ('{"x": 1}', "'x' mat"),
    ):
        (tmp_path / "ranks.json").write_text(text)
        out = tmp_path / "none"
        assert message in failure(capsys, "slice", tmp_path / "adapter", out, "--rank-pattern", tmp_path / "ranks.json")
        assert not out.exists()


def test_merged_folder_computes_what_the_adapter_computes(files, capsys):
    from transformers import AutoModelForCausalLM

    folder, model = files
    assert run("merge", folder / "adapter", folder / "base", folder / "merged") == 0
    assert "Merged 14 layers" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5
    assert run("merge", folder / "adapter", folder / "base", folder / "half", "--dtype", "bfloat16") == 0
    assert json.loads((folder / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_loss_by_rounding_is_a_warning_on_one_line(tmp_path, capsys):
    model = adapted("llama", alpha=0.001)
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "base", tmp_path / "half", "--dtype", "bfloat16") == 0
    err = capsys.readouterr().err
    assert err.startswith("genlora: warning: Rounding to bfloat16 changed the update of ")
    assert err.count("\n") == 1


def test_imported_lora_is_an_adapter_folder_and_goes_out_as_it_came_in(files, capsys):
    folder, model = files
    export_lora(model, folder / "lora")
    assert run("import-lora", folder / "lora", folder / "base", folder / "imported") == 0
    out = capsys.readouterr().out
    assert out.startswith("LoRA adapts 14 linears with ")
    assert out.endswith(f"The adapter is in {folder / 'imported'}.\n")
    fresh = tiny_llama().eval()
    load_adapter(fresh, folder / "imported")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-5)
    assert run("export-lora", folder / "imported", folder / "base", folder / "again") == 0
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("lora", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_classifier_is_loaded_as_the_base_says_or_as_asked(tmp_path, capsys):
    model = adapted("bert")
    save_adapter(model, tmp_path / "adapter")
    tiny_bert(num_labels=2).bert.save_pretrained(tmp_path / "encoder")  # as an encoder is published: without a head
    task = ["--task", "sequence-classification"]
    for asked in ([], task):  # the adapter says which class it was trained on
        message = failure(capsys, "merge", tmp_path / "adapter", tmp_path / "encoder", tmp_path / "merged", *asked)
        assert "classifier.weight: stored (3, 16), needed (2, 16)" in message
    task += ["--num-labels", "3"]
    assert run("merge", tmp_path / "adapter", tmp_path / "encoder", tmp_path / "merged", *task) == 0
    merged = type(model).from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() <= 1e-5
    capsys.readouterr()
    headless = adapted("bert", modules_to_train=[])
    save_adapter(headless, tmp_path / "headless")
    message = failure(capsys, "merge", tmp_path / "headless", tmp_path / "encoder", tmp_path / "other", *task)
    assert "lacks weights that a BertForSequenceClassification needs (classifier.bias, classifier.weight)" in message


def small_models():
    import transformers as T

    bert = T.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    t5 = T.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    vit = T.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
    )
    return {
        "t5": lambda: T.T5ForConditionalGeneration(t5),
        "tokens": lambda: T.BertForTokenClassification(bert),
        "encoder": lambda: T.BertModel(bert),
        "vit": lambda: T.ViTForImageClassification(vit),
    }


@pytest.mark.parametrize("name", ["t5", "tokens", "encoder", "vit"])
def test_any_class_of_transformers_is_merged(tmp_path, capsys, name):
    model = small_models()[name]()
    model.save_pretrained(tmp_path / "base")
    inject_adapters(model, small_config())
    perturb(model)
    save_adapter(model, tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged") == 0
    merged = type(model).from_pretrained(tmp_path / "merged").state_dict()
    for place, layer in adapter_layers(model).items():
        torch.testing.assert_close(merged[f"{place}.weight"], layer.merged_weight(None))


def test_base_that_names_no_class_and_an_adapter_that_knows_none_ask_for_the_task(tmp_path, capsys):
    inner = tiny_llama()
    inner.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    outer = torch.nn.ModuleDict({"lm": inner})
    inject_adapters(outer, small_config())
    save_adapter(outer, tmp_path / "adapter")
    message = failure(capsys, "merge", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    assert "does not say which class of transformers it is of" in message
    assert "--task causal-lm or --task sequence-classification" in message
    assert run("merge", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", "--task", "causal-lm") == 0


def test_adapter_of_a_module_around_the_base_goes_into_the_base(tmp_path, capsys):
    inner = tiny_llama().eval()
    inner.save_pretrained(tmp_path / "base")
    outer = torch.nn.ModuleDict({"lm": inner, "other": torch.nn.Embedding(2, 3)})
    inject_adapters(outer, small_config(exclude_modules=["lm_head"]))
    perturb(outer)
    save_adapter(outer, tmp_path / "adapter")
    assert run("merge", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged") == 0
    merged = type(inner).from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(inner)).abs().max() <= 1e-5
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    arguments = ("merge", tmp_path / "adapter", tmp_path / "other", tmp_path / "wrong")
    message = failure(capsys, *arguments)
    assert "1 of 20 sampled tensors have other values (model.layers.0.mlp.up_proj.weight)" in message
    assert "--base-check on the command line" in message
    assert run(*arguments, "--base-check", "off") == 0


def test_code_of_the_base_is_run_if_asked_and_nobody_is_asked_on_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = adapted("llama")
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    give_own_code(tmp_path / "base")
    arguments = ("merge", tmp_path / "adapter", tmp_path / "base", tmp_path / "merged", "--base-check", "off")
    assert "contains custom code" in failure(capsys, *arguments)
    assert run(*arguments, "--trust-remote-code") == 0
    assert "Merged 14 layers" in capsys.readouterr().out


def test_tool_replaces_no_adapter_unasked_and_its_own_exports_each_time(files, capsys):
    folder, model = files
    export_lora(model, folder / "lora")
    content = {"state_dict": dict(model.state_dict())}
    keep_adapters_only(model, content, [])
    torch.save(content, folder / "last.ckpt")
    for command in (["convert", folder / "last.ckpt"], ["import-lora", folder / "lora"]):
        before = (folder / "adapter" / "manifest.json").read_bytes()
        message = failure(capsys, *command, folder / "base", folder / "adapter")
        assert "holds an adapter. Give another OUT, or --overwrite to replace it" in message
        assert (folder / "adapter" / "manifest.json").read_bytes() == before
        assert run(*command, folder / "base", folder / "adapter", "--overwrite") == 0
        assert (folder / "adapter" / "manifest.json").read_bytes() != before
        capsys.readouterr()
    for command in ("merge", "export-lora"):
        for _ in range(2):
            assert run(command, folder / "adapter", folder / "base", folder / command) == 0


def test_checkpoint_is_not_converted_on_another_base(files, capsys):
    folder, model = files
    content = {"state_dict": dict(model.state_dict())}
    keep_adapters_only(model, content, [])
    torch.save(content, folder / "last.ckpt")
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight.add_(1.0)
    other.save_pretrained(folder / "other")
    convert = ("convert", folder / "last.ckpt", folder / "other", folder / "converted")
    assert f"The checkpoint {folder / 'last.ckpt'} was trained on another base" in failure(capsys, *convert)
    assert not (folder / "converted").exists()
    assert run(*convert, "--base-check", "warn") == 0


def test_urls_are_refused_with_what_to_do(files, capsys):
    folder, _ = files
    store = "memory://bucket/run"
    for command in (
        ["inspect", store],
        ["verify", store],
        ["convert", store, folder / "base", folder / "out"],
        ["merge", store, folder / "base", folder / "out"],
        ["merge", folder / "adapter", folder / "base", store],
        ["export-lora", folder / "adapter", folder / "base", store],
        ["import-lora", store, folder / "base", folder / "out"],
    ):
        message = failure(capsys, *command)
        assert f"{store!r} is a URL, and must be a local path" in message
    assert not list(folder.glob("memory*"))
    assert run("verify", f"file://{folder / 'adapter'}") == 0


def test_inspect_describes_folders_and_checkpoints_alike(files, capsys):
    folder, model = files
    assert run("inspect", folder / "adapter") == 0
    text = capsys.readouterr().out
    assert "GenLoRA adapter for" in text
    assert "14 layers, mean effective rank" in text
    assert run("inspect", folder / "adapter", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    content = {"state_dict": dict(model.state_dict()), "global_step": 7, "epoch": 1}
    keep_adapters_only(model, content, [])
    torch.save(content, folder / "last.ckpt")
    assert run("inspect", folder / "last.ckpt", "--json") == 0
    checkpoint = json.loads(capsys.readouterr().out)
    assert checkpoint["layers"] == described["layers"]
    assert checkpoint["training"] == {"epoch": 1, "global_step": 7}
    from genlora_lightning import effective_ranks

    ranks = effective_ranks(model)
    assert len(described["layers"]) == 14
    for row in described["layers"]:
        layer = adapter_layers(model)[row["module"]]
        assert (row["in_features"], row["out_features"]) == (layer.in_features, layer.out_features)
        assert row["parameters"] == sum(p.numel() for p in layer.adapter_parameters().values() if p.requires_grad)
        assert row["effective_rank"] == pytest.approx(ranks[row["module"]], rel=1e-4)


def test_verify_accepts_what_is_whole_and_refuses_a_flipped_bit(files, capsys):
    folder, _ = files
    assert run("verify", folder / "adapter") == 0
    assert capsys.readouterr().out
    weights = folder / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    assert "adapter_model.safetensors" in failure(capsys, "verify", folder / "adapter")


# --- errors and exit codes --------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_exit_code_1(files, capsys):
    folder, _ = files
    (folder / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, folder / "plain.ckpt")
    assert "There is no adapter folder" in failure(capsys, "inspect", folder / "nothing")
    assert "(UnpicklingError): it is damaged" in failure(capsys, "inspect", folder / "text.ckpt")
    assert "holds no adapters" in failure(capsys, "inspect", folder / "plain.ckpt")
    export = ("export-lora", folder / "adapter", folder / "base")
    assert "`rank` must be an integer from 1" in failure(capsys, *export, folder / "lora", "--rank", 99)
    assert "is not a LoRA adapter as this library wrote it" in failure(capsys, *export, folder / "base")
    assert "no adapter folder" in failure(capsys, "merge", folder / "base", folder / "base", folder / "out")
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "damaged" in failure(capsys, *export, folder / "lora")
    assert sorted(os.listdir(folder)) == ["adapter", "base", "plain.ckpt", "text.ckpt"]


def test_wrong_base_is_exit_code_1_and_writes_nothing(files, capsys):
    folder, _ = files
    tiny_llama(hidden_size=32).save_pretrained(folder / "wide")
    for command in ("merge", "export-lora"):
        assert "was trained on" in failure(capsys, command, folder / "adapter", folder / "wide", folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["merge", "a"], ["merge", "a", "b", "c", "--dtype", "int8"]])
def test_wrong_command_line_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: genlora" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "inspect", "export-lora", "import-lora", "push", "merge"])
def test_help_of_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"example: genlora {command} " in " ".join(capsys.readouterr().out.split())


def test_help_needs_no_torch_and_the_script_is_installed(tmp_path):
    code = "import sys\nfrom genlora_lightning.cli.main import main\n"
    code += "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
    code += "print('HEAVY', sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.endswith("HEAVY []\n")
    module = [sys.executable, "-m", "genlora_lightning", "inspect", str(tmp_path / "nothing")]
    done = subprocess.run(module, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("genlora: error: There is no adapter folder")
    assert 'genlora = "genlora_lightning.cli.main:main"' in (ROOT / "pyproject.toml").read_text()
