"""Check the fields of configurations, and read configurations from dictionaries, with messages that say what to do."""

from __future__ import annotations

import dataclasses
import math
import operator
import reprlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

LARGEST_INTEGER = 2**31 - 1  # no size or count comes near to it, and torch takes it
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxlist, _SHOWN.maxdict = 3, 20, 20
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 160


def shown(value: object) -> str:
    """A value for a message: as Python writes it, but short, however long or deeply nested it is."""
    return _SHOWN.repr(value)


def is_text(value: str) -> bool:
    """Whether a text can be written to a file: it has no lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_integer(name: str, value: Any, *, least: int) -> None:
    """Check that a field is an integer in its range.

    Raises:
        TypeError: It is no integer.
        ValueError: It is less than ``least``, or larger than any count can be.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {shown(value)} of type {type(value).__name__}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {shown(value)}.")
    if value > LARGEST_INTEGER:
        raise ValueError(f"`{name}` must be at most {LARGEST_INTEGER}, got {shown(value)}.")


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Check that a field is a finite number in its range.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite or out of its range; the message gives the range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = " YAML reads 1e-3 as a text; write 1.0e-3." if isinstance(value, str) else ""
        raise TypeError(f"`{name}` must be a number, got {shown(value)} of type {type(value).__name__}.{hint}")
    limits = (
        ("greater than", above, operator.gt),
        ("at least", least, operator.ge),
        ("less than", below, operator.lt),
        ("at most", most, operator.le),
    )
    given = [(words, limit, holds) for words, limit, holds in limits if limit is not None]
    bounds = [f"{words} {limit:g}" for words, limit, _ in given]
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond floating point
        finite = False
    if not (finite and all(holds(value, limit) for _, limit, holds in given)):
        raise ValueError(f"`{name}` must be {' and '.join(['finite', *bounds])}, got {shown(value)}.")


def check_flag(name: str, value: Any) -> None:
    """Check that a field is true or false.

    Raises:
        TypeError: It is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be true or false, got {shown(value)}.")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check that a field is one of some names.

    Raises:
        ValueError: It is another one; the message lists them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.")


def check_fields(cls: type, values: Mapping[str, Any], hints: Mapping[str, str] | None = None) -> None:
    """Check that a dictionary's keys are fields of a dataclass.

    Args:
        cls: The dataclass.
        values: The dictionary.
        hints: What to say of names that are known and not fields.

    Raises:
        ValueError: A key is no field; the message lists the fields.
    """
    fields = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(fields), key=str)
    if not unknown:
        return
    words = [f" {(hints or {})[name]}" for name in unknown if name in (hints or {})]
    near = [f" Did you mean `{match}`?" for name in unknown for match in get_close_matches(str(name), fields, 1)]
    raise ValueError(
        f"Unknown {cls.__name__} fields {shown(unknown)}.{''.join(words or near)} The fields are {fields}."
    )
