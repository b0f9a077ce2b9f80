"""`genlora data` shows what is learned of the examples, and how long they are."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from genlora_lightning.cli.data import shown
from genlora_lightning.cli.main import main
from tests.cli.test_train import config, models  # noqa: F401 - fixtures


def test_examples_are_shown_with_what_is_learned(config, capsys):  # noqa: F811
    assert main(["data", "--config", str(config), "--examples", "2"]) == 0
    out = capsys.readouterr().out
    assert "<user> what colour is the grass ? </s> <assistant>⟦green </s>⟧" in " ".join(out.split())
    assert out.count("--- example") == 2
    assert "of 3:" in out
    row = next(line for line in out.splitlines() if line.startswith("train "))
    assert row.split() == ["train", "8", "11", "11", "11", "11"]


def test_equal_inputs_and_what_is_cut_are_counted(config, capsys):  # noqa: F811
    rows = [{"prompt": prompt, "completion": "green"} for prompt in ["What  Colour ?", "what colour ?", "the sky ?"]]
    rows.append({"prompt": " ".join(["sky"] * 30), "completion": "green"})
    (config.parent / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "Nothing is cut or dropped." in out
    assert "1 examples have the input of another one; the most frequent inputs:\n  2 × user what colour ?" in out
    content = yaml.safe_load(config.read_text())
    content["data"]["init_args"]["max_length"] = 12
    config.write_text(yaml.safe_dump(content))
    assert main(["data", "--config", str(config)]) == 0
    assert re.search(r"Left out by max_length: 1 cut examples, 2\d cut tokens\n", capsys.readouterr().out)


def test_color_marks_learned_tokens_on_demand(config, capsys):  # noqa: F811
    assert main(["data", "--config", str(config), "--examples", "1", "--color", "always", "--split", "val"]) == 0
    out = capsys.readouterr().out
    assert "\033[32m" in out
    assert "⟦" not in out


def test_a_configuration_of_another_data_module_is_one_line(config, capsys):  # noqa: F811
    content = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**content, "data": {"class_path": "tests.cli.test_train.MLPData"}}))
    assert main(["data", "--config", str(config)]) == 1
    assert "data module is MLPData; only the package's own are shown" in capsys.readouterr().err


def test_data_that_cannot_be_used_are_one_line(config, capsys):  # noqa: F811
    (config.parent / "data.jsonl").write_text(json.dumps({"question": 1}) + "\n")
    assert main(["data", "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert "data.jsonl" in error
    assert error.count("\n") == 1


class Letters:
    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"input_ids": [97, 98, 99, 100], "labels": [-100, 98, -100, 100]}, "a⟦b⟧c⟦d⟧"),
        ({"input_ids": [97, 98], "labels": [-100, -100]}, "ab"),
        ({"input_ids": [97, 98], "labels": 1}, "ab\n=> 1"),
        ({"input_ids": [97, 98], "label": [0.5]}, "ab\n=> [0.5]"),
    ],
)
def test_learned_parts_are_marked(row, text):
    assert shown(row, Letters(), colored=False) == text


def test_of_a_stream_the_first_records_are_shown(config, capsys, monkeypatch):  # noqa: F811
    rows = [{"prompt": f"what colour {number} ?", "completion": "green"} for number in range(5)]
    (config.parent / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = yaml.safe_load(config.read_text())
    content["data"]["init_args"] |= {"streaming": True, "group_by_length": False}
    content["data"]["init_args"].pop("val_fraction", None)
    config.write_text(yaml.safe_dump(content))
    monkeypatch.setattr("genlora_lightning.cli.data._FIRST", 3)
    assert main(["data", "--config", str(config), "--examples", "1"]) == 0
    out = capsys.readouterr().out
    assert "The training data are streamed; this is of their first 3 rows." in out
    assert "--- example 1 of 3:" in out
