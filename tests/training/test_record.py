"""`run.json`, which a run keeps of each of its starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningDataModule

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.callbacks.throughput import TokensPerSecond
from genlora_lightning.reports.record import read_starts
from genlora_lightning.training.record import RunRecord
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer


class Fails(Callback):
    def on_train_batch_end(self, trainer, *_):
        (start,) = read_starts([Path(trainer.default_root_dir)])  # it is there from the start, for runs that are killed
        assert "cost" not in start
        assert start["data"] == {"train": {"batches": 4}}
        if trainer.global_step == 2:
            raise OSError("the disk is gone")


def test_each_start_has_an_entry_with_data_and_costs(tmp_path):
    callbacks = [GenLoRAFinetuning(small_config(rank=4)), TokensPerSecond(), RunRecord()]
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(tmp_path, *callbacks, Fails()).fit(PlainMLP(), mlp_loader())
    trainer(tmp_path, *callbacks).fit(PlainMLP(), mlp_loader())
    failed, ended = read_starts([tmp_path])
    assert failed["cost"]["steps"] == 2
    assert ended["cost"]["steps"] == 4
    for start in (failed, ended):
        assert start["cost"]["seconds"] > 0
        assert start["cost"]["memory_gib"] > 0
        assert {"started", "command", "versions", "machine"} <= set(start)


def test_numbers_of_a_data_module_are_kept(tmp_path):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return mlp_loader()

        def summary(self):
            return {"train": {"examples": 32, "where": "here"}}

    run = trainer(tmp_path, GenLoRAFinetuning(small_config(rank=4)), RunRecord(), max_steps=1)
    run.fit(PlainMLP(), datamodule=Data())
    assert read_starts([tmp_path])[0]["data"] == {"train": {"examples": 32}}


def test_nothing_is_written_where_nothing_is_trained(tmp_path):
    callbacks = [GenLoRAFinetuning(small_config(rank=4)), RunRecord()]
    trainer(tmp_path, *callbacks, fast_dev_run=True).fit(PlainMLP(), mlp_loader())
    assert list(tmp_path.iterdir()) == []
