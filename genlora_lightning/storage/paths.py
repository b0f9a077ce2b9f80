"""Tell local paths from those of a remote store, which ``pathlib`` would take for folders with odd names."""

from __future__ import annotations

import os
import re
from pathlib import Path

# With one slash, too: `Path("s3://bucket/run")` has lost the other. A drive of Windows has one letter.
_SCHEME = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9+.-]+)(?:::.*)?:/+")
_LOCAL = ("file", "local")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of something else than local files, such as ``s3://bucket/run``."""
    found = _SCHEME.match(os.fspath(path))
    return found is not None and found["name"] not in _LOCAL


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """The local path that a path or a ``file://`` URL means.

    Args:
        path: A path or a URL.
        what: What it is the place of, for the message: ``"adapter folder"``.

    Raises:
        ValueError: It is the URL of a remote store.
    """
    text = os.fspath(path)
    if is_remote(text):
        raise ValueError(
            f"The {what} {text!r} is a URL, and must be a local path: it is written, and proved when it is read, in "
            "ways that a remote store does not offer. Give a local path, and copy it from or to the store."
        )
    found = _SCHEME.match(text)
    return Path("/" + text[found.end() :]) if found else Path(path)
