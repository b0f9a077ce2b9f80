"""Write folders all or nothing, and never over what is not ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from genlora_lightning.storage.atomic import atomic_folder
from genlora_lightning.storage.paths import local_path


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
        ValueError: The folder is a URL of a remote store.
        FileExistsError: The folder exists and is not ours; it is left as it is.
        OSError: It cannot be written; then nothing is left behind.
    """
    folder = check_replaceable(folder, is_ours, what)
    try:
        with atomic_folder(folder) as staging:
            write(staging)
            for file in staging.rglob("*"):
                if file.is_file():
                    os.chmod(file, 0o666 & ~_umask())  # safetensors makes its files private; a server is another user
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The {what} could not be written to {folder}: {error}. Nothing was left behind; check that there is space "
            "and that the folder is writable."
        ) from error
    return folder


def check_replaceable(folder: str | os.PathLike[str], is_ours: Callable[[Path], bool], what: str) -> Path:
    """Raise what :func:`write_folder` would raise if a folder must not be replaced, before any work is done."""
    folder = local_path(folder, f"folder of the {what}")
    if not folder.exists() or (folder.is_dir() and (not any(folder.iterdir()) or is_ours(folder))):
        return folder
    raise FileExistsError(
        f"{folder} exists and is not a {what} as this library wrote it; it is left as it is. Give another folder, or "
        "remove this one."
    )


def _umask() -> int:
    # The umask can be read only by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
