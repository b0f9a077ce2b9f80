"""Shows how a run gets on: a bar on a terminal, readable lines everywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer, TQDMProgressBar
from typing_extensions import override

from genlora_lightning.callbacks.throughput import RATE

_LOSS = "train_loss"
_SECONDS_BETWEEN_READINGS = 1.0


class TerminalProgressBar(TQDMProgressBar):
    """Lightning's bar, with whole tokens per second and the time left until the end of the fit, not of the epoch.

    While training it reads the metrics, for which Python waits for the device, once a second at most.
    """

    reads_when_shown = True
    _estimate: _Estimate | None = None
    _read: dict[str, Any] | None = None
    _read_at = 0.0
    _may_read = True

    @override
    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        self._estimate = _Estimate(self.trainer)

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self._may_read = time.monotonic() - self._read_at >= _SECONDS_BETWEEN_READINGS
        super().on_train_batch_end(*args)
        self._may_read = True

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        if self._read is None or self._may_read:
            self._read, self._read_at = _shown_metrics(trainer), time.monotonic()
        metrics: dict[str, Any] = dict(self._read)
        rate = metrics.pop(RATE, None)
        if rate is not None:
            metrics["tokens/s"] = f"{rate:.0f}"
        if self._estimate is not None:
            metrics["left"] = format_duration(self._estimate.remaining_seconds())
        return metrics


class LineProgressBar(ProgressBar):
    """Progress as lines of text, for log files and pipes: few enough to be read, often enough to be trusted.

    Args:
        every_seconds: A line is printed at least after so many seconds.
        every_fraction: While training, a line is printed for each such share of all steps. Only then are the metrics
            read, for which Python waits for the device.

    Raises:
        ValueError: ``every_seconds`` or ``every_fraction`` is not greater than 0.
    """

    reads_when_shown = True

    def __init__(self, every_seconds: float = 30.0, every_fraction: float = 0.1) -> None:
        super().__init__()
        for name, value in (("every_seconds", every_seconds), ("every_fraction", every_fraction)):
            if value <= 0:
                raise ValueError(f"`{name}` must be greater than 0, got {value}.")
        self._every_seconds = every_seconds
        self._every_fraction = every_fraction
        self._enabled = True
        self._estimate: _Estimate | None = None
        self._printed_at = 0.0
        self._printed_step = -1
        self._shares_printed = -1
        self._loop_started = 0.0
        self._batches_done = 0
        self._before_validation: dict[str, Any] = {}
        self._validation_names: set[str] = set()

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    # --- training -----------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._estimate = _Estimate(trainer)
        self._printed_step = -1
        self._shares_printed = -1

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._estimate is not None
        shares = int(self._estimate.fraction() / self._every_fraction + 1e-9)
        if shares > self._shares_printed or self._is_time():
            self._print_training(trainer)
        self._shares_printed = shares

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._printed_step:
            self._print_training(trainer)

    def _print_training(self, trainer: Trainer) -> None:
        assert self._estimate is not None
        self._printed_step = trainer.global_step
        estimate = self._estimate
        metrics = {k: v for k, v in _shown_metrics(trainer).items() if k not in self._validation_names}
        rate = metrics.pop(RATE, None)
        epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        total = "" if estimate.total_steps == float("inf") else f"/{estimate.total_steps} ({estimate.fraction():.0%})"
        epoch = min(trainer.current_epoch + 1, trainer.max_epochs) if epochs else trainer.current_epoch + 1  # type: ignore[type-var]
        self._print_line(
            f"epoch {epoch}{epochs}",
            f"step {trainer.global_step}{total}",
            *_format_metrics(metrics),
            *([] if rate is None else [f"{rate:.0f} tokens/s"]),
            f"elapsed {format_duration(estimate.elapsed_seconds())}",
            f"remaining {format_duration(estimate.remaining_seconds())}",
        )

    # --- validation, test, prediction ---------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = dict(trainer.callback_metrics)
        self._start_loop()

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_loop()

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_loop()

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.trainer.sanity_checking:
            self._batch_done(self.validation_description, self.trainer.num_val_batches)

    @override
    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._batch_done(self.test_description, self.trainer.num_test_batches)

    @override
    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._batch_done(self.predict_description, self.trainer.num_predict_batches)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._is_fitting(trainer):
            return  # `validate` prints a table of its own
        # A metric that this validation did not log is still the very same object.
        results = {k: v for k, v in trainer.callback_metrics.items() if v is not self._before_validation.get(k)}
        self._validation_names |= set(results)
        took = time.monotonic() - self._loop_started
        self._print_line(
            f"validation after step {trainer.global_step}", *_format_metrics(results), f"took {format_duration(took)}"
        )

    @staticmethod
    def _is_fitting(trainer: Trainer) -> bool:
        return trainer.state.fn is not None and trainer.state.fn.value == "fit"

    def _start_loop(self) -> None:
        self._loop_started = self._printed_at = time.monotonic()
        self._batches_done = 0

    def _batch_done(self, name: str, totals: list[int | float]) -> None:
        self._batches_done += 1
        total = sum(totals)
        is_last = self._batches_done == total and not self._is_fitting(self.trainer)
        if is_last or self._is_time():
            elapsed = time.monotonic() - self._loop_started
            left = elapsed * (total - self._batches_done) / self._batches_done
            self._print_line(
                name.lower(),
                f"batch {self._batches_done}" + ("" if total == float("inf") else f"/{total}"),
                f"elapsed {format_duration(elapsed)}",
                f"remaining {format_duration(left)}",
            )

    # --- printing -----------------------------------------------------------------------------------------------------

    def _is_time(self) -> bool:
        return time.monotonic() - self._printed_at >= self._every_seconds

    def _print_line(self, *parts: str) -> None:
        self._printed_at = time.monotonic()
        if self._enabled:
            print(" | ".join(parts), flush=True)


def default_progress_bar() -> ProgressBar:
    """A bar where standard output is a terminal, lines where it is a file or a pipe (or a terminal of no width)."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return TerminalProgressBar() if columns else LineProgressBar()


