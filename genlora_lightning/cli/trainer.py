"""Extend Lightning's Trainer for the command line: a precision that suits the machine, and a search for the rate."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.tuner.tuning import Tuner
from lightning.pytorch.utilities import rank_zero_info

from genlora_lightning.training.precision import AUTO, best_precision

_ROWS = 16
_WIDTH = 40


class CommandTrainer(Trainer):
    """Lightning's Trainer.

    Args:
        precision: As Lightning's, or ``"auto"``: bfloat16 where the hardware multiplies it, else float32.
        kwargs: The Trainer's other arguments.
    """

    def __init__(self, *, precision: str | int | None = None, **kwargs: Any) -> None:
        if precision == AUTO:
            chosen = best_precision(str(kwargs.get("accelerator", AUTO)))
            rank_zero_info(f"precision: {AUTO} takes {chosen.name}: {chosen.reason}.")
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
        suggestion = None if found is None else found.suggestion(skip_begin=steps // 10, skip_end=1)
        if found is None or suggestion is None:
            raise ValueError(
                f"No rate between {lowest:g} and {highest:g} could be told from the others in {steps} steps. Give more "
                "`--steps`, or a higher `--highest`."
            )
        print(rate_table(found.results["lr"], found.results["loss"], suggestion))


def rate_table(rates: list[float], losses: list[float], suggestion: float) -> str:
    """Draw the loss over the learning rate in text.

    Args:
        rates: Of each step.
        losses: Smoothed, at each step.
        suggestion: The rate to mark.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    low, high = min(finite), min(max(finite), losses[0] + 2 * (losses[0] - min(finite)))
    stride = max(1, math.ceil(len(rates) / _ROWS))
    marked = min(range(len(rates)), key=lambda index: abs(math.log(rates[index] / suggestion)))
    shown = sorted({*range(0, len(rates), stride), marked})
    lines = ["      rate      loss"]
    for index in shown:
        share = (losses[index] - low) / (high - low or 1.0) if math.isfinite(losses[index]) else 1.0
        bar = "#" * round(_WIDTH * min(1.0, share))
        mark = "  <- steepest fall" if index == marked else ""
        lines.append(f"{rates[index]:10.2e}{losses[index]:10.4f}  {bar:{_WIDTH}}{mark}".rstrip())
    flag = f"--model.optimizer.lr {suggestion:.1e}"
    lines.append(f"Suggested: lr {suggestion:.1e} (`{flag}` for this package's modules).")
    return "\n".join(lines)
