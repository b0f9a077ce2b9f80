"""Read the records of a file, one by one, in each format that is known by its ending.

A complaint names the line, or the record where a format has no lines. Tables (Parquet, Arrow) give what JSON would: a
field that is null is left out there, because a table has each field in every row.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from genlora_lightning.errors import DataFileError
from genlora_lightning.fields import shown

_OWN_ERRORS = 300  # characters of another library's message


class Record(NamedTuple):
    """One record of a data file: its place (``file:line``) and its fields as they were read."""

    where: str
    fields: dict[str, Any]


def parse_json(text: str) -> Any:
    """Returns what a JSON text says.

    Raises:
        ValueError: It is malformed, nested too deeply, has a key twice or a number that is too long; `JSONDecodeError`
            where the place is known.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)} is there twice in one object")
    return found


def _decoded_lines(path: str) -> Generator[str, None, None]:
    """Yields the lines of a UTF-8 file, with or without a byte order mark; those in a .gz file, too.

    Close it: an error keeps it alive, and with it the open file.
    """
    with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
        number = 0
        while True:
            number += 1
            try:
                line = file.readline()
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise DataFileError(f"{path}:{number}", f"the compressed file is damaged: {error}") from error
            if not line:
                return
            yield _decoded(line, f"{path}:{number}", "byte {} of the line", first=number == 1)


def _decoded(data: bytes, where: str, place: str, *, first: bool) -> str:
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text at {place.format(error.start + 1)} ({error.reason}); save it as UTF-8"
        raise DataFileError(where, reason) from error


def read_json_lines(path: str, wanted: Callable[[int], bool] | None = None) -> Iterator[Record | None]:
    """Yields the records of a file of JSON lines.

    Args:
        path: The file.
        wanted: Says which records to parse, by their numbers from 0; None is yielded for others. All if not given.
    """
    place = -1
    with closing(_decoded_lines(path)) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place += 1
            if wanted is not None and not wanted(place):
                yield None
                continue
            where = f"{path}:{number}"
            try:
                fields = parse_json(line)
            except json.JSONDecodeError as error:
                reason = (
                    f"not valid JSON: {error.msg} at column {error.colno}; a .jsonl file has one JSON object a line"
                )
                raise DataFileError(where, reason) from error
            except ValueError as error:
                raise DataFileError(where, f"not usable JSON: {error}") from error
            yield _record(where, fields)


def _record(where: str, fields: Any) -> Record:
    if isinstance(fields, dict):
        return Record(where, fields)
    hint = '; a list of messages belongs into one: {"messages": [...]}' if isinstance(fields, list) else ""
    raise DataFileError(where, f"must be a JSON object, got {type(fields).__name__}{hint}")


def _read_jsonl(path: str) -> Iterator[Record]:
    return (record for record in read_json_lines(path) if record is not None)


def _read_csv(path: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize // 2**32)  # 2 GiB: a conversation may well be longer than the default of 128 KiB
    with closing(_decoded_lines(path)) as lines:
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}:{reader.line_num + 1}"  # a record may span lines: name its first
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise DataFileError(where, f"not valid CSV: {error}") from error
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header) or "" in header:
                    raise DataFileError(where, f"column names must be distinct and not empty, got {shown(header)}")
                if len(header) == 1 and (other := re.search("[;\t|]", header[0])):
                    reason = (
                        f"one column {shown(header[0])}: its names are separated by {other[0]!r}; save it with commas"
                    )
                    raise DataFileError(where, reason)
            elif len(row) != len(header):
                raise DataFileError(where, f"{len(row)} values in a file of {len(header)} columns {shown(header)}")
            else:
                yield Record(where, dict(zip(header, row, strict=True)))


def _read_json(path: str) -> Iterator[Record]:
    with open(path, "rb") as file:
        text = _decoded(file.read(), path, "byte {}", first=True)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        hint = "; JSON with one object a line belongs in a .jsonl file" if error.msg == "Extra data" else ""
        reason = f"not valid JSON: {error.msg} at column {error.colno}{hint}"
        raise DataFileError(f"{path}:{error.lineno}", reason) from error
    except ValueError as error:
        raise DataFileError(path, f"not usable JSON: {error}") from error
    records = value.get("data") if isinstance(value, dict) else value
    if not isinstance(records, list):
        found = f"an object with {shown(list(value))}" if isinstance(value, dict) else type(value).__name__
        raise DataFileError(path, f'must be a list of records, or {{"data": [...]}} with such a list, got {found}')
    for number, fields in enumerate(records, start=1):
        yield _record(f"{path}:record {number}", fields)


def _read_parquet(path: str) -> Iterator[Record]:
    from pyarrow import parquet

    with open(path, "rb") as file:
        yield from _table_records(path, lambda: parquet.ParquetFile(file).iter_batches())


def _read_arrow(path: str) -> Iterator[Record]:
    from pyarrow import ipc

    # Written as a file (Feather), or as a stream, as `datasets` does.
    with open(path, "rb") as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)

        def batches() -> Iterator[Any]:
            if is_file:
                reader = ipc.open_file(file)
                return (reader.get_batch(number) for number in range(reader.num_record_batches))
            return iter(ipc.open_stream(file))

        yield from _table_records(path, batches)


def _table_records(path: str, batches: Callable[[], Iterator[Any]]) -> Iterator[Record]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            # Numbers in a damaged file may point anywhere.
            batch.validate(full=True)
            names = batch.schema.names
            if len(set(names)) < len(names):
                raise DataFileError(path, f"column names must be distinct, got {shown(names)}")
            for fields in batch.to_pylist():
                number += 1
                yield Record(f"{path}:record {number}", without_nulls(fields))
    # Whatever is wrong, pyarrow raises one of these; a damaged length, for one, asks for more memory than there is.
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, LookupError, TypeError, MemoryError) as error:
        if isinstance(error, DataFileError):
            raise
        reason = " ".join(str(error).split())[:_OWN_ERRORS] or type(error).__name__
        raise DataFileError(path, f"cannot be read as a table after record {number}: {reason}") from error


def without_nulls(value: Any) -> Any:
    """Returns a table's value without the fields that are null, at any depth: those that other rows have."""
    if isinstance(value, dict):
        return {name: without_nulls(field) for name, field in value.items() if field is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


#: What reads a file, by the ending of its name.
READERS: dict[str, Callable[[str], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
SUFFIXES = tuple(READERS)
_TABLES = (".csv", ".parquet", ".arrow")


def reader_of(path: str) -> Callable[[str], Iterator[Record]] | None:
    """Returns what reads a file of this name, or None if its ending is not known."""
    return next((read for suffix, read in READERS.items() if path.lower().endswith(suffix)), None)


def from_table(record: Record) -> bool:
    """Returns whether a record comes from a table, in whose columns lists may be JSON text."""
    path = record.where.rpartition(":")[0].lower()
    return path.startswith("hf://") or path.endswith(_TABLES)
