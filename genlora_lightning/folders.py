"""Folders that are written all or nothing, and never over what is not ours."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from genlora_lightning.adapter_io import _replace_folder, _umask


def write_folder(
    folder: str | os.PathLike[str], write: Callable[[Path], None], is_ours: Callable[[Path], bool], what: str
) -> Path:
    """Write a folder beside its destination and rename it, so that it is there whole or not at all.

    Args:
        folder: The destination. An empty folder, or one that ``is_ours``, is replaced.
        write: Called with an empty folder to fill.
        is_ours: Whether an existing folder is one that may be replaced.
        what: What is written, for messages: ``"merged model"``.

    Returns:
        The folder's path.

    Raises:
        FileExistsError: The folder exists and is not ours; it is left as it is.
        OSError: It cannot be written; then nothing is left behind.
    """
    folder = Path(folder)
    check_replaceable(folder, is_ours, what)
    staging: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        os.chmod(staging, 0o777 & ~_umask())
        write(staging)
        for file in staging.rglob("*"):
            if file.is_file():
                os.chmod(file, 0o666 & ~_umask())  # safetensors makes its files private; a server may be another user
        _replace_folder(staging, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The {what} could not be written to {folder}: {error}. Nothing was left behind; check that there is space "
            "and that the folder is writable."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return folder


def check_replaceable(folder: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """Raise what :func:`write_folder` would raise if a folder must not be replaced, before any work is done."""
    if not folder.exists() or (folder.is_dir() and (not any(folder.iterdir()) or is_ours(folder))):
        return
    raise FileExistsError(
        f"{folder} exists and is not a {what} that this library wrote; it is left as it is. Give another folder, or "
        "remove this one."
    )
