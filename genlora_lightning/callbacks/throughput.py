"""Count tokens and the time that training took, without validation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from genlora_lightning.callbacks.reading import ReadingTimes, is_for_bar

RATE = "tokens_per_second"
FIT_SECONDS = "fit_seconds"


class TokensPerSecond(Callback):
    """Counts the tokens that were trained on, and the time that training (not validating) took.

    Lightning's ``ThroughputMonitor`` takes every batch to be of one size and asks for a count of operations; it is the
    one to use for those.

    The rate over the last ``window`` batches is logged as ``tokens_per_second``; at the end of a fit its seconds are
    logged as ``fit_seconds``, and the rate of the whole of it as ``fit_tokens_per_second``. With several processes the
    rate is the sum over those that read different data. A batch's tokens are ``pl_module.count_tokens(batch)`` if the
    module has that method; else the sum of the batch's ``attention_mask``, or the size of its ``input_ids``. A batch
    with neither counts as none, and with no tokens no rate is logged.

    Counts that are tensors stay on the device and are read every ``log_every_n_steps`` optimizer steps, when processes
    are brought together, too; the rate is then that of as many batches at least.

    Args:
        window: Least number of batches over which the logged rate is taken; more are smoother.

    Attributes:
        tokens: Tokens trained on in the latest fit, over all processes.
        seconds: Seconds of the latest fit that went into training; loading the data counts, and so does saving.
        tokens_per_second: The one divided by the other: the rate of the whole fit.

    Raises:
        ValueError: ``window`` is less than 1.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"`window` must be at least 1 batch, got {window}.")
        self.tokens = 0
        self._counted: int | Tensor = 0
        self._seconds = 0.0
        self._running_since: float | None = None
        self._validation_interrupted = False
        self._window = window
        self._batches = 0
        self._times: ReadingTimes | None = None
        self._history: deque[tuple[int, int, float]] = deque()  # batches, tokens, seconds

    @property
    def seconds(self) -> float:
        """Seconds spent on training, up to now."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._seconds + running

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of training, from the start of the fit up to now; 0 before the first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tokens, self._counted, self._seconds, self._batches = 0, 0, 0.0, 0
        self._times = ReadingTimes(trainer)
        self._history.clear()
        self._history.append((0, 0, 0.0))
        self._start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._counted = self._counted + _tokens_in(pl_module, batch)
        self._batches += 1
        assert self._times is not None
        costs_nothing = trainer.world_size == 1 and not isinstance(self._counted, Tensor)
        if not (self._times.due() or costs_nothing):
            return
        self._add_up(trainer)
        self._history.append((self._batches, self.tokens, self.seconds))
        while self._batches - self._history[1][0] >= self._window:
            self._history.popleft()
        (_, tokens, seconds), (_, tokens_now, seconds_now) = self._history[0], self._history[-1]
        if self.tokens and seconds_now > seconds and not trainer.barebones:
            rate = torch.tensor((tokens_now - tokens) / (seconds_now - seconds))  # on the CPU, where it is read
            pl_module.log(RATE, rate, prog_bar=is_for_bar(trainer), on_epoch=False)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_interrupted = self._running_since is not None
        self._stop(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validation_interrupted:  # false in the sanity check, which comes before training
            self._start()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)
        self._add_up(trainer)
        figures = {FIT_SECONDS: self.seconds, **({f"fit_{RATE}": self.tokens_per_second} if self.tokens else {})}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.global_step)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop(trainer)
        if trainer.world_size == 1:  # another process may no longer be there to add up with
            self._add_up(trainer)

    def _start(self) -> None:
        self._running_since = time.perf_counter()

    def _stop(self, trainer: Trainer) -> None:
        if self._running_since is None:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(trainer.strategy.root_device)  # work that is still queued is training, too
        self._seconds, self._running_since = self.seconds, None

    def _add_up(self, trainer: Trainer) -> None:
        self.tokens = int(self._counted)  # a tensor waits here for all that was queued before, training included
        if trainer.world_size > 1:
            strategy = trainer.strategy
            replicas = getattr(strategy, "distributed_sampler_kwargs", {}).get("num_replicas", trainer.world_size)
            counted = torch.tensor(self.tokens, dtype=torch.int64, device=strategy.root_device)
            total = int(strategy.reduce(counted, reduce_op="sum"))
            self.tokens = total * replicas // trainer.world_size  # processes that share a batch count it once


def _tokens_in(pl_module: LightningModule, batch: Any) -> int | Tensor:
    count = getattr(pl_module, "count_tokens", None)
    if callable(count):
        tokens: int | Tensor = count(batch)
        return tokens
    if isinstance(batch, Mapping):
        if isinstance(batch.get("attention_mask"), Tensor):
            mask: Tensor = batch["attention_mask"]
            return mask.sum()
        if isinstance(batch.get("input_ids"), Tensor):
            return int(batch["input_ids"].numel())
    return 0
