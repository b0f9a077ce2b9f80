"""Find the newest checkpoint of a stopped run that is as it was written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from genlora_lightning.artifacts.loading import read_checkpoint
from genlora_lightning.errors import DamagedFileError

_NEEDED = ("optimizer_states", "loops")


def last_good_checkpoint(folders: Iterable[Path]) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that verifies and that a run can go on from.

    Newest is the file that was written last. On several machines all of them must see the same folders, as Lightning
    asks of a checkpoint anyway.

    Args:
        folders: Folders that hold checkpoints themselves; those that do not exist are left out.

    Returns:
        The file, or ``None`` if there is none; and for each newer one that was skipped a sentence that says why.
    """
    files = {file.resolve(): file for folder in folders if folder.is_dir() for file in folder.glob("*.ckpt")}
    skipped: list[str] = []
    # Names settle what was written at the same time, so that all processes choose the same.
    for file in sorted((f for f in files if f.is_file()), key=lambda f: (f.stat().st_mtime_ns, str(f)), reverse=True):
        problem = _problem(file)
        if problem is None:
            return file, skipped
        skipped.append(f"Skipped the checkpoint {files[file]}: {problem}")
    return None, skipped


def _problem(file: Path) -> str | None:
    """Why a run cannot go on from a file; ``None`` if it can."""
    try:
        content = read_checkpoint(file)  # which verifies it
    except DamagedFileError as error:
        return str(error)
    except ValueError:
        return None  # as it was written, but it holds objects that only the run itself may load
    absent = [name for name in _NEEDED if name not in content]
    return f"it holds no {' and no '.join(absent)} (`save_weights_only`)." if absent else None
