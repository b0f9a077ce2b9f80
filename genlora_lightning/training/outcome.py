"""Save what a run has trained as an adapter folder, at its end or after an error, and find out early that it cannot.

Of named adapters each has a folder of its own in that folder, by its name.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from genlora_lightning.artifacts.adapter_folder import is_adapter_folder
from genlora_lightning.artifacts.adapter_io import AdapterRecord, write_adapter
from genlora_lightning.artifacts.peft_folder import PeftRecord
from genlora_lightning.callbacks.figures import FIGURES
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.distributed.shards import whole_like
from genlora_lightning.storage.atomic import remove_leftovers
from genlora_lightning.storage.paths import local_path
from genlora_lightning.training.checks import check_writable
from genlora_lightning.training.named_adapters import adapter_names
from genlora_lightning.training.run_folder import check_not_taken, free_folder, run_folder, run_name
from genlora_lightning.training.sync import AdapterSync

_log = rank_zero_logger(__name__)


def planned_folder(trainer: Trainer, run: str, adapter_dir: str | None) -> Path | None:
    """Where a run's adapter is to be saved; ``None`` if it does not train in earnest (``fast_dev_run``).

    Args:
        trainer: The run's trainer.
        run: The run's own folder (:func:`~genlora_lightning.training.run_folder.run_folder`).
        adapter_dir: The user's choice; ``adapter`` in the run's folder if ``None``.

    Raises:
        ValueError: The run's folder is remote.
    """
    if getattr(trainer, "fast_dev_run", False):
        return None
    if adapter_dir is not None:
        return Path(adapter_dir)
    try:
        return local_path(os.path.join(run, "adapter"), "adapter folder")
    except ValueError as error:
        raise ValueError(
            f"{error} Set `adapter_dir` to a local folder, or `save_adapter` to False: this run's checkpoints may "
            "be remote, and hold the adapters, too."
        ) from None


class Outcome:
    """The adapter folder of one run.

    Args:
        trainer: Its trainer.
        sync: Gathers what is to be saved.
        adapter_dir: The user's choice of the folder, or ``None``.
        overwrite: Says, when it is asked, whether another run's adapter may be replaced: callbacks may change it.
        wanted: Whether anything is to be saved.
    """

    def __init__(
        self,
        trainer: Trainer,
        sync: AdapterSync,
        *,
        adapter_dir: str | None,
        overwrite: Callable[[], bool],
        wanted: bool,
    ) -> None:
        self._trainer = trainer
        self._sync = sync
        self._overwrite = overwrite
        # Loggers may know their version on the first rank only.
        run = trainer.strategy.broadcast(run_folder(trainer))
        self._planned = planned_folder(trainer, run, adapter_dir) if wanted else None  # where it is to be saved ...
        self._folder: Path | None = None  # ... and may be
        self._settled = False
        self._saved_after_error = False

    def settle(self, module: LightningModule) -> None:
        """Find out before the training that the adapter cannot be saved, or would replace another run's; collective.

        Raises:
            OSError: One of both.
        """
        if self._settled:
            return
        self._settled = True
        problem: OSError | None = None
        if self._planned is not None and self._trainer.is_global_zero:
            try:
                for name in adapter_names(module):
                    place = self._planned / name
                    _check_not_inside(place, self._planned)
                    check_writable(place, needed=2 * _state_bytes(module))
                    check_not_taken(place, run_name(self._trainer), overwrite=self._overwrite())
                    # A run that was killed while it saved what it had does not save there again.
                    remove_leftovers(self._free(_after_error(self._planned) / name))
            except OSError as error:
                problem = error
        problem = self._trainer.strategy.broadcast(problem)
        if problem is not None:
            raise problem
        self._folder = self._planned

    def save(self, module: LightningModule) -> None:
        """Save the adapter of a run that has ended; collective if the adapters are sharded."""
        trainer = self._trainer
        if self._folder is None or not (trainer.is_global_zero or self._sync.shards_adapters):
            return
        contents = self._sync.records(module)
        if not trainer.is_global_zero:
            return
        facts = _facts(trainer, trainer.global_step)
        for name, content in contents.items():
            wanted = self._folder / name
            place = self._free(wanted)
            if place != wanted:
                rank_zero_warn(f"Another run has saved its adapter in {wanted} meanwhile; it is left as it is.")
            try:
                folder = write_adapter(content, place, training=facts)
            except OSError as error:
                # Hours of training must not end in a full disk: any other place is better than none.
                rank_zero_warn(str(error))
                folder = write_adapter(content, _spare_folder() / name, training=facts)
            _log.info(f"The adapter {f'{name!r} ' if name else ''}is saved in {folder}.")

    # -- after an error -----------------------------------------------------------------------------------------------

    @property
    def waits_for_error(self) -> bool:
        """Whether there is a folder for what an error leaves, and nothing was said of it yet."""
        return self._folder is not None and not self._saved_after_error

    def begin(self) -> None:
        """Begin a run: no error has been handled."""
        self._saved_after_error = False

    def give_up(self) -> None:
        """Save nothing after an error that is about to be raised: what there is, is worth nothing."""
        self._saved_after_error = True

    def save_after_error(self, module: LightningModule, *, step: int, on_all_ranks: bool = False) -> str:
        """Save what there is, without hiding the error that is being handled.

        Args:
            module: The module with the adapters.
            step: How many steps its weights are of.
            on_all_ranks: Whether all ranks have come here.

        Returns:
            A sentence on what was done.
        """
        trainer = self._trainer
        self._saved_after_error = True
        if self._folder is None:
            return "No adapter was saved (`save_adapter` is off)."
        if step == 0:
            return "No step had been made, so there is no adapter to save."
        if self._sync.shards_adapters and not on_all_ranks:
            return "The adapter lies in pieces on several ranks and was not saved; go on from the last checkpoint."
        if not (trainer.is_global_zero or self._sync.shards_adapters):
            return "The adapter is saved by rank 0."
        contents = self._sync.records(module)
        if not trainer.is_global_zero:
            return "The adapter is saved by rank 0."
        return " ".join(self._save_somewhere(name, content, step) for name, content in contents.items())

    def _save_somewhere(self, name: str, content: AdapterRecord | PeftRecord, step: int) -> str:
        assert self._folder is not None
        which = f"The adapter {name!r}" if name else "The adapter"
        problems = []
        for root in (_after_error(self._folder), _spare_folder()):
            place = self._free(root / name)
            try:
                write_adapter(content, place, training=_facts(self._trainer, step))
            except (OSError, ValueError) as error:
                problems.append(str(error))
            else:
                return f"{which} after {step} steps is saved in {place}."
        return f"{which} could not be saved: {' '.join(problems)}"

    def _free(self, folder: Path) -> Path:
        return free_folder(folder, run_name(self._trainer), overwrite=self._overwrite())


def _after_error(folder: Path) -> Path:
    """Where the adapter of a run that was stopped is saved, which has another folder for the one of its end."""
    return folder.with_name(f"{folder.name}-interrupted")


def _check_not_inside(place: Path, folder: Path) -> None:
    """Check that a named adapter would not lie in the folder of one without a name."""
    if place != folder and is_adapter_folder(folder):
        raise FileExistsError(
            f"The adapter is to be saved in {place}, and {folder} is an adapter's own folder. Set another "
            "`adapter_dir`, or remove it."
        )


def _state_bytes(pl_module: LightningModule) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in whole_like(pl_module).values())


def _spare_folder() -> Path:
    """A folder that is not there yet, so that nothing is left if it is not written."""
    return Path(tempfile.gettempdir(), f"genlora-adapter-{secrets.token_hex(4)}")


def _facts(trainer: Trainer, step: int) -> dict[str, Any]:
    logged = {name: value for name, value in trainer.callback_metrics.items() if name not in FIGURES}
    metrics = {name: float(value) for name, value in logged.items() if value.numel() == 1}
    return {
        "run": run_name(trainer),
        "global_step": step,
        "epoch": trainer.current_epoch,
        "metrics": {name: value for name, value in metrics.items() if value == value and abs(value) != float("inf")},
    }
