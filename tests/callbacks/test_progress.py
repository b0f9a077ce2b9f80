from __future__ import annotations

import io
import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from genlora_lightning.callbacks.progress import (
    LineProgressBar,
    TerminalProgressBar,
    default_progress_bar,
)
from genlora_lightning.callbacks.throughput import TokensPerSecond


class SmallModel(LightningModule):
    """Twenty batches of 6 tokens for training and as many for validation, test and prediction."""

    def __init__(self, sleep: float = 0.0) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.sleep = sleep

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(torch.ones(1, 1)).sum()
        self.log("train_loss", 0.5, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        time.sleep(self.sleep)
        self.log("val_loss", 0.25, prog_bar=True)
        self.log("val_accuracy", 0.9)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", 0.25)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> int:
        return batch_idx

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        batch = {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
        return DataLoader([batch] * 20, batch_size=None)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def make_trainer(root: Path, *callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=root,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[TokensPerSecond(), *callbacks],
        **{"max_epochs": 2, **settings},
    )


def test_training_prints_a_line_for_each_tenth_and_one_for_each_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(tmp_path, LineProgressBar()).fit(SmallModel())
    lines = capsys.readouterr().out.splitlines()
    training = [line for line in lines if line.startswith("epoch ")]
    validation = [line for line in lines if line.startswith("validation ")]
    assert len(training) == 11  # the first step, and each tenth of 40
    assert len(validation) == 2
    assert lines == [line for line in lines if line in training + validation]
    assert re.fullmatch(
        r"epoch 1/2 \| step 1/40 \(2%\) \| train_loss 0\.5 \| lr 0\.1 \| \d+ tokens/s \| \d+\.\d GiB "
        r"\| elapsed 00:00 \| remaining \d\d:\d\d",
        training[0],
    )
    # Once a validation has run, its metrics do not turn up among those of training.
    assert re.fullmatch(
        r"epoch 2/2 \| step 40/40 \(100%\) \| train_loss 0\.5 \| lr 0\.1 \| \d+ tokens/s \| \d+\.\d GiB "
        r"\| elapsed \d\d:\d\d \| remaining 00:00",
        training[-1],
    )
    assert validation[0] == "validation after step 20 | val_loss 0.25 | val_accuracy 0.9 | took 00:00"


def test_lines_are_few_when_steps_are_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, LineProgressBar(), max_epochs=10, limit_val_batches=0).fit(SmallModel())
    assert len(capsys.readouterr().out.splitlines()) == 11


def test_lines_come_after_every_so_many_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = LineProgressBar(every_seconds=0.05, every_fraction=1.0)
    make_trainer(tmp_path, bar, max_epochs=1, num_sanity_val_steps=0).fit(SmallModel(sleep=0.02))
    out = capsys.readouterr().out
    assert re.search(r"validation \| batch \d+/20 \| elapsed 00:00 \| remaining 00:00\n", out)


def test_a_stopped_fit_ends_with_the_step_it_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Stops(SmallModel):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = self.global_step == 5

    make_trainer(tmp_path, LineProgressBar(), limit_val_batches=0).fit(Stops())
    assert " step 5/40 " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(("max_time", "remaining"), [(None, r"\?"), (timedelta(hours=2), r"(2:00:00|1:59:5\d)")])
def test_training_without_end_shows_the_time_limit_if_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], max_time: timedelta | None, remaining: str
) -> None:
    class Stops(SmallModel):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.trainer.should_stop = self.global_step == 3

    make_trainer(tmp_path, LineProgressBar(), max_epochs=-1, max_time=max_time, limit_val_batches=0).fit(Stops())
    first = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(r"epoch 1 \| step 1 \| .* \| remaining " + remaining, first)


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_evaluation_prints_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    trainer = make_trainer(tmp_path, LineProgressBar())
    getattr(trainer, name)(SmallModel())
    word = {"validate": "validation", "test": "testing", "predict": "predicting"}[name]
    assert f"{word} | batch 20/20 | elapsed 00:00 | remaining 00:00" in capsys.readouterr().out


def test_a_disabled_bar_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bar = LineProgressBar()
    bar.disable()
    make_trainer(tmp_path, bar).fit(SmallModel())
    assert capsys.readouterr().out == ""


def test_terminal_bar_shows_loss_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    make_trainer(tmp_path, TerminalProgressBar(), limit_val_batches=0).fit(SmallModel())
    bar = terminal.getvalue().split("\r")[-1]
    assert re.search(r"Epoch 1: 100%.*train_loss=0\.500, lr=0\.100, tokens/s=\d+, left=00:00\]", bar)
    assert "v_num" not in bar


@pytest.mark.parametrize(("columns", "kind"), [(80, TerminalProgressBar), (0, LineProgressBar)])
def test_default_bar_depends_on_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int, kind: type) -> None:
    assert isinstance(default_progress_bar(), LineProgressBar)  # tests have no terminal
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1)
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((columns, 24)))
    assert isinstance(default_progress_bar(), kind)


@pytest.mark.parametrize("settings", [{"every_seconds": 0.0}, {"every_fraction": -0.1}])
def test_intervals_must_be_positive(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be greater than 0, got"):
        LineProgressBar(**settings)
