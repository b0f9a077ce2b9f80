"""Read data files, check them and their fields, and split them without leakage.

Nothing here knows of tokenizers, torch or Lightning. Every complaint names the file and the line it is about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genlora_lightning.data._formats import SUFFIXES, Record, from_table, parse_json, reader_of
from genlora_lightning.data._hub import PREFIX, hub_records, load_hub_dataset
from genlora_lightning.errors import DataFileError
from genlora_lightning.fields import is_text, shown


def check_file(path: str, argument: str) -> None:
    """Checks in no time that a data file can be read at all; a data set on the Hub is fetched.

    Args:
        path: The file as the user gave it.
        argument: The argument it was given as, for the message.

    Raises:
        FileNotFoundError: There is no such file.
        DataFileError: It is a folder, it is empty, or its name has an ending that is not known.
    """
    if path.startswith(PREFIX):
        load_hub_dataset(path, argument)
        return
    file = Path(path)
    if "\0" in path or not is_text(path):
        raise DataFileError(ascii(path), f"the name of {argument} is not valid Unicode text; rename the file")
    if not file.exists():
        raise FileNotFoundError(f"{argument}: there is no file {path!r} (looked in {Path.cwd()})")
    if not file.is_file():
        raise DataFileError(path, f"{argument} is not a file; give one file, {listed(SUFFIXES)}")
    if reader_of(path) is None:
        raise DataFileError(
            path,
            f"unknown file extension {file.suffix!r} for {argument}; allowed are {listed(SUFFIXES, 'and')} "
            "(JSON with one object a line belongs in a .jsonl file)",
        )
    if file.stat().st_size == 0:
        raise DataFileError(path, f"{argument} is empty (0 bytes)")


def read_records(path: str, argument: str) -> list[Record]:
    """Reads a whole file; blank lines are skipped.

    Args:
        path: The file, its format told by its extension; text is UTF-8. Or a name on the Hub, ``hf://org/name:split``.
        argument: The argument it was given as, for the messages.

    Returns:
        The records in file order; at least one.

    Raises:
        FileNotFoundError: There is no such file.
        DataFileError: The file is empty, not UTF-8, or a line is malformed; the message has file, line and reason.
    """
    records = list(iterate_records(path, argument))
    if not records:
        raise DataFileError(path, f"{argument} holds no records")
    return records


def iterate_records(path: str, argument: str) -> Iterator[Record]:
    """Yields the records of a file, which may be none; else as `read_records`."""
    if path.startswith(PREFIX):
        yield from hub_records(path, argument)
        return
    check_file(path, argument)
    read = reader_of(path)
    assert read is not None, "check_file refuses it"
    yield from read(path)


def text_field(record: Record, name: str) -> str:
    """Returns a text field that must be there, be a string and not be blank; otherwise raises DataFileError."""
    if name not in record.fields:
        found = ", ".join(map(shown, record.fields)) or "none"
        raise DataFileError(record.where, f"field {name!r} is missing; fields found: {found}")
    return checked_text(record.fields[name], record.where, f"field {name!r}")


def structured_field(record: Record, name: str) -> Any:
    """Returns a field that may be a list: in a table it may be JSON text; otherwise raises DataFileError."""
    value = record.fields.get(name)
    if not isinstance(value, str) or not from_table(record):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise DataFileError(record.where, f"column {name!r} is not valid JSON: {error}") from error


def checked_text(value: object, where: str, what: str, *, may_be_blank: bool = False) -> str:
    """Returns ``value`` if it is a usable string; otherwise raises DataFileError with ``what`` as the subject."""
    if not isinstance(value, str):
        raise DataFileError(where, f"{what} must be a string, got {type(value).__name__}: {shown(value)}")
    if not may_be_blank and not value.strip():
        raise DataFileError(where, f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataFileError(where, f"{what} is not valid Unicode text: {error.reason}") from error
    return value


def listed(words: Sequence[str], last: str = "or") -> str:
    """Returns words as a text: ``a, b or c``."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def is_blank(value: object) -> bool:
    """Returns whether a field says nothing: null in JSON, and in CSV nothing but white space."""
    return value is None or (isinstance(value, str) and not value.strip())


def normalized(text: str) -> str:
    """Returns the form in which two texts count as equal: case and runs of white space make no difference."""
    return " ".join(text.split()).casefold()


def held_out_indices(
    keys: Sequence[str], fraction: float, seed: int, strata: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Splits examples into two parts so that equal keys are always on the same side.

    The order in which keys are drawn comes from a hash of seed and key alone, so the same examples are held out
    whatever their order in the file, on every machine and in every process.

    Args:
        keys: What makes an example a duplicate of another one, for each example.
        fraction: The share of examples to hold out, between 0 and 1.
        seed: Another seed gives another split.
        strata: A class for each example; each class is held out at about the same rate.

    Returns:
        The indices that stay and the indices held out, both in file order. The second list is empty only if there are
        fewer than two distinct keys.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        return list(range(len(keys))), []

    digests = {key: hashlib.sha256(f"{seed}\0{key}".encode()).hexdigest() for key in groups}
    members: dict[str, list[str]] = {}
    for key in sorted(groups, key=digests.__getitem__):
        members.setdefault("" if strata is None else strata[groups[key][0]], []).append(key)
    # The place of a key within its class, between 0 and 1: drawing by place takes the same share of every class.
    place = {key: (rank + 0.5) / len(peers) for peers in members.values() for rank, key in enumerate(peers)}
    order = sorted(groups, key=lambda key: (place[key], digests[key]))

    target = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    held: list[int] = []
    for key in order:
        if len(held) + len(groups[key]) <= target:
            held += groups[key]
    if not held:  # every group is larger than the target
        held = groups[min(order, key=lambda key: len(groups[key]))]
    held_set = set(held)
    return [index for index in range(len(keys)) if index not in held_set], sorted(held)
