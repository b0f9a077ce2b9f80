"""What callbacks save and restore within a run is undone as with Lightning alone, and is not taken for a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.injection.state import adapter_state_dict
from tests.conftest import small_config
from tests.plain import LIGHTNING_2_5, PlainMLP, mlp_loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You are using `torch.load` with `weights_only=False`"),
]
# Before, the run leaves out the batches of a trial, and a batch size is doubled once more, without the callback, too.
FROM_2_6 = pytest.mark.skipif(LIGHTNING_2_5, reason="Lightning 2.6 has changed its finders")


class Data(LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(mlp_loader(64).dataset, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return mlp_loader(8)


class Adam(PlainMLP):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Start(Callback):
    """Notes what training starts with, and the values it sees first."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.state: dict[str, torch.Tensor] = {}
        self.batches: list[torch.Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self.found = [trainer.global_step, trainer.current_epoch, len(optimizer.state)]
        self.state = {name: t.clone() for name, t in adapter_state_dict(pl_module).items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())


def finetuning(**settings: Any) -> GenLoRAFinetuning:
    return GenLoRAFinetuning(small_config(exclude_modules=["4"]), save_adapter=False, **settings)


def fit(folder: Path, *callbacks: Any, module: PlainMLP | None = None, **settings: Any) -> tuple[Start, Trainer]:
    torch.manual_seed(4)
    start, ckpt_path = Start(), settings.pop("ckpt_path", None)
    made = trainer(folder, finetuning(), *callbacks, start, **settings)
    made.fit(module or Adam(), datamodule=Data(), ckpt_path=ckpt_path)
    return start, made


@FROM_2_6
@pytest.mark.parametrize("adam", [Adam, PlainMLP])
def test_learning_rate_finder_is_undone_and_its_rate_kept(tmp_path, adam):
    plain, _ = fit(tmp_path, module=adam())
    module = adam()
    start, run = fit(tmp_path, LearningRateFinder(num_training_steps=20, min_lr=1e-4), module=module)
    assert run.global_step == 32
    assert start.found == [0, 0, 0]
    for name, tensor in plain.state.items():
        assert torch.equal(start.state[name], tensor), name
    assert run.optimizers[0].param_groups[0]["lr"] == module.lr != 0.05
    assert all(torch.equal(a, b) for a, b in zip(start.batches, plain.batches, strict=True))
    assert list(tmp_path.glob(".lr_find*")) == []


@FROM_2_6
def test_batch_size_finder_is_undone_and_its_size_kept(tmp_path):
    plain, _ = fit(tmp_path)
    start, run = fit(tmp_path, BatchSizeFinder(steps_per_trial=2, max_trials=2))
    assert start.found == [0, 0, 0]
    assert all(torch.equal(start.state[name], tensor) for name, tensor in plain.state.items())
    assert [len(batch) for batch in start.batches] == [4] * 16
    assert run.global_step == 16


@FROM_2_6
def test_finder_in_a_later_epoch_is_undone(tmp_path):
    seen: list[bool] = []

    class Later(LearningRateFinder):
        def on_fit_start(self, *_: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                before = {name: t.clone() for name, t in adapter_state_dict(pl_module).items()}
                steps = [int(s["step"]) for s in trainer.optimizers[0].state.values()]
                self.lr_find(trainer, pl_module)
                after = adapter_state_dict(pl_module)
                seen.append(all(torch.equal(after[name], t) for name, t in before.items()))
                seen.append(steps == [int(s["step"]) for s in trainer.optimizers[0].state.values()])

    plain, _ = fit(tmp_path, max_epochs=3)
    finder = Later(num_training_steps=5, min_lr=1e-4)
    start, run = fit(tmp_path, finder, max_epochs=3)
    assert seen == [True, True]
    assert (run.global_step, run.current_epoch) == (96, 3)
    assert len(start.batches) == len(plain.batches)


class SaveAtStart(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.file)


def test_checkpoint_of_on_fit_start_resumes_from_the_start(tmp_path):
    torch.manual_seed(4)
    start = Start()
    run = trainer(tmp_path, SaveAtStart(tmp_path / "start.ckpt"), finetuning(), start)
    run.fit(Adam(), datamodule=Data())
    torch.manual_seed(99)
    again = Start()
    resumed = trainer(tmp_path, finetuning(), again)
    resumed.fit(Adam(), datamodule=Data(), ckpt_path=tmp_path / "start.ckpt")
    assert again.found == [0, 0, 0]
    assert all(torch.equal(again.state[name], tensor) for name, tensor in start.state.items())
    assert all(torch.equal(a, b) for a, b in zip(again.batches, start.batches, strict=True))


def test_resume_with_a_finder_goes_on_as_without(tmp_path):
    torch.manual_seed(4)
    run = trainer(tmp_path, finetuning(), max_epochs=2)
    run.fit(Adam(), datamodule=Data())
    run.save_checkpoint(tmp_path / "two.ckpt")
    plain, _ = fit(tmp_path, max_epochs=3, ckpt_path=tmp_path / "two.ckpt")
    assert plain.found[:2] == [64, 2]
    finder = LearningRateFinder(num_training_steps=20, min_lr=1e-4)
    start, resumed = fit(tmp_path, finder, max_epochs=3, ckpt_path=tmp_path / "two.ckpt")
    assert start.found == plain.found
    assert resumed.global_step == 96
    assert all(torch.equal(a, b) for a, b in zip(start.batches, plain.batches, strict=True))
    for name, tensor in plain.state.items():
        assert torch.equal(start.state[name], tensor), name


@FROM_2_6
@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_batch_size_finder_of_an_evaluation_runs(tmp_path, what):
    class Evaluated(PlainMLP):
        batch_size = 2

        def val_dataloader(self) -> Any:
            return DataLoader(mlp_loader(32).dataset, batch_size=self.batch_size)

        test_dataloader = predict_dataloader = val_dataloader

        def predict_step(self, batch: Any) -> Any:
            return self(batch[0])

    module = Evaluated()
    run = trainer(tmp_path, finetuning(), BatchSizeFinder(steps_per_trial=1, max_trials=2))
    with pytest.warns(UserWarning, match="adapters of this Evaluated are new and untrained"):
        getattr(run, what)(module)
    assert module.batch_size == 4


def test_tuner_before_fit_leaves_new_adapters(tmp_path):
    module = Adam()
    run = trainer(tmp_path, finetuning())
    found = Tuner(run).lr_find(module, datamodule=Data(), num_training=20, min_lr=1e-4)
    assert found.suggestion() == module.lr
    run.fit(module, datamodule=Data())
    assert run.global_step == 32
