"""Check that a document which was read holds what it should, before anything relies on it."""

from __future__ import annotations

from typing import Any

from genlora_lightning.errors import DamagedFileError
from genlora_lightning.fields import shown

#: What a value should be: a type, or some; a list of one shape; a dictionary of shapes by name, where a name that ends
#: in ``?`` may be missing and ``str`` stands for every name; or a function that says whether it is right.
Shape = Any


def check_document(source: str, value: Any, shape: Shape, place: str = "") -> None:
    """Check a value and all that is in it.

    Args:
        source: The file, for the message.
        value: What was read.
        shape: What it should be.
        place: Where it stands in the document, for the message.

    Raises:
        DamagedFileError: A part is missing or is something else; the message says where.
    """
    wrong = f"{source} is damaged, or was not written by this library: {place or 'it'}"
    if isinstance(shape, dict):
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise DamagedFileError(f"{wrong} must be a dictionary with text keys, got {shown(value)}.")
        inside = dict.fromkeys(value, shape[str]) if str in shape else shape
        for key, inner in inside.items():
            name = key if str in shape else key.removesuffix("?")
            here = f"{place}.{name}" if place else name
            if name in value:
                check_document(source, value[name], inner, here)
            elif name == key:
                raise DamagedFileError(f"{source} is damaged, or was not written by this library: it has no {here}.")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise DamagedFileError(f"{wrong} must be a list, got {shown(value)}.")
        for index, item in enumerate(value):
            check_document(source, item, shape[0], f"{place}[{index}]")
    elif isinstance(shape, (type, tuple)):
        types = shape if isinstance(shape, tuple) else (shape,)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise DamagedFileError(f"{wrong} must be {words}, got {shown(value)}.")
    elif not shape(value):
        raise DamagedFileError(f"{wrong} cannot be {shown(value)}.")


def is_matrix_shape(value: Any) -> bool:
    """Whether a value is a pair of sizes, or, for a stack of matrices, three: their number first."""
    return (
        isinstance(value, (list, tuple))
        and len(value) in (2, 3)
        and all(isinstance(size, int) and not isinstance(size, bool) and 1 <= size < 2**31 for size in value)
    )
