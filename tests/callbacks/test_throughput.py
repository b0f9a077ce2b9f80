from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from genlora_lightning.callbacks.throughput import TokensPerSecond


class TokenModel(LightningModule):
    """Four batches, each of 2 sequences of 5 positions; batch i has i of them padded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.sleep_in_validation = 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.layer(torch.ones(1, 1)).sum()
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        time.sleep(self.sleep_in_validation)
        self.log("val_loss", torch.tensor(0.25), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def batches(self) -> list[dict[str, Tensor]]:
        masks = [torch.ones(2, 5, dtype=torch.int64) for _ in range(4)]
        for padded, mask in enumerate(masks):
            mask[0, 5 - padded :] = 0
        return [{"input_ids": torch.zeros(2, 5, dtype=torch.int64), "attention_mask": mask} for mask in masks]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches(), batch_size=None)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


class CountingModel(TokenModel):
    def count_tokens(self, batch: Any) -> int:
        return 7


class MaskFreeModel(TokenModel):
    def batches(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": batch["input_ids"]} for batch in super().batches()]


class ImageModel(TokenModel):
    def batches(self) -> Any:
        return [torch.zeros(2, 3, 4, 4)]


def fit(model: LightningModule, *callbacks: Callback, root: Path, **settings: Any) -> Trainer:
    settings = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, **settings}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(model)
    return trainer


@pytest.mark.parametrize(
    ("model", "tokens_per_epoch"),
    [(TokenModel(), 40 - 6), (CountingModel(), 4 * 7), (MaskFreeModel(), 40), (ImageModel(), 0)],
)
def test_tokens_of_every_training_batch_are_counted(tmp_path: Path, model: TokenModel, tokens_per_epoch: int) -> None:
    counter = TokensPerSecond()
    trainer = fit(model, counter, root=tmp_path, log_every_n_steps=2)
    assert counter.tokens == 2 * tokens_per_epoch
    assert counter.seconds > 0
    assert counter.tokens_per_second == pytest.approx(counter.tokens / counter.seconds)
    assert ("tokens_per_second" in trainer.callback_metrics) == (tokens_per_epoch > 0)


def test_rate_of_the_whole_fit_is_logged_at_its_end(tmp_path: Path) -> None:
    counter = TokensPerSecond()
    logger = CSVLogger(tmp_path)
    fit(TokenModel(), counter, root=tmp_path, logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert [row["fit_tokens_per_second"] for row in rows[:-1]] == [""] * (len(rows) - 1)
    assert float(rows[-1]["fit_tokens_per_second"]) == pytest.approx(counter.tokens_per_second)
    assert float(rows[-1]["fit_seconds"]) == pytest.approx(counter.seconds)
    assert rows[-1]["step"] == "8"


def test_seconds_are_logged_where_there_are_no_tokens(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(ImageModel(), TokensPerSecond(), root=tmp_path, logger=logger, log_every_n_steps=1)
    rows = list(csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines()))
    assert float(rows[-1]["fit_seconds"]) > 0
    assert "fit_tokens_per_second" not in rows[-1]


def test_counters_start_anew_with_each_fit(tmp_path: Path) -> None:
    counter = TokensPerSecond()
    for _ in range(2):
        fit(TokenModel(), counter, root=tmp_path, max_epochs=1)
    assert counter.tokens == 34


def test_validation_does_not_count_as_training(tmp_path: Path) -> None:
    model, counter = TokenModel(), TokensPerSecond()
    model.sleep_in_validation = 0.2
    started = time.perf_counter()
    fit(model, counter, root=tmp_path, max_epochs=1)
    took = time.perf_counter() - started
    # 0.8 s of validation, and 0.4 s in the sanity check, were slept away.
    assert 0 < counter.seconds < took - 1.2


def test_counters_are_readable_after_an_interrupted_fit(tmp_path: Path) -> None:
    class Fails(TokenModel):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    counter = TokensPerSecond()
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(Fails(), counter, root=tmp_path)
    assert counter.tokens == 10 + 9
    seconds = counter.seconds
    time.sleep(0.01)
    assert counter.seconds == seconds


def test_tokens_are_summed_over_processes(tmp_path: Path) -> None:
    class WriteTotals(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            counter = next(c for c in trainer.callbacks if isinstance(c, TokensPerSecond))  # type: ignore[attr-defined]
            (tmp_path / f"tokens.{trainer.global_rank}").write_text(str(counter.tokens))

    settings = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 1, "use_distributed_sampler": False}
    fit(TokenModel(), TokensPerSecond(), WriteTotals(), root=tmp_path, **settings)
    assert [(tmp_path / f"tokens.{rank}").read_text() for rank in (0, 1)] == ["68", "68"]


@pytest.mark.parametrize(
    ("window", "expected"),
    # 80 s of 8 batches with 10, 9, 8, 7 tokens in each epoch, read after 2, 4, 6 and 8 of them.
    [(1, [19 / 20, 15 / 20, 19 / 20, 15 / 20]), (3, [19 / 20, 34 / 40, 34 / 40, 34 / 40]), (9, [19, 34, 53, 68])],
)
def test_counts_on_the_device_are_read_where_the_trainer_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int, expected: list[float]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("genlora_lightning.callbacks.throughput.time.perf_counter", lambda: clock[0])
    rates: list[tuple[int, float]] = []

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock[0] += 10.0

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if "tokens_per_second" in trainer.callback_metrics:
                rates.append((trainer.global_step, float(trainer.callback_metrics["tokens_per_second"])))

    fit(TokenModel(), TokensPerSecond(window), Clock(), root=tmp_path, log_every_n_steps=2, limit_val_batches=0)
    if window == 9:
        expected = [tokens / (20.0 * number) for number, tokens in enumerate(expected, start=1)]
    read = dict(rates)
    assert [read[step] for step in (2, 4, 6, 8)] == pytest.approx(expected)
    assert read[3] == read[2]


def test_window_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 batch, got 0"):
        TokensPerSecond(window=0)
