from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from genlora_lightning.data import DataFileError, InstructionDataModule
from genlora_lightning.data._files import check_file, read_records
from genlora_lightning.data._hub import HubName, parse_hub_name

Write = Callable[..., str]
RECORDS = [{"prompt": f"q {number}", "completion": "a"} for number in range(4)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a data set on the Hub, which `datasets` loads by the same call."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, rows in {"train": RECORDS, "test": RECORDS[:1]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://org/name", HubName("org/name")),
        ("hf://org/name:test", HubName("org/name", split="test")),
        ("hf://o.r-g/na_me:my-config:test", HubName("o.r-g/na_me", config="my-config", split="test")),
        ("hf://org/name@v1.0:test", HubName("org/name", revision="v1.0", split="test")),
        ("hf://org/name:train[:10%]", HubName("org/name", split="train[:10%]")),
        ("hf://org/name:c:train[5:9]", HubName("org/name", config="c", split="train[5:9]")),
    ],
)
def test_names_say_configuration_and_split(text: str, name: HubName) -> None:
    assert parse_hub_name(text, "train_file") == name


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b:", "hf://a/b:c:d:e", "hf://a/b\udcff"])
def test_other_names_are_refused_with_those_allowed(text: str) -> None:
    with pytest.raises(DataFileError, match=r"train_file is no name of a data set on the Hub; allowed are hf://org/n"):
        check_file(text, "train_file")


def test_records_know_their_data_set_and_number(hub: Path) -> None:
    records = read_records("hf://org/name:train[1:3]", "train_file")
    assert records == [(f"hf://org/name:train[1:3]:record {i}", RECORDS[i]) for i in (1, 2)]
    assert len(read_records("hf://org/name:test", "test_file")) == 1


def test_a_data_set_gives_the_batches_of_its_file(hub: Path, tokenizer: Any) -> None:
    found = []
    for source in ("hf://org/name", str(hub / "train.jsonl")):
        data = InstructionDataModule(tokenizer, source, batch_size=3)
        data.prepare_data()
        data.setup("fit")
        found.append(list(data.train_dataloader()))
    for left, right in zip(*found, strict=True):
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_bad_records_are_named(hub: Path, tokenizer: Any) -> None:
    for split in ("train", "test"):
        (hub / f"{split}.jsonl").write_text('{"question": null}\n{"question": "q"}\n')
    data = InstructionDataModule(tokenizer, "hf://org/name:test", predict_file="hf://org/name")
    data.prepare_data()
    with pytest.raises(DataFileError, match=r"^hf://org/name:test:record 1: needs a field .*; fields found: none$"):
        data.setup("fit")
    (hub / "test.jsonl").write_text('{"question": ["q"]}\n')
    with pytest.raises(DataFileError, match=r"^hf://org/name: train_file cannot be loaded \(no network, .*\): .+$"):
        read_records("hf://org/name", "train_file")


@pytest.mark.parametrize("name", ["hf://nobody/nothing", "hf://org/name:dev", "hf://org/name:other:train"])
def test_what_cannot_be_loaded_is_one_line(hub: Path, name: str) -> None:
    with pytest.raises(DataFileError, match=rf"^{name}: train_file cannot be loaded \(no network, no such name, .+$"):
        check_file(name, "train_file")


def test_code_of_a_data_set_is_never_executed(hub: Path, tmp_path: Path) -> None:
    for file in hub.iterdir():
        file.unlink()
    (hub / "name.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataFileError, match="train_file cannot be loaded"):
        check_file("hf://org/name", "train_file")
    assert not (tmp_path / "ran").exists()
