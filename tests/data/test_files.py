from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from genlora_lightning.data import DataFileError
from genlora_lightning.data._files import check_file, held_out_indices, normalized, read_records, text_field

Write = Callable[..., str]


def test_jsonl_records_know_their_line_and_blank_lines_are_skipped(write: Write) -> None:
    path = write("a.jsonl", '{"x": 1}\n\n   \n{"x": "é"}\r\n{"x": null}')
    assert read_records(path, "train_file") == [
        (f"{path}:1", {"x": 1}),
        (f"{path}:4", {"x": "é"}),
        (f"{path}:5", {"x": None}),
    ]


def test_csv_records_know_the_line_they_start_on(write: Write) -> None:
    path = write("a.csv", 'text,label\n"two\nlines, and ""quotes""",a\n\nplain,b\n')
    assert read_records(path, "train_file") == [
        (f"{path}:2", {"text": 'two\nlines, and "quotes"', "label": "a"}),
        (f"{path}:5", {"text": "plain", "label": "b"}),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"x": "1"}\n' if name == "a.jsonl" else "x\n1\n", encoding="utf-8-sig")
    assert read_records(str(path), "train_file")[0].fields == {"x": "1"}


@pytest.mark.parametrize("read", [check_file, read_records])
def test_unusable_files_are_refused_before_they_are_read(
    write: Write, tmp_path: Path, read: Callable[..., None]
) -> None:
    with pytest.raises(FileNotFoundError, match=r"val_file: there is no file 'nowhere\.jsonl'"):
        read("nowhere.jsonl", "val_file")
    with pytest.raises(
        DataFileError, match=r"a\.txt: unknown file extension '\.txt' for val_file.*\.jsonl, .*\.parquet and \.arrow"
    ):
        read(write("a.txt", "[]"), "val_file")
    with pytest.raises(DataFileError, match=r"a\.jsonl: val_file is empty"):
        read(write("a.jsonl", ""), "val_file")
    for name in ("a\0.jsonl", "a\udcff.jsonl"):
        with pytest.raises(DataFileError, match=r"the name of val_file is not valid Unicode text"):
            read(name, "val_file")
    os.mkdir(tmp_path / "folder.csv")
    with pytest.raises(DataFileError, match="val_file is not a file"):
        read(str(tmp_path / "folder.csv"), "val_file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "\n  \n", r"a\.jsonl: train_file holds no records"),
        ("a.csv", "text,label\n", r"a\.csv: train_file holds no records"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 1,}\n',
            r"a\.jsonl:2: not valid JSON: .* at column [89]",
        ),  # Python 3.13 names the comma
        ("a.jsonl", "{\n", r"a\.jsonl:1: not valid JSON: .*one JSON object a line"),
        ("a.jsonl", '{"a": 1, "b": {"c": 1, "c": 2}}', r"a\.jsonl:1: not usable JSON: the key 'c' is there twice"),
        pytest.param(
            "a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a\.jsonl:1: not usable JSON: .*digits", id="long-number"
        ),
        ("a.jsonl", '[{"a": 1}]\n', r"a\.jsonl:1: must be a JSON object, got list"),
        pytest.param("a.jsonl", "[" * 200_000, r"a\.jsonl:1: not (usable|valid) JSON: ", id="nested-too-deeply"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv:3: 3 values in a file of 2 columns \['a', 'b'\]"),
        ("a.csv", "a,b\n1\n", r"a\.csv:2: 1 values in a file of 2 columns"),
        ("a.csv", "a,a\n1,2\n", r"a\.csv:1: column names must be distinct and not empty, got \['a', 'a'\]"),
        ("a.csv", "a,\n1,2\n", r"a\.csv:1: column names must be distinct and not empty"),
        ("a.csv", f"{'a' * 9999},\n1,2\n", r"a\.csv:1: column names must be distinct .{9,200}$"),
        ("a.csv", f"{'a' * 9999},b\n1\n", r"a\.csv:2: 1 values in a file of 2 columns .{9,200}$"),
        ("a.csv", 'a,b\n1,"2\n', r"a\.csv:2: not valid CSV: unexpected end of data"),
        ("a.csv", 'a,b\n1,"2"3\n', r"a\.csv:2: not valid CSV"),
    ],
)
def test_malformed_files_are_refused_with_file_line_and_reason(
    write: Write, name: str, content: str, message: str
) -> None:
    with pytest.raises(DataFileError, match=message):
        read_records(write(name, content), "train_file")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path: Path, name: str) -> None:
    lines = ['{"a": "b"}', '{"a": "caf\xe9"}'] if name == "a.jsonl" else ["a,b", "1,caf\xe9"]
    (tmp_path / name).write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(DataFileError, match=rf"{re.escape(name)}:2: not UTF-8 text at byte \d+ of the line"):
        read_records(str(tmp_path / name), "train_file")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"b": "c"}', r":1: field 'a' is missing; fields found: 'b'"),
        ("{}", r":1: field 'a' is missing; fields found: none"),
        ('{"a": 3}', r":1: field 'a' must be a string, got int: 3"),
        ('{"a": null}', r":1: field 'a' must be a string, got NoneType"),
        ('{"a": " \\n"}', r":1: field 'a' is empty"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", r":1: field 'a' must be a string, got list: \[+\.\.\.\]+$"),
        ('{"a": "\\ud800"}', r":1: field 'a' is not valid Unicode text"),
    ],
)
def test_text_fields_are_checked(write: Write, line: str, message: str) -> None:
    (record,) = read_records(write("a.jsonl", line), "train_file")
    with pytest.raises(DataFileError, match=message):
        text_field(record, "a")


def test_split_keeps_equal_keys_together_and_every_example_once() -> None:
    keys = [f"key {number % 70}" for number in range(200)]
    kept, held = held_out_indices(keys, 0.2, seed=1)
    assert sorted(kept + held) == list(range(200))
    assert kept == sorted(kept)
    assert not {keys[i] for i in kept} & {keys[i] for i in held}
    assert 38 <= len(held) <= 40


def test_split_depends_on_seed_and_keys_but_not_on_their_order() -> None:
    keys = [f"key {number}" for number in range(50)]
    shuffled = random.Random(0).sample(keys, len(keys))
    held = {keys[i] for i in held_out_indices(keys, 0.3, seed=1)[1]}
    assert held == {shuffled[i] for i in held_out_indices(shuffled, 0.3, seed=1)[1]}
    assert held != {keys[i] for i in held_out_indices(keys, 0.3, seed=2)[1]}


def test_split_holds_out_the_same_share_of_every_class() -> None:
    classes = ["rare"] * 20 + ["common"] * 180
    held = held_out_indices([str(i) for i in range(200)], 0.1, seed=3, strata=classes)[1]
    assert Counter(classes[i] for i in held) == {"rare": 2, "common": 18}


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_split_leaves_neither_side_empty_when_there_are_two_keys(fraction: float) -> None:
    kept, held = held_out_indices(["a"] * 9 + ["b"] * 3, fraction, seed=0)
    assert kept
    assert held
    assert held_out_indices(["a", "b"], fraction, seed=0)[1]


def test_split_of_one_key_holds_out_nothing() -> None:
    assert held_out_indices(["a", "a"], 0.5, seed=0) == ([0, 1], [])


def test_texts_that_differ_in_case_and_space_count_as_equal() -> None:
    assert normalized(" A  Good\nFilm ") == normalized("a good film")
    assert normalized("a good film") != normalized("a good film!")
