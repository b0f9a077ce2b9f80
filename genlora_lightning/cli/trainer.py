"""Extend Lightning's Trainer for the command line: a precision that suits the machine, and a search for the rate."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.tuner.tuning import Tuner

from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.training.precision import AUTO, best_precision

_log = rank_zero_logger(__name__)

_ROWS = 16
_WIDTH = 40
_BETA = 0.98  # of Lightning's finder
_NEIGHBOURS = 2
_SHARE = 1 / 3  # of the rate of the steepest fall: a whole run at that rate itself ends higher


class CommandTrainer(Trainer):
    """Lightning's Trainer.

    Args:
        precision: As Lightning's, or ``"auto"``: bfloat16 where the hardware multiplies it, else float32.
        kwargs: The Trainer's other arguments.
    """

    def __init__(self, *, precision: str | int | None = None, **kwargs: Any) -> None:
        if precision == AUTO:
            chosen = best_precision(str(kwargs.get("accelerator", AUTO)))
            _log.info(f"precision: {AUTO} takes {chosen.name}: {chosen.reason}.")
            precision = chosen.name
        super().__init__(precision=precision, **kwargs)  # type: ignore[arg-type]

    def find_lr(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        lowest: float = 1e-5,
        highest: float = 0.3,
        steps: int = 40,
    ) -> None:
        """Try rising learning rates for a few steps, and print the loss at each and the rate that is suggested.

        The model is as before in the end, and nothing is saved.

        Args:
            model: A module with an attribute ``lr`` or ``learning_rate``.
            datamodule: Its data.
            lowest: The rate of the first step.
            highest: The rate of the last step, if the loss has not grown to four times its least before.
            steps: Number of optimizer steps.

        Raises:
            ValueError: The loss falls nowhere.
        """
        self.fit_loop.max_epochs = -1  # the number of steps ends it
        found = Tuner(self).lr_find(
            model, datamodule=datamodule, min_lr=lowest, max_lr=highest, num_training=steps, update_attr=False
        )
        rates, losses = ([], []) if found is None else (found.results["lr"], centred_losses(found.results["loss"]))
        steepest = steepest_fall(losses)
        if steepest is None:
            raise ValueError(
                f"No rate between {lowest:g} and {highest:g} could be told from the others in {steps} steps. Give more "
                "`--steps`, or a higher `--highest`."
            )
        print(rate_table(rates, losses, steepest))


def centred_losses(smoothed: list[float]) -> list[float]:
    """Compute the mean loss of each step and its neighbours from what Lightning's finder records.

    With its weight β = 0.98 the finder averages over all steps so far, so that its curve falls many steps after the
    loss does; and it takes each average for one of a step more, so that the first is half of the loss.

    Args:
        smoothed: The finder's: after k steps ``a_k / (1 - β^(k+1))`` with ``a_k = β·a_(k-1) + (1-β)·loss_k``.
    """
    sums = [value * (1 - _BETA ** (step + 2)) for step, value in enumerate(smoothed)]
    losses = [(now - _BETA * before) / (1 - _BETA) for before, now in pairwise([0.0, *sums])]
    around = [losses[max(0, step - _NEIGHBOURS) : step + _NEIGHBOURS + 1] for step in range(len(losses))]
    return [sum(part) / len(part) for part in around]


def steepest_fall(losses: list[float]) -> int | None:
    """Find the step at which a loss falls fastest from the one before to the next; ``None`` where it falls nowhere.

    The rates of the steps are a geometric sequence, so this is the slope over the logarithm of the rate.
    """
    slopes = {i: losses[i + 1] - losses[i - 1] for i in range(1, len(losses) - 1)}
    falls = {step: slope for step, slope in slopes.items() if slope < 0}
    return min(falls, key=falls.__getitem__, default=None)


def rate_table(rates: list[float], losses: list[float], steepest: int) -> str:
    """Draw the loss over the learning rate in text.

    Args:
        rates: Of each step.
        losses: At each step.
        steepest: The step at which the loss falls fastest; a third of its rate is suggested.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    low, high = min(finite), min(max(finite), losses[0] + 2 * (losses[0] - min(finite)))
    stride = max(1, math.ceil(len(rates) / _ROWS))
    shown = sorted({*range(0, len(rates), stride), steepest})
    lines = ["      rate      loss"]
    for index in shown:
        share = (losses[index] - low) / (high - low or 1.0) if math.isfinite(losses[index]) else 1.0
        bar = "#" * round(_WIDTH * min(1.0, share))
        mark = "  <- steepest fall" if index == steepest else ""
        lines.append(f"{rates[index]:10.2e}{losses[index]:10.4f}  {bar:{_WIDTH}}{mark}".rstrip())
    suggestion = f"{rates[steepest] * _SHARE:.1e}"
    lines.append(
        f"Suggested: lr {suggestion}, a third of it (`--model.optimizer.lr {suggestion}` in this package's modules)."
    )
    return "\n".join(lines)
