"""Show how a run gets on: a bar on a terminal, readable lines everywhere else."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer, TQDMProgressBar
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from tqdm import tqdm
from typing_extensions import override

from genlora_lightning.callbacks.figures import GRADIENT_NORM, LEARNING_RATE, learning_rate, peak_memory_gib
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.callbacks.throughput import RATE

PROGRESS_LOG = __name__
_log = rank_zero_logger(PROGRESS_LOG)

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
            metrics["left"] = _duration(self._estimate.remaining_seconds())
        return metrics


class LineProgressBar(ProgressBar):
    """Progress as lines of text, for log files and pipes: few enough to be read, often enough to be trusted.

    Args:
        every_seconds: A line is printed at least after so many seconds.
        every_fraction: While training, a line is printed for each such share of all steps. Only then are the metrics
            read, for which Python waits for the device.
        prints: Whether lines go to standard output; else they are messages of the logger ``PROGRESS_LOG``, whose
            records have the figures under ``figures``.

    Raises:
        ValueError: ``every_seconds`` or ``every_fraction`` is not greater than 0.
    """

    reads_when_shown = True

    def __init__(self, every_seconds: float = 30.0, every_fraction: float = 0.1, *, prints: bool = True) -> None:
        super().__init__()
        for name, value in (("every_seconds", every_seconds), ("every_fraction", every_fraction)):
            if value <= 0:
                raise ValueError(f"`{name}` must be greater than 0, got {value}.")
        self._every_seconds = every_seconds
        self._every_fraction = every_fraction
        self._prints = prints
        self._enabled = True
        self._estimate: _Estimate | None = None
        self._printed_at = 0.0
        self._printed_step = -1
        self._loop_started = 0.0
        self._before_validation: dict[str, Any] = {}
        self._validation_names: set[str] = set()

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._estimate, self._printed_step = _Estimate(trainer), -1

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        assert self._estimate is not None
        shares = [
            math.floor(self._estimate.fraction(step) / self._every_fraction + 1e-9)
            for step in (self._printed_step, trainer.global_step)
        ]
        if self._printed_step < 0 or shares[0] < shares[1] or self._is_time():
            self._print_training(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._printed_step:
            self._print_training(trainer)

    def _print_training(self, trainer: Trainer) -> None:
        assert self._estimate is not None
        step = self._printed_step = trainer.global_step
        metrics = {k: v for k, v in _shown_metrics(trainer).items() if k not in self._validation_names}
        rate = metrics.pop(RATE, None)
        epoch, epochs, steps = trainer.current_epoch + 1, trainer.max_epochs, self._estimate.total_steps
        figures = {**metrics, **({} if rate is None else {RATE: rate}), "epoch": trainer.current_epoch, "step": step}
        self._print_line(
            figures,
            f"epoch {epoch}" if epochs in (None, -1) else f"epoch {min(epoch, epochs)}/{epochs}",
            f"step {step}" + ("" if math.isinf(steps) else f"/{steps} ({self._estimate.fraction(step):.0%})"),
            *_format_metrics(metrics),
            *([] if rate is None else [f"{rate:.0f} tokens/s"]),
            *_format_memory(trainer),
            f"elapsed {_duration(self._estimate.elapsed_seconds())}",
            f"remaining {_duration(self._estimate.remaining_seconds())}",
        )

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = dict(trainer.callback_metrics)
        self._loop_started = self._printed_at = time.monotonic()

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        loops = {
            RunningStage.VALIDATING: ("validation", trainer.num_val_batches),
            RunningStage.TESTING: ("testing", trainer.num_test_batches),
            RunningStage.PREDICTING: ("predicting", trainer.num_predict_batches),
        }
        if trainer.state.stage not in loops:
            return  # the sanity check
        name, totals = loops[trainer.state.stage]
        done, total = sum(totals[:dataloader_idx]) + batch_idx + 1, sum(totals)
        if self._is_time() or (done == total and trainer.state.fn != TrainerFn.FITTING):
            elapsed = time.monotonic() - self._loop_started
            self._print_line(
                {"loop": name, "batch": done},
                name,
                f"batch {done}" + ("" if math.isinf(total) else f"/{total}"),
                f"elapsed {_duration(elapsed)}",
                f"remaining {_duration(elapsed * (total - done) / done)}",
            )

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return  # `validate` prints a table of its own
        # A metric that this validation did not log is still the very same object.
        results = {k: v for k, v in trainer.callback_metrics.items() if v is not self._before_validation.get(k)}
        self._validation_names |= set(results)
        took = _duration(time.monotonic() - self._loop_started)
        self._print_line(
            {**results, "step": trainer.global_step},
            f"validation after step {trainer.global_step}",
            *_format_metrics(results),
            f"took {took}",
        )

    def _is_time(self) -> bool:
        return time.monotonic() - self._printed_at >= self._every_seconds

    def _print_line(self, figures: Mapping[str, Any], *parts: str) -> None:
        self._printed_at = time.monotonic()
        if not self._enabled:
            return
        if self._prints:
            print(" | ".join(parts), flush=True)
        else:
            plain = {name: value if isinstance(value, (str, int)) else float(value) for name, value in figures.items()}
            _log.info(" | ".join(parts), extra={"figures": plain})


def default_progress_bar(*, prints: bool = True, lines: bool = False) -> ProgressBar:
    """A bar where standard output is a terminal, lines where it is a file or a pipe (or a terminal of no width).

    Args:
        prints: As of :class:`LineProgressBar`.
        lines: Lines in any case.
    """
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return TerminalProgressBar() if columns and not lines else LineProgressBar(prints=prints)


class _Estimate:
    """How far a fit is and how long it will take, from the steps it has made since it started or was resumed."""

    def __init__(self, trainer: Trainer) -> None:
        self.total_steps = trainer.estimated_stepping_batches
        self._trainer = trainer
        self._started = time.monotonic()
        self._first_step = trainer.global_step

    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started

    def fraction(self, step: int) -> float:
        return min(1.0, step / self.total_steps) if self.total_steps else 1.0

    def remaining_seconds(self) -> float:
        """Validation and saving are in the estimate; so is a limit on time. Infinite while nothing is known."""
        done = self._trainer.global_step - self._first_step
        left = max(0.0, self.total_steps - self._trainer.global_step)
        seconds = self.elapsed_seconds() * left / done if done else math.inf
        limits = [timer.time_remaining() for timer in self._trainer.callbacks if isinstance(timer, Timer)]  # type: ignore[attr-defined]
        return min([seconds, *(limit for limit in limits if limit is not None)])


def _duration(seconds: float) -> str:
    return "?" if math.isinf(seconds) else tqdm.format_interval(round(seconds))


def _shown_metrics(trainer: Trainer) -> dict[str, Any]:
    """The metrics that the module wants on a bar, and those that are left for a bar to read when it shows them."""
    logged = trainer.callback_metrics
    found = {name: float(logged[name]) for name in (_LOSS, GRADIENT_NORM, RATE) if name in logged}
    rates = {LEARNING_RATE: learning_rate(trainer.optimizers[0])} if trainer.training and trainer.optimizers else {}
    return {**found, **rates, **trainer.progress_bar_metrics}


def _format_memory(trainer: Trainer) -> list[str]:
    memory = peak_memory_gib(trainer.strategy.root_device)
    return [] if memory is None else [f"{memory:.1f} GiB"]


def _format_metrics(metrics: Mapping[str, Any]) -> list[str]:
    return [f"{name} {float(value):.4g}" for name, value in metrics.items()]
