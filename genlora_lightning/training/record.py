"""Write down where each start of a run runs, on which data, and what it has cost in the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from genlora_lightning.callbacks.figures import MEMORY, peak_memory_gib
from genlora_lightning.callbacks.throughput import TokensPerSecond
from genlora_lightning.reports.record import RUN_FILE, read_starts
from genlora_lightning.storage.atomic import atomic_file
from genlora_lightning.training.environment import describe_environment
from genlora_lightning.training.run_folder import recorded_folder


class RunRecord(Callback):
    """Write ``run.json`` into a run's folder: a list with an entry for each start that has this folder.

    An entry says where it runs (:func:`~genlora_lightning.training.environment.describe_environment`), which data it
    has (what the data module's ``summary()`` says, or the number of batches), and when it ends or fails how many
    steps, seconds and tokens it took, and the most memory. It is written when the start begins, and again at its end.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._starts: list[dict[str, Any]] = []
        self._first_step = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = recorded_folder(trainer) if stage == "fit" else None
        if self._folder is None:
            return
        start = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **describe_environment(sys.argv, processes=trainer.world_size),
        }
        self._starts = [*read_starts([self._folder]), start]
        self._write()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        if self._folder is not None:
            self._starts[-1]["data"] = _data_of(trainer)
            self._write()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._folder is None:
            return
        counters = [callback for callback in trainer.callbacks if isinstance(callback, TokensPerSecond)]  # type: ignore[attr-defined]
        cost: dict[str, Any] = {"steps": trainer.global_step - self._first_step}
        for counter in counters[:1]:
            cost |= {"seconds": round(counter.seconds, 3), "tokens": counter.tokens}
        memory = peak_memory_gib(trainer.strategy.root_device)
        self._starts[-1]["cost"] = {**cost, **({} if memory is None else {MEMORY: round(memory, 3)})}
        self._write()
        self._folder = None

    def _write(self) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._folder / RUN_FILE) as file:
            file.write(json.dumps(self._starts, indent=2, ensure_ascii=False).encode())


def _data_of(trainer: Trainer) -> dict[str, Any]:
    """Numbers of each split, by its name."""
    data = getattr(trainer, "datamodule", None)
    summary = getattr(data, "summary", None)
    found = summary() if callable(summary) else None
    if isinstance(found, Mapping) and all(isinstance(one, Mapping) for one in found.values()):
        return {
            str(split): {str(k): v for k, v in one.items() if isinstance(v, (int, float))}
            for split, one in found.items()
        }
    batches = {"train": [trainer.num_training_batches], "val": trainer.num_val_batches}
    known = {split: [n for n in counts if isinstance(n, int)] for split, counts in batches.items()}
    return {split: {"batches": sum(counts)} for split, counts in known.items() if counts}
