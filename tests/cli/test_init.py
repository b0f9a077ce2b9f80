"""`genlora init` writes a configuration that trains, or says in one line why not."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from genlora_lightning.cli.main import main

CHATS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 3
PAIRS = [{"prompt": "a", "completion": "b"}]
TEXTS = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no: never"}, {"text": "so so", "label": "3"}]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def init(*more: str, data: str = "data.jsonl", model: str = "some/model", name: str = "mine") -> int:
    return main(["init", "--model", model, "--data", data, "--name", name, *more])


def parsed(capsys) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", "mine.yaml", "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


ALPACA = [{"instruction": "a", "output": "b"}]
SHAREGPT = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}]
FORMS = {"messages": CHATS, "prompts": PAIRS, "alpaca": ALPACA, "sharegpt": SHAREGPT, "texts": [{"text": "a b"}]}


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_conversations_get_a_language_model(rows, capsys):
    Path("data.jsonl").write_text(lines(rows))
    assert init() == 0
    said = capsys.readouterr().out
    assert "genlora fit --config mine.yaml\n  genlora chat runs/mine/logs/version_0/adapter\n" in said
    config = parsed(capsys)
    assert config["model"]["class_path"].endswith("CausalLMModule")
    assert config["model"]["init_args"]["model"] == "some/model"
    assert config["data"]["init_args"]["train_file"] == "data.jsonl"
    assert config["trainer"]["default_root_dir"] == "runs/mine"


def test_a_table_is_looked_at_as_lines_are(tmp_path):
    for name in ("d.json", "d.parquet"):
        path = tmp_path / name
        path.write_text(json.dumps(TEXTS)) if name == "d.json" else parquet.write_table(
            pyarrow.Table.from_pylist(TEXTS), path
        )
        assert init("--overwrite", data=name) == 0
        assert 'label_names: ["3", "no: never", "yes"]' in Path("mine.yaml").read_text()


def test_texts_get_a_classifier_of_their_labels(capsys):
    Path("data.csv").write_text("text,label\ngood,yes\nbad,no: never\nso so,3\n")
    assert init(data="data.csv") == 0
    assert parsed(capsys)["model"]["init_args"]["label_names"] == ["3", "no: never", "yes"]


@pytest.mark.parametrize("model", ["no", "null", "a: b", "C:\\models\\one", "it's # one", "-x", "é"])
def test_any_name_comes_through_yaml(model):
    Path("data.jsonl").write_text(lines(CHATS))
    assert main(["init", f"--model={model}", "--data", "data.jsonl", "--name", "mine"]) == 0
    assert yaml.safe_load(Path("mine.yaml").read_text())["model"]["init_args"]["model"] == model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "none.jsonl"}, "--data: there is no file 'none.jsonl'"),
        (
            {"data": "data.txt"},
            "data.txt: unknown file extension '.txt' for --data; allowed are .jsonl,",
        ),
        ({"data": "empty.jsonl"}, "empty.jsonl: --data holds no records"),
        ({"data": "broken.jsonl"}, "broken.jsonl:1: not valid JSON"),
        ({"data": "latin.csv"}, "latin.csv:2: not UTF-8 text at byte 1"),
        ({"data": "other.jsonl"}, "other.jsonl:1: needs a field 'messages', or 'prompt' and 'completion', or"),
        ({"data": "other.jsonl"}, "; rename 'question' → 'prompt', 'answer' → 'completion'"),
        ({"data": "list.jsonl"}, 'must be a JSON object, got list; a list of messages belongs into one: {"messages"'),
        ({"data": "semicolons.csv"}, "one column 'prompt;completion': its names are separated by ';'; save it"),
        ({"data": "texts"}, "texts: --data is a folder, as pictures have it; give a file in it, such as a.jsonl"),
        ({"data": "mixed.jsonl"}, "mixed.jsonl:2: has no 'text' and 'label', as the records before it have"),
        ({"data": "hf://nobody/nothing"}, "hf://nobody/nothing: --data cannot be loaded (no network,"),
        ({"data": "one.jsonl"}, "one.jsonl has 1 different labels"),
        ({"model": "folder"}, "folder is a folder without a config.json"),
        ({"model": "./nowhere"}, "There is no folder ./nowhere"),
        ({"name": "../up"}, "'../up' is no name for a run"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_file(change, message, capsys):
    Path("data.jsonl").write_text(lines(CHATS))
    Path("data.txt").write_text("x")
    Path("empty.jsonl").write_text("\n")
    Path("broken.jsonl").write_text("{")
    Path("latin.csv").write_bytes("text,label\né,1\n".encode("latin-1"))
    Path("other.jsonl").write_text(lines([{"question": "a", "answer": "b"}]))
    Path("list.jsonl").write_text("[1]\n")
    Path("mixed.jsonl").write_text(lines([*TEXTS[:1], *CHATS]))
    Path("one.jsonl").write_text(lines(TEXTS[:1]))
    Path("semicolons.csv").write_text("prompt;completion\na;b\n")
    Path("folder").mkdir()
    Path("texts").mkdir()
    Path("texts/a.jsonl").write_text(lines(CHATS))
    assert init(**change) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [*Path().glob("*.yaml")]


def test_a_configuration_is_replaced_only_if_asked(capsys):
    Path("data.jsonl").write_text(lines(CHATS))
    Path("mine.yaml").write_text("mine: 1")
    assert init() == 1
    assert "--overwrite" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine: 1"
    assert init("--overwrite") == 0
    assert "CausalLMModule" in Path("mine.yaml").read_text()


def test_nobody_to_ask_is_an_error_that_names_the_flag(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["init"]) == 1
    assert "--model is missing, and there is no terminal" in capsys.readouterr().err


def test_questions_are_asked_until_the_answer_will_do(monkeypatch, capsys):
    Path("data.jsonl").write_text(lines(CHATS))
    answers = iter(["./nowhere", "some/model", "data.json", "data.jsonl", "mine"])
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert main(["init"]) == 0
    assert "There is no folder ./nowhere" in capsys.readouterr().out
    assert yaml.safe_load(Path("mine.yaml").read_text())["model"]["init_args"]["model"] == "some/model"