def format_duration(seconds: float) -> str:
    """``75`` → ``"1:15"``, ``3661`` → ``"1:01:01"``, infinite or unknown → ``"?"``."""
    if not 0 <= seconds < float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Estimate:
    """How far a fit is and how long it will take, from the steps it has made since it started or was resumed."""

    def __init__(self, trainer: Trainer) -> None:
        self.total_steps = trainer.estimated_stepping_batches
        self._trainer = trainer
        self._started = time.monotonic()
        self._first_step = trainer.global_step

    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started

    def fraction(self) -> float:
        return min(1.0, self._trainer.global_step / self.total_steps) if self.total_steps else 1.0

    def remaining_seconds(self) -> float:
        """Validation and saving are in the estimate; so is a limit on time. Infinite while nothing is known."""
        done = self._trainer.global_step - self._first_step
        left = max(0.0, self.total_steps - self._trainer.global_step)
        seconds = self.elapsed_seconds() * left / done if done else float("inf")
        limits = [timer.time_remaining() for timer in self._trainer.callbacks if isinstance(timer, Timer)]  # type: ignore[attr-defined]
        return min([seconds, *(limit for limit in limits if limit is not None)])


def _shown_metrics(trainer: Trainer) -> dict[str, Any]:
    """The metrics that the module wants on a bar, and those that are left for a bar to read when it shows them."""
    logged = trainer.callback_metrics
    return {**{name: float(logged[name]) for name in (_LOSS, RATE) if name in logged}, **trainer.progress_bar_metrics}


def _format_metrics(metrics: Mapping[str, Any]) -> list[str]:
    return [f"{name} {float(value):.4g}" for name, value in metrics.items()]
