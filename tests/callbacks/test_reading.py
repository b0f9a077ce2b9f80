from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from genlora_lightning.callbacks.progress import LineProgressBar, TerminalProgressBar
from genlora_lightning.callbacks.reading import ReadingTimes, is_for_bar


@pytest.mark.parametrize(
    ("every", "first", "steps", "expected"),
    [
        (3, 0, [1, 2, 3, 3, 4, 5, 6, 6], [3, 6]),  # a step of several batches is answered once
        (3, 4, [5, 6, 7, 8, 9], [6, 9]),  # resumed: where the trainer logs
        (3, 0, [2, 4, 6, 8], [4, 6]),  # two optimizers
        (0, 0, [49, 50, 51], [50]),  # a trainer that does not log
    ],
)
def test_values_are_read_where_the_trainer_logs(every: int, first: int, steps: list[int], expected: list[int]) -> None:
    trainer: Any = SimpleNamespace(log_every_n_steps=every, global_step=first)
    times, found = ReadingTimes(trainer), []
    for trainer.global_step in steps:
        if times.due():
            found.append(trainer.global_step)
    assert found == expected


@pytest.mark.parametrize(
    ("bar", "expected"),
    [(None, False), (LineProgressBar(), False), (TerminalProgressBar(), False), (TQDMProgressBar(), True)],
)
def test_only_bars_of_lightning_need_metrics_that_it_reads_at_each_batch(bar: Any, expected: bool) -> None:
    trainer: Any = SimpleNamespace(progress_bar_callback=bar)
    assert is_for_bar(trainer) == expected
