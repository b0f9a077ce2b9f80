from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from genlora_lightning.data import DataFileError
from genlora_lightning.data._files import read_records, structured_field
from genlora_lightning.data._formats import SUFFIXES
from tests.data.conftest import write_table

Write = Callable[..., str]
RECORDS = [{"a": "é", "b": "1"}, {"a": "two\nlines", "b": "2"}]
TABLES = (".parquet", ".arrow")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_fields_with_places_of_their_own(write: Write, suffix: str) -> None:
    path = write(f"a{suffix}", RECORDS)
    records = read_records(path, "train_file")
    assert [record.fields for record in records] == RECORDS
    assert len({record.where for record in records}) == 2
    assert all(record.where.startswith(f"{path}:") for record in records)


def test_a_list_in_an_object_and_a_byte_order_mark_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": RECORDS}), encoding="utf-8-sig")
    assert read_records(str(path), "train_file")[1] == (f"{path}:record 2", RECORDS[1])


def test_arrow_files_are_taken_as_streams_are(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    records = read_records(str(tmp_path / "a.arrow"), "train_file")
    assert [record.fields for record in records] == RECORDS
    assert records[1].where.endswith("a.arrow:record 2")


@pytest.mark.parametrize("suffix", TABLES)
def test_fields_that_other_rows_of_a_table_have_are_left_out(write: Write, suffix: str) -> None:
    rows = [{"a": [{"x": 1}, {"y": "z"}]}, {"b": '["c"]'}]
    path = write(f"a{suffix}", rows)
    table = pyarrow.Table.from_pylist(
        rows,
        schema=pyarrow.schema(
            [
                ("a", pyarrow.list_(pyarrow.struct([("x", pyarrow.int64()), ("y", pyarrow.string())]))),
                ("b", pyarrow.string()),
            ]
        ),
    )
    write_table(Path(path), table)
    first, second = read_records(path, "train_file")
    assert (first.fields, second.fields) == (rows[0], rows[1])
    assert structured_field(second, "b") == ["c"], "as in a CSV file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"a\.json: train_file holds no records"),
        ('{"data": {}}', r'a\.json: must be a list of records, or \{"data": .* got an object with \[\'data\'\]'),
        ("3", r"a\.json: must be a list of records, .* got int"),
        ('[{"a": 1},\n 4]', r"a\.json:record 2: must be a JSON object, got int"),
        ('[{"a": 1},\n {"b" 4}]', r"a\.json:2: not valid JSON: .* at column 7$"),
        ('{"a": 1}\n{"a": 2}', r"a\.json:2: not valid JSON: Extra data at column 1; .* belongs in a \.jsonl file"),
        ('[{"a": 1, "a": 2}]', r"a\.json: not usable JSON: the key 'a' is there twice"),
        pytest.param("[" * 200_000, r"a\.json(:1)?: not (usable|valid) JSON: ", id="nested-too-deeply"),
    ],
)
def test_malformed_lists_are_refused_with_place_and_reason(write: Write, content: str, message: str) -> None:
    with pytest.raises(DataFileError, match=message):
        read_records(write("a.json", content), "train_file")


def test_bytes_that_are_not_utf8_are_refused_in_lists_and_compressed_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('[{"a": "\xe9"}]'.encode("latin-1"))
    with pytest.raises(DataFileError, match=r"a\.json: not UTF-8 text at byte 9"):
        read_records(str(tmp_path / "a.json"), "train_file")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n{"a": "\xe9"}'))
    with pytest.raises(DataFileError, match=r"a\.jsonl\.gz:2: not UTF-8 text at byte 8 of the line"):
        read_records(str(tmp_path / "a.jsonl.gz"), "train_file")


@pytest.mark.parametrize("suffix", [".jsonl.gz", *TABLES])
def test_damaged_files_are_refused_by_name(write: Write, suffix: str) -> None:
    """Any bytes: cut off, changed, and not of this format at all."""
    path = Path(write(f"a{suffix}", [{"a": "b" * 20, "c": [1, 2]}] * 50))
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for number in range(60):
        data = bytearray(whole[: rng.randrange(1, len(whole))] if number % 3 == 0 else whole)
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(b"nothing of the kind" if number == 0 else data)
        try:
            read_records(str(path), "train_file")
        except DataFileError as error:
            assert str(error).startswith(str(path))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("suffix", TABLES)
def test_a_table_names_its_columns_once_and_holds_text_of_unicode(tmp_path: Path, suffix: str) -> None:
    twice = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["a", "a"])
    with pytest.raises(DataFileError, match=r"column names must be distinct, got \['a', 'a'\]"):
        read_records(write_table(tmp_path / f"a{suffix}", twice), "train_file")
    bytes_: Any = pyarrow.array([b"\xff"]).view(pyarrow.string())
    with pytest.raises(DataFileError, match=r"cannot be read as a table after record 0: .*UTF8"):
        read_records(write_table(tmp_path / f"b{suffix}", pyarrow.table({"a": bytes_})), "train_file")
