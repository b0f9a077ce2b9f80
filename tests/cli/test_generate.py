from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from genlora_lightning import export_lora, load_adapter, save_adapter, save_merged
from genlora_lightning.artifacts.checkpoint import keep_adapters_only
from genlora_lightning.cli.main import main
from tests.cli.conftest import word_tokenizer
from tests.interop.test_lora_export import adapted
from tests.models import tiny_bert

SHORT = ("--max-new-tokens", "4")


def answers(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """What `genlora generate` prints, as lines."""
    capsys.readouterr()
    code = main(["generate", *map(str, arguments), *SHORT])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out.splitlines()


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["generate", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def expected(folder: Path, adapter: str | None, text: str) -> str:
    """The greedy answer, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    if adapter is not None:
        load_adapter(model, folder / adapter)
    tokenizer = word_tokenizer()
    ids = torch.tensor([tokenizer(f"<user> {text} </s> <assistant>")["input_ids"]])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def test_adapter_and_base_answer_as_they_do_in_transformers(talking, capsys):
    wanted = {name: expected(talking, name, "w7 w8") for name in (None, "first", "second")}
    assert len(set(wanted.values())) == 3
    assert answers(capsys, talking / "base", "w7 w8") == [wanted[None]]
    for name in ("first", "second"):  # each knows its base
        assert answers(capsys, talking / name, "w7 w8") == [wanted[name]]


def test_lora_merged_folder_and_checkpoint_answer_as_the_adapter(talking, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from genlora_lightning import CausalLMModule

    model = AutoModelForCausalLM.from_pretrained(talking / "base").eval()
    load_adapter(model, talking / "first")
    export_lora(model, tmp_path / "lora")
    save_merged(model, tmp_path / "merged")
    module = CausalLMModule(str(talking / "base"))
    module.model = model
    content = {"state_dict": dict(module.state_dict())}
    keep_adapters_only(module, content, [])
    torch.save(content, tmp_path / "last.ckpt")
    wanted = expected(talking, "first", "w9 w10")
    for source in ("lora", "merged", "last.ckpt"):
        assert answers(capsys, tmp_path / source, "w9 w10") == [wanted], source


def test_prompts_of_files_are_answered_in_batches_and_written_as_json_lines(talking, tmp_path, capsys, monkeypatch):
    rows = [{"prompt": "w7"}, {"prompt": "w8 w9 w10", "completion": "w11"}]
    rows += [{"messages": [{"role": "system", "content": "w6"}, {"role": "user", "content": "w12"}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    base = talking / "base"
    printed = answers(capsys, base, "--file", tmp_path / "in.jsonl", "--out", out, "--batch-size", 2)
    assert printed == [f"3 answers are in {out}."]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in written] == ["w7", "w8 w9 w10", "w12"]
    assert [row.get("completion") for row in written] == [None, "w11", None]
    alone = [
        answers(capsys, base, "w7"),
        answers(capsys, base, "w8 w9 w10"),
        answers(capsys, base, "w12", "--system", "w6"),
    ]
    assert [[row["generated"]] for row in written] == alone
    (tmp_path / "in.txt").write_text("w7\n\nw8 w9 w10\n")
    lines = answers(capsys, base, "--file", tmp_path / "in.txt")
    assert lines == ["> w7", *alone[0], "> w8 w9 w10", *alone[1]]
    monkeypatch.setattr("sys.stdin", io.StringIO("w7\nw8 w9 w10\n"))
    assert answers(capsys, base, "--file", "-") == lines


def test_sampling_follows_the_seed(talking, capsys):
    sampled = [
        answers(capsys, talking / "base", "w7", "--temperature", 5, "--top-p", 0.99, "--seed", seed)
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_base_without_chat_template_asks_for_one_or_for_plain_text(talking, tmp_path, capsys):
    shutil.copytree(talking / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    adapter = (talking / "first", "--base", tmp_path / "base")
    assert "--chat-template FILE, or let prompts be plain text by --chat-template none" in failure(
        capsys, *adapter, "w7"
    )
    (tmp_path / "own.jinja").write_text((talking / "base" / "chat_template.jinja").read_text())
    assert answers(capsys, *adapter, "w7", "--chat-template", tmp_path / "own.jinja") == [
        expected(talking, "first", "w7")
    ]
    assert answers(capsys, *adapter, "<user> w7 </s> <assistant>", "--chat-template", "none") == [
        expected(talking, "first", "w7")
    ]


def test_what_cannot_answer_is_one_line_with_the_remedy(talking, tmp_path, capsys):
    base = talking / "base"
    save_adapter(adapted("bert"), tmp_path / "classifier")
    tiny_bert().save_pretrained(tmp_path / "bert")
    message = failure(capsys, tmp_path / "classifier", "w7", "--base", tmp_path / "bert")
    assert "was trained on a BertForSequenceClassification, which is no causal language model" in message
    assert "python train.py predict" in message
    message = failure(capsys, tmp_path / "nothing", "w7")
    assert "does not exist" in message
    shutil.copytree(talking / "first", tmp_path / "first")
    (tmp_path / "first" / "manifest.json").unlink()
    assert "it has no manifest.json" in failure(capsys, tmp_path / "first", "w7")
    assert "Give prompts either as arguments or as --file" in failure(capsys, base)
    assert "--base is for adapters" in failure(capsys, base, "w7", "--base", base)
    assert "`--temperature` must be finite and at least 0, got -1.0" in failure(capsys, base, "w7", "--temperature", -1)
    assert "--top-p 0.5 has no effect without sampling" in failure(capsys, base, "w7", "--top-p", 0.5)
    assert "The prompt has 73 tokens, and the model takes 64" in failure(capsys, base, " ".join(["w7"] * 70))
    (tmp_path / "in.jsonl").write_text('{"text": "w7"}\n')
    assert "in.jsonl:1: needs a field 'messages', or 'prompt'" in failure(capsys, base, "--file", tmp_path / "in.jsonl")
    assert "cannot be put on --device cuda:99" in failure(capsys, base, "w7", "--device", "cuda:99")


def test_adapter_whose_base_has_moved_asks_for_it(talking, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    (tmp_path / "there").symlink_to(talking / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    load_adapter(model, talking / "first")
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "there").unlink()
    message = failure(capsys, tmp_path / "adapter", "w7")
    assert f"The base of {tmp_path / 'adapter'} cannot be loaded: give its folder with --base" in message
    answer = answers(capsys, tmp_path / "adapter", "--base", talking / "base", "w7 w8")
    assert answer == [expected(talking, "first", "w7 w8")]


def test_several_adapters_answer_each_prompt_by_name(talking, tmp_path, capsys):
    shutil.copytree(talking / "second", tmp_path / "other")
    prompts = ["w7 w8", "w9"]
    wanted = {name: [expected(talking, name, text) for text in prompts] for name in ("first", "second")}
    assert wanted["first"] != wanted["second"]
    given = answers(capsys, talking / "first", "--adapter", f"b={tmp_path / 'other'}", "--batch-size", 3, *prompts)
    assert given == [
        line
        for number, text in enumerate(prompts)
        for line in (f"> {text}", f"[first] {wanted['first'][number]}", f"[b] {wanted['second'][number]}")
    ]
    out = tmp_path / "out.jsonl"
    options = [f"--adapter={talking / 'second'}", f"--adapter={talking / 'first'}", f"--out={out}"]
    answers(capsys, talking / "base", *options, prompts[0])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["adapter"], row["generated"]) for row in rows] == [
        ("second", wanted["second"][0]),
        ("first", wanted["first"][0]),
    ]


def test_several_adapters_of_one_name_are_one_line_with_the_remedy(talking, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    error = failure(capsys, talking / "first", "--adapter", talking / "first", "w7")
    assert "Two adapters are called 'first': give --adapter NAME=FOLDER" in error
    model = AutoModelForCausalLM.from_pretrained(talking / "base")
    load_adapter(model, talking / "first")
    export_lora(model, tmp_path / "lora")
    error = failure(capsys, tmp_path / "lora", "--base", talking / "base", "--adapter", talking / "first", "w7")
    assert "is a lora: make one of it with `genlora import-lora`" in error
