"""Restore a snapshot within a run: what Lightning's finders save, to undo their trials, is not resumed from."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from genlora_lightning.overrides import put_on, take_off
from genlora_lightning.training.lightning_internals import checkpoint_connector, pending_resume
from genlora_lightning.training.resume import Resume, name_of_checkpoint


class Snapshots:
    """Restores checkpoints that callbacks load while a run goes on, such as ``LearningRateFinder``.

    The run goes on where it is when that happens, so that nothing is settled as it is for a run that was stopped; and a
    resume that has begun, but whose optimizer state and counters are yet to be restored, is still to come.

    Args:
        trainer: The trainer of the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._resume: Resume | None = None
        self.restoring = False
        connector = checkpoint_connector(trainer)
        take_off(connector, "restore")  # left over if an earlier run failed
        self._original = connector.restore
        put_on(connector, restore=self._restore)

    def load(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take a checkpoint that is being restored, before Lightning restores the optimizers from it, in place."""
        if self._trainer.state.fn == "fit":
            self._resume = Resume(checkpoint, name_of_checkpoint(self._trainer))
            self._resume.translate(self._trainer, module)

    def end(self) -> None:
        """Leave the trainer as it was."""
        take_off(checkpoint_connector(self._trainer), "restore")

    def _restore(self, *args: Any, **kwargs: Any) -> None:
        self.restoring = True
        try:
            with pending_resume(self._trainer):
                self._original(*args, **kwargs)
            if self._resume is not None:
                self._resume.restore_values(self._trainer, self._trainer.lightning_module)
        finally:
            self.restoring, self._resume = False, None
