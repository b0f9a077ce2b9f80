from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser

from genlora_lightning.data import InstructionDataModule, TextClassificationDataModule
from genlora_lightning.data._mixture import mixed, weights_of

Write = Callable[..., str]


def pairs(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {number}", "completion": "one"} for number in range(count)]


def seen(tokenizer: Any, files: Any, **options: Any) -> tuple[Counter[str], InstructionDataModule]:
    """How often each prompt is in an epoch."""
    data = InstructionDataModule(tokenizer, files, batch_size=4, **options)
    data.prepare_data()
    data.setup("fit")
    rows = [ids for batch in data.train_dataloader() for ids in batch["input_ids"]]
    return Counter(tokenizer.decode(ids).split("user\n")[1].split("<|im_end|>")[0] for ids in rows), data


def test_a_list_is_one_set_of_all_its_files(write: Write, tokenizer: Any) -> None:
    files = [write("a.jsonl", pairs("a", 3)), write("b.csv", pairs("b", 2))]
    counts, data = seen(tokenizer, files)
    assert counts == dict.fromkeys(["a 0", "a 1", "a 2", "b 0", "b 1"], 1)
    table = [line.split() for line in data.summary_table().splitlines()]
    assert [files[0], "1", "3", "3"] in table
    assert [files[1], "1", "2", "2"] in table


def test_weights_say_how_often_a_file_is_seen(write: Write, tokenizer: Any) -> None:
    files = {write("a.json", pairs("a", 3)): 2.0, write("b.jsonl", pairs("b", 10)): 0.3}
    counts, data = seen(tokenizer, files)
    a, b = ({text: n for text, n in counts.items() if text[0] == name} for name in "ab")
    assert a == {"a 0": 2, "a 1": 2, "a 2": 2}
    assert (len(b), set(b.values())) == (3, {1})
    assert [*files][1] in data.summary_table()
    assert ["0.3", "10", "3"] in [line.split()[1:] for line in data.summary_table().splitlines()]
    assert seen(tokenizer, files)[0] == counts
    assert any(seen(tokenizer, files, seed=seed)[0] != counts for seed in range(3)), "drawn by seed"


def test_one_file_of_any_kind_is_what_the_file_is(write: Write, tokenizer: Any) -> None:
    path = write("a.jsonl", pairs("a", 5))
    found = []
    for source in (path, [path], {path: 1.0}):
        data = InstructionDataModule(tokenizer, source, batch_size=2)
        data.setup("fit")
        assert "weight" not in data.summary_table()
        found.append(torch.cat([batch["labels"].flatten() for batch in data.train_dataloader()]))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_held_out_is_not_weighted_and_not_trained_on(write: Write, tokenizer: Any) -> None:
    files = {write("a.jsonl", pairs("a", 20)): 3.0, write("b.jsonl", pairs("b", 20)): 0.5}
    counts, data = seen(tokenizer, files, val_fraction=0.25)
    held = [tokenizer.decode(ids) for batch in data.val_dataloader() for ids in batch["input_ids"]]
    assert len(held) == 10
    assert not [text for text in held if text.split("user\n")[1].split("<|im_end|>")[0] in counts]
    assert data.summary()["val"].get("also_in_train", 0) == 0


def test_classes_are_those_of_all_files(write: Write, tokenizer: Any) -> None:
    files = [write("a.jsonl", [{"text": "a", "label": "x"}]), write("b.jsonl", [{"text": "b", "label": "y"}])]
    data = TextClassificationDataModule(tokenizer, files)
    data.setup("fit")
    assert data.label_names == ["x", "y"]
    assert data.summary()["train"]["examples"] == 2


@pytest.mark.parametrize("weight", [0.001, 0.5, 1, 1.5, 2.25, 7])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_every_file_is_seen_by_its_weight_to_the_nearest_example(weight: float, count: int) -> None:
    examples = [{"where": f"f:{number}"} for number in range(count)]
    found, (share,) = mixed(examples, {"f": float(weight)}, seed=1)
    assert len(found) == share.seen
    assert abs(len(found) - max(1, weight * count)) <= 1
    numbers = Counter(example["where"] for example in found).values()
    assert max(numbers) - (min(numbers) if len(numbers) == count else 0) <= 1, "none far more often than another"


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (3, TypeError, r"train_file must be a file, a list of files, or a mapping of files to weights, got 3"),
        ([3], TypeError, r"train_file must be a file, a list of files.*got \[3\]"),
        ({3: 1.0}, TypeError, r"train_file must be a file, a list of files"),
        ([], ValueError, r"train_file must name at least one file, got \[\]"),
        ({}, ValueError, r"train_file must name at least one file, got \{\}"),
        (["a", "b", "a"], ValueError, r"train_file names 'a' twice; to see a file more often give weights: \{a: 2.0\}"),
        ({"a": 0}, ValueError, r"`train_file: a` must be finite and greater than 0 and at most 1000, got 0"),
        ({"a": float("nan")}, ValueError, r"`train_file: a` must be finite"),
        ({"a": 1e9}, ValueError, r"`train_file: a` must be .* at most 1000"),
        ({"a": "2"}, TypeError, r"`train_file: a` must be a number, got '2'"),
    ],
)
def test_bad_mixtures_are_refused(sources: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weights_of(sources, "train_file")


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("a.jsonl", "a.jsonl"),
        ("hf://org/name:train[:10]", "hf://org/name:train[:10]"),
        ("[a.jsonl, b.csv]", ["a.jsonl", "b.csv"]),
        ("{a.jsonl: 2.0, b/c.d.csv: 1}", {"a.jsonl": 2.0, "b/c.d.csv": 1.0}),
    ],
)
def test_the_command_line_takes_one_several_and_weights(given: str, read: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(InstructionDataModule, "data", skip={"tokenizer"})
    assert parser.parse_args([f"--data.train_file={given}"]).data.train_file == read


def test_a_missing_file_of_a_mixture_is_named(write: Write, tokenizer: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_file: there is no file 'nowhere\.jsonl'"):
        InstructionDataModule(tokenizer, [write("a.jsonl", pairs("a", 3)), "nowhere.jsonl"]).prepare_data()
