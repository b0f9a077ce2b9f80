"""A run that was stopped and resumed against one that was not: the same losses and tensors, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from genlora_lightning import CausalLMModule, GenLoRAFinetuning, OptimizerConfig
from genlora_lightning.injection.state import adapter_state_dict
from tests.conftest import small_config
from tests.models import tiny_llama
from tests.plain import PlainMLP, trainer


class Noisy(PlainMLP):
    """Everything random that a training step can be: dropout, and noise of numpy's and Python's generators."""

    schedule = "step"

    def build(self) -> None:
        super().build()
        self.net.insert(2, nn.Dropout(0.3))

    def step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        if not self.training:
            return super().step(batch)
        return super().step(batch) * (1 + 0.1 * np.random.random() + 0.1 * random.random())

    def on_train_epoch_start(self) -> None:
        torch.rand(1)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        if self.schedule == "plateau":
            scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, factor=0.5, patience=0, threshold=0.3
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule}}


def data(n: int = 20) -> TensorDataset:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(3))
    return TensorDataset(x, x[:, :4].sin())


def loader(kind: str = "shuffle") -> DataLoader:
    """Five batches in an order that is random in one of the ways that there are."""
    own = torch.Generator().manual_seed(11)
    options: dict[str, Any] = {
        "ordered": {},
        "shuffle": {"shuffle": True},
        "generator": {"shuffle": True, "generator": own},
        "sampler": {"sampler": RandomSampler(data(), replacement=True, generator=own)},
        "workers": {"shuffle": True, "num_workers": 2},
        "persistent": {"shuffle": True, "num_workers": 1, "persistent_workers": True, "generator": own},
    }
    if kind == "torchdata":
        stateful = pytest.importorskip("torchdata.stateful_dataloader")
        return stateful.StatefulDataLoader(data(), batch_size=4, shuffle=True, generator=own)
    return DataLoader(data(), batch_size=4, **options[kind])


def seed(value: int) -> None:
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


class SaveAt(Callback):
    """Saves in a hook when so many batches have been trained, and may stop the process there."""

    def __init__(self, file: Path, batches: int, hook: str = "on_train_batch_end", stop: bool = True) -> None:
        self.file, self.batches, self.stop = file, batches, stop
        setattr(self, hook, self.save)

    def save(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batches and not trainer.sanity_checking:
            trainer.save_checkpoint(self.file)
            if self.stop:
                raise KeyError("stopped")


def run(
    folder: Path, module: Any, *callbacks: Any, kind: str = "shuffle", validate: bool = False, **settings: Any
) -> Any:
    ckpt_path = settings.pop("ckpt_path", None)
    finetuning = GenLoRAFinetuning(small_config(exclude_modules=["5"], dropout=0.2), save_adapter=False)
    made = trainer(folder, finetuning, *callbacks, **settings)
    made.fit(module, loader(kind), loader("ordered") if validate else None, ckpt_path=ckpt_path)
    return made


def assert_resumes(tmp_path: Path, batches: int, hook: str = "on_train_batch_end", **settings: Any) -> None:
    schedule = settings.pop("schedule", "step")
    whole, first, second = Noisy(), Noisy(), Noisy()
    for module in (whole, first, second):
        module.schedule = schedule
    seed(5)
    uninterrupted = run(tmp_path, whole, **settings)
    seed(5)
    file = tmp_path / "stopped.ckpt"
    with pytest.raises(KeyError, match="stopped"):
        run(tmp_path, first, SaveAt(file, batches, hook), **settings)
    seed(99)  # a resumed run must not depend on the values it would have started from
    resumed = run(tmp_path, second, ckpt_path=file, **settings)
    assert len(first.losses) == batches
    assert first.losses + second.losses == whole.losses
    for name, tensor in adapter_state_dict(second).items():
        assert torch.equal(tensor, adapter_state_dict(whole)[name]), name
    assert resumed.optimizers[0].param_groups[0]["lr"] == uninterrupted.optimizers[0].param_groups[0]["lr"]
    for counter in ("global_step", "current_epoch"):
        assert getattr(resumed, counter) == getattr(uninterrupted, counter)
    assert resumed.fit_loop.epoch_loop._batches_that_stepped == uninterrupted.fit_loop.epoch_loop._batches_that_stepped


LENGTHS = [{"max_epochs": 3}, {"max_steps": 13, "max_epochs": -1}]


@pytest.mark.parametrize("length", LENGTHS, ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize("kind", ["shuffle", "generator"])
@pytest.mark.parametrize("batches", [3, 5, 8, 10])
def test_stop_after_a_batch(tmp_path, batches, kind, length):
    assert_resumes(tmp_path, batches, kind=kind, **length)


@pytest.mark.parametrize("length", LENGTHS, ids=["max_epochs", "max_steps"])
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("schedule", ["step", "epoch", "plateau"])
def test_stop_at_the_end_of_an_epoch(tmp_path, hook, validate, schedule, length):
    if not validate and (hook == "on_validation_end" or schedule == "plateau"):
        pytest.skip("nothing is validated")
    assert_resumes(tmp_path, 10, hook, validate=validate, schedule=schedule, **length)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's
@pytest.mark.parametrize("kind", ["ordered", "sampler", "workers", "persistent", "torchdata"])
@pytest.mark.parametrize("batches", [5, 7])
def test_every_kind_of_loader(tmp_path, batches, kind):
    if kind == "torchdata" and batches == 5:
        pytest.skip("Lightning does not restore a stateful loader of others at an epoch's end")
    hook = "on_train_epoch_end" if batches == 5 else "on_train_batch_end"
    assert_resumes(tmp_path, batches, hook, kind=kind, max_epochs=2)


@pytest.mark.parametrize("batches", [1, 2, 4, 5, 6, 8])
@pytest.mark.parametrize("window", [2, 3])
def test_stop_in_the_middle_of_gradient_accumulation(tmp_path, batches, window):
    assert_resumes(tmp_path, batches, max_epochs=2, accumulate_grad_batches=window, gradient_clip_val=0.5)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
@pytest.mark.parametrize("batches", [2, 4, 6, 7])
def test_stop_beside_a_validation_in_the_middle_of_an_epoch(tmp_path, batches, hook):
    if hook == "on_validation_end" and batches == 6:
        pytest.skip("no validation there")
    assert_resumes(tmp_path, batches, hook, validate=True, max_epochs=2, val_check_interval=2)


@pytest.mark.parametrize(("steps", "epochs"), [(7, -1), (10, -1), (-1, 2)])
def test_run_that_had_ended_goes_on_when_given_more_steps(tmp_path, steps, epochs):
    whole, first, second = Noisy(), Noisy(), Noisy()
    seed(5)
    run(tmp_path, whole, max_steps=14, max_epochs=-1)
    seed(5)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run(tmp_path, first, saver, enable_checkpointing=True, max_steps=steps, max_epochs=epochs)
    seed(99)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    longer = run(tmp_path, second, saver, enable_checkpointing=True, max_steps=14, max_epochs=-1, ckpt_path="last")
    assert first.losses + second.losses == whole.losses
    assert longer.global_step == 14


def test_resume_from_the_best_checkpoint(tmp_path):
    class Watched(Noisy):
        def on_validation_epoch_end(self) -> None:
            self.log("score", float(self.current_epoch != 1))

    whole, second = Watched(), Watched()
    seed(5)
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="score", mode="min", filename="{epoch}")
    made = run(tmp_path, whole, saver, enable_checkpointing=True, validate=True, max_epochs=4)
    assert saver.best_model_path.endswith("epoch=1.ckpt")
    seed(99)
    resumed = trainer(
        tmp_path, made.callbacks[0], saver, enable_checkpointing=True, max_epochs=4, num_sanity_val_steps=0
    )
    resumed.fit(second, loader(), loader("ordered"), ckpt_path="best")
    assert second.losses == whole.losses[10:]


def test_how_often_is_validated_does_not_change_the_training(tmp_path):
    losses = []
    for interval in (1, 5):
        module = Noisy()
        seed(5)
        run(tmp_path, module, validate=True, val_check_interval=interval, max_epochs=2)
        losses.append(module.losses)
    assert losses[0] == losses[1]


def test_checkpoints_along_the_way_change_nothing_and_each_is_a_good_one(tmp_path):
    whole = Noisy()
    seed(5)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    run(tmp_path, whole, saver, enable_checkpointing=True, max_epochs=2)
    plain = Noisy()
    seed(5)
    run(tmp_path, plain, max_epochs=2)
    assert plain.losses == whole.losses
    files = sorted(tmp_path.glob("step=*.ckpt"))
    assert len(files) == 5
    for file in files:
        rest = Noisy()
        run(tmp_path, rest, max_epochs=2, ckpt_path=file)
        steps = int(file.stem.removeprefix("step="))
        assert rest.losses == whole.losses[steps:]


@pytest.mark.parametrize("batches", [2, 3, 4])
def test_token_weighted_accumulation_goes_on_in_the_middle_of_a_window(tmp_path, batches):
    tiny_llama().save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (10, 6), generator=generator)
    labels = ids.clone()
    for row in range(10):
        labels[row, : row % 5] = -100
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": t} for i, t in zip(ids, labels, strict=True)
    ]

    class Recorded(CausalLMModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.append(float(self.trainer.callback_metrics.get("train_loss", loss)))
            return loss

    def fit(*callbacks: Any, ckpt_path: Any = None) -> Any:
        optimizer = OptimizerConfig(lr=0.02, warmup_steps=1)
        module = Recorded(str(tmp_path / "model"), adapter=small_config(dropout=0.1), optimizer=optimizer)
        module.losses = []
        made = trainer(tmp_path, *callbacks, max_epochs=2, accumulate_grad_batches=3)
        stopped = bool(callbacks)
        if stopped:
            with pytest.raises(KeyError, match="stopped"):
                made.fit(module, DataLoader(rows, batch_size=2, shuffle=True))
        else:
            made.fit(module, DataLoader(rows, batch_size=2, shuffle=True), ckpt_path=ckpt_path)
        return module

    seed(5)
    whole = fit()
    seed(5)
    fit(SaveAt(tmp_path / "x.ckpt", batches))
    seed(99)
    second = fit(ckpt_path=tmp_path / "x.ckpt")
    assert len(second.losses) == 10 - batches
    for name, tensor in adapter_state_dict(second).items():
        assert torch.equal(tensor, adapter_state_dict(whole)[name]), name


@pytest.mark.parametrize("batches", [5, 6, 7, 8, 9, 10, 13])
def test_accumulation_of_the_epoch_goes_on_inside_of_it(tmp_path, batches):
    def fit(module: Any, *more: Any, **settings: Any) -> None:
        run(tmp_path, module, GradientAccumulationScheduler({0: 1, 1: 3, 2: 2}), *more, max_epochs=3, **settings)

    seed(5)
    whole = Noisy()
    fit(whole)
    seed(5)
    first = Noisy()
    with pytest.raises(KeyError, match="stopped"):
        fit(first, SaveAt(tmp_path / "stopped.ckpt", batches))
    seed(99)
    second = Noisy()
    fit(second, ckpt_path=tmp_path / "stopped.ckpt")
    assert first.losses + second.losses == whole.losses
    for name, tensor in adapter_state_dict(second).items():
        assert torch.equal(tensor, adapter_state_dict(whole)[name]), name


def negative(content: dict[str, Any]) -> None:
    content["loops"]["fit_loop"]["epoch_progress"]["total"]["completed"] = -1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (negative, r"x\.ckpt is damaged: loops\.fit_loop\.epoch_progress\.total\.completed must be a count, got -1"),
        (lambda c: c.update(optimizer_states=[{}]), r"x\.ckpt cannot be gone on from \(KeyError: 'param_groups'\)"),
        (lambda c: c.update(loops={}), r"x\.ckpt cannot be gone on from \(KeyError: 'fit_loop'\)"),
        (lambda c: c.update({"pytorch-lightning_version": 3}), r"x\.ckpt cannot be gone on from"),
        (lambda c: c.update(lr_schedulers=[3]), r"x\.ckpt cannot be gone on from"),
        (lambda c: c["genlora"]["resume"].update(plateau=[[]]), r"x\.ckpt cannot be gone on from \(ValueError"),
        (lambda c: c["genlora"]["resume"].update(ranks=3), r"x\.ckpt cannot be gone on from \(TypeError"),
    ],
)
def test_checkpoint_that_cannot_be_gone_on_from_is_named(tmp_path, damage, message):
    first = trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False))
    first.fit(Noisy(), DataLoader(data()))
    first.save_checkpoint(tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "x.ckpt")
    again = trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False), max_epochs=2)
    with pytest.raises(ValueError, match=message):
        again.fit(Noisy(), DataLoader(data()), ckpt_path=tmp_path / "x.ckpt")


def test_adapter_folder_as_a_checkpoint_is_named_as_what_it_is(tmp_path):
    trainer(tmp_path, GenLoRAFinetuning(small_config())).fit(PlainMLP(), DataLoader(data()))
    message = r"adapter, given as `ckpt_path`, is an adapter folder and no checkpoint: .*`load_adapter`\), and give no"
    for name in ("fit", "test"):
        again = trainer(tmp_path, GenLoRAFinetuning(small_config()))
        with pytest.raises(ValueError, match=message):
            getattr(again, name)(PlainMLP(), DataLoader(data()), ckpt_path=tmp_path / "adapter")


def test_checkpoint_of_weights_only_is_named_as_what_it_is(tmp_path):
    first = trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False))
    first.fit(PlainMLP(), DataLoader(data()))
    first.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    again = trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False), max_epochs=2)
    with pytest.raises(ValueError, match=r"x\.ckpt holds weights only \(`save_weights_only=True`\).*`ckpt_path`\.$"):
        again.fit(PlainMLP(), DataLoader(data()), ckpt_path=tmp_path / "x.ckpt")


def test_missing_checkpoint_and_one_that_cannot_be_tested_are_not_said_to_have_other_optimizers(tmp_path):
    made = trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False))
    made.fit(PlainMLP(), DataLoader(data()))
    made.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(FileNotFoundError, match=r"nothing\.ckpt"):
        made.fit(PlainMLP(), DataLoader(data()), ckpt_path=tmp_path / "nothing.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    torch.save({**content, "pytorch-lightning_version": 3}, tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError, match=r"x\.ckpt cannot be loaded .*with other callbacks or another data module, or by"
    ):
        made.test(PlainMLP(), DataLoader(data()), ckpt_path=tmp_path / "x.ckpt")


def test_state_of_another_optimizer_is_refused_by_both_names(tmp_path):
    class Descending(Noisy):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)

    first = trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False))
    first.fit(Noisy(), DataLoader(data()))
    first.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False), max_epochs=2)
    with pytest.raises(ValueError, match=r"x\.ckpt was written with the optimizer AdamW, and this run has SGD, which"):
        again.fit(Descending(), DataLoader(data()), ckpt_path=tmp_path / "x.ckpt")
