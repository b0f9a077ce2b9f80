"""`genlora prune` writes a pruned model that loads as any other, and says what it has cost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from genlora_lightning.cli.main import main
from tests.models import tiny_llama

FAST = ("--device", "cpu", "--samples", "6", "--max-length", "32")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    rows = [{"prompt": f"w{7 + n} w8", "completion": f"w{20 + n} w9"} for n in range(9)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["prune", *map(str, arguments), *FAST]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_folder_has_the_zeros_asked_for_and_all_else_as_it_was(dtype, talking, chats, tmp_path, capsys):
    base = talking / "base"
    if dtype != torch.float32:
        base = tmp_path / "base"
        model = tiny_llama(pad_token_id=0, eos_token_id=1, bos_token_id=None).to(dtype)
        model.save_pretrained(base)
        for file in (talking / "base").glob("token*"):
            (base / file.name).write_bytes(file.read_bytes())
        (base / "chat_template.jinja").write_bytes((talking / "base/chat_template.jinja").read_bytes())
    out = tmp_path / "pruned"
    assert main(["prune", str(base), str(out), "--data", str(chats), "--sparsity", "0.5", *FAST]) == 0
    shown = capsys.readouterr().out
    before, after = matrices(base), matrices(out)
    for name, weight in after.items():
        assert weight.dtype == before[name].dtype == dtype
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])
        if "embed" not in name:
            assert torch.equal((~kept).sum(1), torch.full((len(weight),), weight.shape[1] // 2)), name
            assert re.search(
                rf"{name.removesuffix('.weight')} +\({weight.shape[0]}, {weight.shape[1]}\) +0\.5000", shown
            )
    assert "left alone: lm_head" in shown
    assert "in 14 matrices are 0 (50.00%)" in shown
    assert re.search(r"Loss on the 6 calibration examples \(\d+ tokens\): \d+\.\d+ before, \d+\.\d+ after", shown)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").is_file()


def test_pattern_and_names_choose_what_is_pruned(talking, chats, tmp_path):
    out = tmp_path / "pruned"
    arguments = ["--data", chats, "--pattern", "2:4", "--target-modules", "q_proj", "down_proj"]
    assert main(["prune", *map(str, [talking / "base", out, *arguments]), *FAST]) == 0
    for name, weight in matrices(out).items():
        if "q_proj" in name or "down_proj" in name:
            assert torch.equal((weight != 0).unflatten(-1, (-1, 4)).sum(-1).unique(), torch.tensor([2]))
        else:
            assert weight.all() or "embed" in name


def test_examples_are_drawn_by_the_seed(talking, chats, tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        arguments = ["--data", chats, "--samples", 1, "--seed", seed, "--device", "cpu"]
        assert main(["prune", *map(str, [talking / "base", out, *arguments])]) == 0
        found.append(torch.cat([weight.flatten() for weight in matrices(out).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_model_of_the_hub_has_its_tokenizer_beside_it(talking, chats, tmp_path, hub):
    hub.repos["org/base"] = {"main": {file.name: file.read_bytes() for file in (talking / "base").iterdir()}}
    assert main(["prune", "org/base", str(tmp_path / "out"), "--data", str(chats), *FAST]) == 0
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert any((weight == 0).any() for weight in matrices(tmp_path / "out").values())


def test_nothing_is_overwritten_or_left_behind(talking, chats, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    assert "exists and is not" in failure(capsys, talking / "base", taken, "--data", chats)
    assert (taken / "notes.txt").read_text() == "mine"
    out = tmp_path / "out"
    words = {
        ("--sparsity", "1"): "`--sparsity` must be finite and at least 0 and less than 1",
        ("--pattern", "2-4"): "--pattern must be two numbers such as 2:4, got '2-4'",
        ("--pattern", "4:4"): "less than 4 of 4 weights must stay",
        ("--target-modules", "q_prj"): "Near matches: q_proj",
    }
    for arguments, message in words.items():
        assert message in failure(capsys, talking / "base", out, "--data", chats, *arguments)
    assert "no_such.jsonl" in failure(capsys, talking / "base", out, "--data", tmp_path / "no_such.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chats.jsonl", "taken"]
