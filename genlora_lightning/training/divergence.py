"""Notice that a run diverges: its loss has risen far over where it started, and stays there."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from genlora_lightning.distributed.shards import trained_tensors

WINDOW = 20
EARLY_FACTOR = 2.5
LATE_FACTOR = 2.0
_LEAST_START = 0.1
_FIRST = 5
_SHORTEST_WINDOW = 10


@dataclass(frozen=True)
class Divergence:
    """A loss that has diverged.

    Attributes:
        step: The optimizer step, from 1, at which it was clear.
        level: The median of the last steps' losses.
        start: What it is compared with.
        steps: How many steps ``level`` is of.
    """

    step: int
    level: float
    start: float
    steps: int


class LossCurve:
    r"""The losses of a run's optimizer steps, as far as a divergence is seen by them.

    A loss has diverged if one of two rules holds for ℓ₁, ℓ₂, …, and the last 20 steps are not on their way down (a
    spike that heals is none):

    * From the start: of the losses after the fifth, at least 20, nine in ten are over 2.5 · s with s = min(ℓ₁,
      median(ℓ₁ … ℓ₅)). ℓ₁ is that of the untrained adapters, however early the weights are spoiled after it. As it is
      one value, s must also lie far outside of the spread of the last 20: ln(m/s) > 3 ln(m/q) with their median m and
      their tenth percentile q.
    * Later on: of the last 20 losses nine in ten are over 2 · s with s = min(median(ℓ₁ … ℓ₁₀), median(ℓ₁ … ℓ₂₀)), so
      that all that was learned is lost, and more.

    Both ask for many steps, so that outliers count for nothing, and for a factor, so that slow drifts do. Losses that
    begin at or below 0 are never called diverged, and those with s < 0.1 only if m is over 10 and over 1,000 · s.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._steps = self._later_and_low = 0

    def add(self, loss: float) -> None:
        """Add the loss of the next optimizer step."""
        self._steps += 1
        if len(self._first) < WINDOW:
            self._first.append(loss)
        if self._steps > _FIRST:
            self._later_and_low += loss <= EARLY_FACTOR * self._early
        self._recent.append(loss)

    @property
    def _early(self) -> float:
        return min(self._first[0], median(self._first[:_FIRST]))

    def divergence(self, step: int, *, at_the_end: bool = False) -> Divergence | None:
        """Say whether the loss has diverged by now; at the end of a run by as few steps as 10 after the fifth."""
        later = self._steps - _FIRST
        if later < (_SHORTEST_WINDOW if at_the_end else WINDOW):
            return None
        last = list(self._recent)[-later:]
        level, low, half = median(last), sorted(last)[len(last) // 10], len(last) // 2
        if self._first[0] <= 0 or median(last[half:]) < 0.9 * median(last[:half]):
            return None
        start = self._early
        if _tells(start, level) and self._later_and_low <= later // 10 and start * (level / low) ** 3 < level:
            return Divergence(step, level, start, len(last))
        start = min(median(self._first[:10]), median(self._first))
        if _tells(start, level) and self._steps >= 2 * WINDOW and low > LATE_FACTOR * start:
            return Divergence(step, level, start, len(last))
        return None


def _tells(start: float, level: float) -> bool:
    """Whether a ratio to the start says something: near 0 are losses of policies, and those of easy examples."""
    return start >= _LEAST_START or (start > 0 and level > max(10.0, 1000 * start))


class DivergenceWatch:
    """Watches a run's loss, and keeps what was trained when it was lowest.

    The loss is the module's attribute ``watched_loss`` (a scalar; ``None``: nothing is watched), or else what
    ``training_step`` returned, under automatic optimization. Losses stay on the device until they are read. Weights are
    kept at most every 20 steps, where losses are read, and by the loss of the steps *after* them: two copies of what is
    trained lie beside it.

    Args:
        trainer: The run's trainer.
        module: Its module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._step = trainer.global_step
        self._window: list[Tensor] = []
        self._unread: list[list[Tensor]] = []
        self._curve = LossCurve()
        self._since: list[float] = []  # the losses since the candidate was kept
        self._candidate: tuple[int, dict[str, Tensor]] | None = None
        self._best: tuple[int, dict[str, Tensor]] | None = None
        self._best_level = math.inf

    def after_batch(self, outputs: Any) -> None:
        """Take the loss of a batch that was trained on."""
        loss = self._loss(outputs)
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._window.append(loss.detach().reshape(()))
        if self._trainer.global_step != self._step:
            self._step = self._trainer.global_step
            self._unread.append(self._window)
            self._window = []

    def _loss(self, outputs: Any) -> Any:
        module = self._module
        if hasattr(module, "watched_loss"):
            return module.watched_loss
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is None or not module.automatic_optimization:
            return None
        return loss * self._trainer.accumulate_grad_batches  # Lightning has divided it

    def read(self, *, at_the_end: bool = False) -> Divergence | None:
        """Say whether the loss has diverged; waits for the device if there is something to read. On all ranks."""
        found = None
        first = self._step - len(self._unread) + 1
        for step, loss in enumerate(self._losses(), first):
            if not math.isfinite(loss):
                continue  # of a step without one, or whose gradient is not finite, either
            self._curve.add(loss)
            self._since.append(loss)
            found = found or self._curve.divergence(step)
        found = found or (self._curve.divergence(self._step, at_the_end=True) if at_the_end else None)
        if found is None and len(self._since) >= WINDOW:
            self._keep(median(self._since))
        return found

    def restore_best(self) -> int:
        """Set what is trained back to where the loss was lowest; the step, or 0 if nothing was kept."""
        if self._best is None:
            return 0
        step, values = self._best
        with torch.no_grad():
            for name, tensor in trained_tensors(self._module).items():
                tensor.copy_(values[name])
        return step

    def _losses(self) -> list[float]:
        """The mean loss of each optimizer step that was not read yet, over micro-batches and ranks; NaN for none."""
        unread, self._unread = self._unread, []
        losses = [loss for window in unread for loss in window]
        if not unread:
            return []
        values = iter(torch.stack([loss.float() for loss in losses]).tolist() if losses else ())
        means = [fmean(next(values) for _ in window) if window else math.nan for window in unread]
        if self._trainer.world_size == 1:
            return means
        strategy = self._trainer.strategy
        known = [not math.isnan(mean) for mean in means]
        sums = torch.tensor([[mean if k else 0.0 for mean, k in zip(means, known, strict=True)], known])
        totals, counts = strategy.reduce(sums.to(strategy.root_device), reduce_op="sum").tolist()
        return [total / count if count else math.nan for total, count in zip(totals, counts, strict=True)]

    def _keep(self, level: float) -> None:
        if self._candidate is not None and level <= self._best_level:
            self._best, self._best_level = self._candidate, level
        values = {name: tensor.detach().clone() for name, tensor in trained_tensors(self._module).items()}
        self._candidate, self._since = (self._step, values), []
