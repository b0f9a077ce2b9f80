"""Draw the ranks of elastic adapters in a run: one for each layer and optimizer step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from genlora_lightning.injection.elastic import draw_ranks, elastic_layers, whole_ranks

_KEY = "elastic_seed"


class ElasticRanks:
    """Draws ranks before each training batch, and goes back to whole adapters after it.

    Args:
        trainer: Fitting.
        module: That will have adapters.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        self._module = module
        self._seed: str | None = None  # known as soon as there is something to draw

    def load(self, content: Mapping[str, Any]) -> None:
        """Go on with the draws of the run that wrote a checkpoint, if it drew any."""
        self._seed = content.get(_KEY)

    def write(self, content: dict[str, Any]) -> None:
        """Write into a checkpoint what the draws depend on."""
        if self._seed is not None:
            content[_KEY] = self._seed

    def begin(self) -> None:
        """At the start of the training, after what a checkpoint says."""
        if not elastic_layers(self._module):
            self._seed = None
        elif self._seed is None:  # that of `seed_everything`, which each process may have got for itself
            self._seed = self._trainer.strategy.broadcast(os.environ.get("PL_GLOBAL_SEED", "0"))

    def before_batch(self) -> None:
        """Draw for the optimizer step that a batch belongs to."""
        if self._seed is not None:
            draw_ranks(self._module, self._trainer.global_step, self._seed)

    def end(self) -> None:
        """Compute with whole adapters again."""
        if self._seed is not None:
            whole_ranks(self._module)
