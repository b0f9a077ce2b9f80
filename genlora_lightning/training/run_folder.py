"""Find a run's own folder, and see to it that no run replaces what another one has trained."""

from __future__ import annotations

import os
import secrets
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from genlora_lightning.artifacts.adapter_folder import stored_facts
from genlora_lightning.overrides import note, noted
from genlora_lightning.storage.paths import is_remote, local_path

_RUN = "run"


def logs_folder(trainer: Trainer, logger: Logger) -> str:
    """The folder of a logger's runs, in which each has one of its own; a URL if the logger writes to one."""
    root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
    return os.path.join(root, str(logger.name))


def run_folder(trainer: Trainer) -> str:
    """The folder of a run as this process sees it, or its URL: that in which ModelCheckpoint makes ``checkpoints``.

    Trackers of experiments log to one directory for all runs, so that ``trainer.log_dir`` may be shared by many.
    """
    if not trainer.loggers:
        return trainer.default_root_dir
    version = trainer.loggers[0].version
    name = version if isinstance(version, str) else f"version_{version}"
    return os.path.join(logs_folder(trainer, trainer.loggers[0]), name)


def recorded_folder(trainer: Trainer) -> Path | None:
    """The folder in which this process is to keep how a run goes; collective.

    Returns:
        ``None`` on other ranks than the first, and where the run's folder is remote or it does not train in earnest.
    """
    folder = trainer.strategy.broadcast(run_folder(trainer))
    kept = trainer.is_global_zero and not is_remote(folder) and not getattr(trainer, "fast_dev_run", False)
    return local_path(folder, "run's folder") if kept else None


# -- which run it is ---------------------------------------------------------------------------------------------


def begin_run(trainer: Trainer, *, goes_on: bool) -> None:
    """Give a trainer's run a name of its own, unless it goes on with what the same trainer has trained before."""
    if not goes_on or run_name(trainer) is None:
        note(trainer, _RUN, secrets.token_hex(8))


def resume_run(trainer: Trainer, name: str | None) -> None:
    """Go on with the run that wrote a checkpoint; ``None`` if that does not say which it was."""
    note(trainer, _RUN, name)


def run_name(trainer: Trainer) -> str | None:
    """The name by which a run knows its own files, a restarted one those from before, too."""
    found: str | None = noted(trainer, _RUN)
    return found


# -- what lies in its place -------------------------------------------------------------------------------------------


def check_not_taken(folder: Path, run: str | None, *, overwrite: bool) -> None:
    """Refuse a folder that holds what another run has trained.

    Raises:
        FileExistsError: It does; the message says what it is, and what to do.
    """
    found = stored_facts(folder)
    if found is None or _may_replace(found, run, overwrite):
        return
    raise FileExistsError(
        f"{folder} holds the adapter of another run ({_described(found)}), which this one would replace when it ends. "
        "Nothing was changed. Give this run a folder of its own (`adapter_dir`; if that is not set, another logger, "
        "version or `default_root_dir`), go on from the other run's checkpoint (`ckpt_path`), or allow it to be "
        "replaced: `overwrite=True`, `--overwrite` on the command line."
    )


def free_folder(folder: Path, run: str | None, *, overwrite: bool) -> Path:
    """A folder, or the first of ``<folder>-2``, ``<folder>-3``, … that replaces nothing of another run."""
    places = (folder if number == 1 else folder.with_name(f"{folder.name}-{number}") for number in count(1))
    return next(
        place for place in places if (found := stored_facts(place)) is None or _may_replace(found, run, overwrite)
    )


def _may_replace(found: dict[str, Any], run: str | None, overwrite: bool) -> bool:
    # A run from an old checkpoint has no name, and neither has the folder that it wrote.
    return overwrite or found.get("run") == run


def _described(found: dict[str, Any]) -> str:
    step = found.get("global_step")
    parts = [f"{step} steps"] if isinstance(step, int) else []
    parts += [f"written {found['created']}"] if found.get("created") else []
    parts += [f"run {found['run']}"] if found.get("run") else []
    return ", ".join(parts) or "its manifest says nothing"
