"""Decide when values are read from the device, which makes Python wait for all that is queued there."""

from __future__ import annotations

from lightning.pytorch import Trainer

_DEFAULT_INTERVAL = 50  # Lightning's; where the trainer logs nothing (0), errors must be found all the same


def is_reading_step(trainer: Trainer) -> bool:
    """Whether Lightning logs after the optimizer step that is being made."""
    every: int = trainer.log_every_n_steps or _DEFAULT_INTERVAL  # type: ignore[attr-defined]
    return (trainer.global_step + 1) % every == 0


class ReadingTimes:
    """The optimizer steps after which the device is waited for: those after which Lightning logs.

    Args:
        trainer: Its ``log_every_n_steps`` is the distance. All ranks get the same answers.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._every: int = trainer.log_every_n_steps or _DEFAULT_INTERVAL  # type: ignore[attr-defined]
        self._last = trainer.global_step // self._every

    def due(self) -> bool:
        """Whether such a step has been made since the question was last answered with yes."""
        now = self._trainer.global_step // self._every
        passed = now > self._last
        self._last = now
        return passed


def is_for_bar(trainer: Trainer) -> bool:
    """Whether a metric must be logged with ``prog_bar=True`` for the progress bar to show it.

    Lightning reads such metrics after each batch, whether they are shown or not. Bars with a true ``reads_when_shown``
    take the metrics that they show from ``callback_metrics`` instead, and without a bar nobody shows them.
    """
    bar = trainer.progress_bar_callback
    return bar is not None and not getattr(bar, "reads_when_shown", False)
