"""The examples with PEFT's trainers: they train, their checkpoints hold adapters alone, and they go on exactly."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from tests.data.conftest import make_tokenizer  # noqa: F401
from tests.models import tiny_llama

peft = pytest.importorskip("peft")
if not peft.__version__.startswith("0.21."):
    pytest.skip("GenLoRA is a tuner of PEFT 0.21", allow_module_level=True)

# The trainers are others' code, whose warnings are for them.
pytestmark = pytest.mark.filterwarnings("ignore")
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "peft"
EXAMPLES = ("hf_trainer", "trl_sft", "trl_dpo", "trl_grpo")


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if name.startswith("trl"):
        pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(FOLDER))
    for module in (name, "common"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def given(tmp_path_factory, make_tokenizer) -> list[str]:  # noqa: F811
    folder = tmp_path_factory.mktemp("peft")
    tokenizer = make_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"Is film {i} good or bad?", "completion": ("positive", "negative")[i % 2]} for i in range(24)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--rank", "4"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_checkpoints_hold_adapters_alone_and_a_resumed_run_is_the_same(name, given, tmp_path, monkeypatch, capsys):
    module = example(name, monkeypatch)
    if name == "trl_grpo":  # a random model says no right word, and learns nothing of a reward that is always zero
        monkeypatch.setattr(module, "reward", lambda completions, **_: [float(len(set(text))) for text in completions])
    run = module.main
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    run([*given, "--output", str(whole), "--steps", "4", "--save-steps", "2"])
    assert "parameters trained" in capsys.readouterr().out
    checkpoint = whole / "checkpoint-2"
    assert sorted(path.name for path in checkpoint.glob("*.safetensors")) == ["adapter_model.safetensors"]
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert all(".genlora_" in key for key in stored)
    run([*given, "--output", str(rest), "--steps", "4", "--save-steps", "2", "--resume", str(checkpoint)])
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, rest))
    assert any(not torch.equal(stored[key], value) for key, value in expected.items())  # the later steps moved it
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
