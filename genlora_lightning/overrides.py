"""Put notes and methods on objects of somebody else, in one record on each of them, and take them back."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

_RECORD = "_genlora"


class _Absent:
    """Stands for an attribute that was not there; a class, because copies and pickles leave it what it is."""


@dataclass
class _Record:
    notes: dict[str, Any] = field(default_factory=dict)
    overridden: dict[str, Any] = field(default_factory=dict)  # what the object's own attributes were


def note(target: Any, key: str, value: Any) -> None:
    """Keep something with an object of somebody else (a user's module, a parameter), where no attribute of its own is.

    Args:
        target: The object. A copy of it has the note, too.
        key: The note's name.
        value: What is noted.
    """
    _record(target).notes[key] = value


def noted(target: Any, key: str, default: Any = None) -> Any:
    """Look up a note; of a wrapper that passes on what it is asked for, the note of what is inside."""
    record: _Record | None = getattr(target, _RECORD, None)
    return default if record is None else record.notes.get(key, default)


def forget(target: Any, key: str) -> Any:
    """Take a note back; what it was, or ``None``."""
    record: _Record | None = vars(target).get(_RECORD)
    found = None if record is None else record.notes.pop(key, None)
    _drop_if_empty(target)
    return found


def put_on(target: Any, **attributes: Any) -> None:
    """Put attributes on an object of somebody else, in front of its class's; what it had of its own is remembered.

    An attribute that is overridden twice goes back to what it was before the first time.
    """
    own = vars(target)
    record = _record(target)
    for name, value in attributes.items():
        record.overridden.setdefault(name, own.get(name, _Absent))
        own[name] = value


def state_of(target: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What a copy or pickle of an object is made of: its state, without what :func:`put_on` has put on it.

    Args:
        target: The object.
        state: Its attributes, as its own ``__getstate__`` gives them; is left as it is.
    """
    record: _Record | None = state.get(_RECORD)
    if record is None:
        return state
    state = {**state, _RECORD: _Record(notes=record.notes, overridden=dict(record.overridden))}
    bare = SimpleNamespace(**state)
    take_off(bare, *record.overridden)
    return vars(bare)


def take_off(target: Any, *names: str) -> None:
    """Take back what :func:`put_on` has put on an object; nothing for names that it has not."""
    own = vars(target)
    record: _Record | None = own.get(_RECORD)
    for name in names:
        if record is None or name not in record.overridden:
            continue
        before = record.overridden.pop(name)
        if before is _Absent:
            own.pop(name, None)
        else:
            own[name] = before
    _drop_if_empty(target)


def _record(target: Any) -> _Record:
    found: _Record = vars(target).setdefault(_RECORD, _Record())
    return found


def _drop_if_empty(target: Any) -> None:
    record: _Record | None = vars(target).get(_RECORD)
    if record is not None and not record.notes and not record.overridden:
        del vars(target)[_RECORD]
