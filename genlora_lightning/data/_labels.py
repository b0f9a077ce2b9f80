"""Read the label of a record, and turn labels into the numbers of classes; for texts and for pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from genlora_lightning.data._files import checked_text
from genlora_lightning.errors import DataFileError
from genlora_lightning.fields import shown


def check_label_names(label_names: list[str] | None, least: int = 2) -> None:
    """Checks the names that the user has given.

    Raises:
        ValueError: They are too few, or one is there twice.
    """
    if label_names is not None and (len(label_names) < least or len(set(label_names)) < len(label_names)):
        words = "one name" if least == 1 else "two distinct names"
        raise ValueError(f"label_names must be at least {words}, got {label_names}")


def label_text(label: Any, where: str, column: str, *, names_given: bool, hint: str = "") -> str:
    """Returns a label as text, the same one for what CSV and JSON write differently.

    Args:
        label: What the record has.
        where: The record's place, for messages.
        column: The label's field, for messages.
        names_given: Whether the user has given the names, so that those that look like numbers are meant.
        hint: What else to say of a number with a fraction.

    Raises:
        DataFileError: It is none.
    """
    if isinstance(label, (int, float)) and not isinstance(label, bool):
        label = str(label)
    what = f"field {column!r}"
    if not isinstance(label, str):
        raise DataFileError(where, f"{what} must be a string or a whole number, got {shown(label)}")
    text = checked_text(label, where, what).strip()
    if not names_given and _is_fraction(text):
        raise DataFileError(where, f"{what} must be a string or a whole number, got {text:.80}; {hint}give label_names")
    return text


def label_index(label: str, names: Sequence[str], where: str) -> int:
    """Returns the number of a label: its place in the names, or itself if it is such a place.

    Raises:
        DataFileError: It is neither.
    """
    if label in names:
        return names.index(label)
    if _is_integer(label) and len(label) < 10 and 0 <= int(label) < len(names) and not all(map(_is_integer, names)):
        return int(label)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise DataFileError(where, f"unknown label {shown(label)}; known are {listed}")


def names_of(labels: Iterable[str], source: str) -> list[str]:
    """Returns different labels in order: as numbers if all are.

    Args:
        labels: Of all records.
        source: Where they are from, for the message.

    Raises:
        DataFileError: They are all equal, or there is none.
    """
    found = set(labels)
    if len(found) < 2:
        held = f"the label {found.pop()!r}" if found else "no label"
        raise DataFileError(source, f"all records have {held}; there is nothing to tell apart")
    return sorted(found, key=int) if all(map(_is_integer, found)) else sorted(found)


def _is_fraction(label: str) -> bool:
    """Returns whether a text is a number, but not a whole one as whole ones are written."""
    try:
        float(label)
    except ValueError:
        return False
    return not _is_integer(label)


def _is_integer(label: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", label) is not None
