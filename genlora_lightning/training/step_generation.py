"""Share what was generated between the micro-batches of an optimizer step (``generate="step"``).

They are the micro-batches of an optimizer step; with one there is nothing to share. Whether the last one is among them
depends on who averages gradients. DDP does, in its backward: it generates for itself then, and what was summed up is
with the parameters before it. Elsewhere nothing looks at gradients before the step, and it belongs to the others.
"""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from genlora_lightning.layers.accumulation import (
    begin_generating_once,
    end_generating_once,
    pass_gradients,
)
from genlora_lightning.training.lightning_internals import should_accumulate

Generate = Literal["forward", "step"]


class StepGeneration:
    """Begins and ends :func:`~genlora_lightning.layers.accumulation.generated_once` in a run's hooks.

    Args:
        trainer: Fitting.
        module: With adapters.
        sharded: Whether the adapters lie in pieces on several ranks, where there is nothing to share: a warning.

    Raises:
        ValueError: The module optimizes manually, so that only it knows where a step begins.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, *, sharded: bool) -> None:
        if not module.automatic_optimization:
            raise ValueError(
                f'`generate="step"` needs to know where an optimizer step begins, and {type(module).__name__} '
                'optimizes manually: set `generate="forward"`. (`generated_once` does it by hand.)'
            )
        if sharded:
            rank_zero_warn(
                '`generate="step"` has no effect with `adapter_sharding="shard"`: parameters that are whole around '
                "their own layer's forward only are generated from there, for each forward."
            )
        self._trainer = trainer
        self._module = module
        self._sharded = sharded
        self._ends_before_last = isinstance(trainer.strategy, DDPStrategy)
        self._begun = False

    def before_batch(self) -> None:
        """Before a micro-batch: begin, or end if the last one is not to belong to it."""
        is_last = not should_accumulate(self._trainer)
        if not is_last and not self._begun and not self._sharded:
            begin_generating_once(self._module)
            self._begun = True
        elif is_last and self._ends_before_last:
            self.end()

    def after_backward(self) -> None:
        """After a micro-batch's backward, or where it would have been: end if it was the last one."""
        if self._begun and not should_accumulate(self._trainer):
            self.end()

    def end(self) -> None:
        """Pass the gradients so far on to the parameters, and generate for each forward again."""
        if self._begun:
            self._begun = False
            try:
                pass_gradients(self._module)
            finally:
                end_generating_once(self._module)
