from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from genlora_lightning import GenLoRAFinetuning, load_adapter
from genlora_lightning.errors import NonFiniteGradientError
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.training import finite
from genlora_lightning.training.finite import FiniteWatch, leaves_out_steps
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer

CPU = torch.device("cpu")


class FusedMLP(PlainMLP):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=True)


class SpoilSecondOfEachEpoch(Callback):
    """Makes step 2 of 8 NaN, and 6 too, which must not be the one that is named; keeps the state at each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append({name: t.clone() for name, t in adapter_state_dict(pl_module).items()})
        if batch_idx == 1:
            batch[0].fill_(math.nan)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "waits_to_read", lambda tensor: True)


def finetuning(**settings: Any) -> GenLoRAFinetuning:
    return GenLoRAFinetuning(small_config(exclude_modules=["4"]), **settings)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("when", "stopped_after"),
    [("log", 4), ("validation", 3), ("checkpoint", 6), ("end", 8)],
)
def test_steps_from_the_first_bad_gradient_on_are_left_out_until_it_is_read(tmp_path, when, stopped_after):
    module, spoil = FusedMLP(), SpoilSecondOfEachEpoch()
    settings: dict[str, Any] = {
        "log": {"log_every_n_steps": 4},
        "validation": {"val_check_interval": 3, "check_val_every_n_epoch": None},
        "checkpoint": {"enable_checkpointing": True},
        "end": {},
    }[when]
    more = [ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=6)] if when == "checkpoint" else []
    run = trainer(tmp_path, finetuning(), spoil, *more, **{"max_epochs": 2, "log_every_n_steps": 100, **settings})
    loaders = [mlp_loader(), mlp_loader()] if when == "validation" else [mlp_loader()]
    with pytest.raises(
        NonFiniteGradientError,
        match=r"at optimizer step 2, epoch 0, batch 1, in 16 tensors \(net.0.update.A.latent first\); the last loss "
        rf"was not finite. The step was not made, nor any after it until step {stopped_after}: .*"
        "The adapter after 1 steps is saved",
    ):
        run.fit(module, *loaders)
    assert len(spoil.states) == stopped_after
    saved = PlainMLP()
    load_adapter(saved, tmp_path / "adapter-interrupted")
    assert not all(torch.equal(t, spoil.states[0][name]) for name, t in spoil.states[1].items())
    for name, tensor in spoil.states[1].items():
        assert torch.equal(adapter_state_dict(module)[name], tensor), name
        assert torch.equal(adapter_state_dict(saved)[name], tensor), name
    assert not list((tmp_path / "checkpoints").glob("*.ckpt"))
    assert '"global_step": 1' in (tmp_path / "adapter-interrupted" / "manifest.json").read_text()
    assert {int(state["step"]) for state in run.optimizers[0].state.values()} == {1}
    assert not hasattr(run.optimizers[0], "found_inf")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_another_error_meanwhile_saves_the_adapter_of_the_last_good_step(tmp_path):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("a bug")

    spoil = SpoilSecondOfEachEpoch()
    with (
        pytest.warns(UserWarning, match="was NaN or infinite at step 2; it and those after it were not made"),
        pytest.raises(KeyError, match="a bug"),
    ):
        trainer(tmp_path, finetuning(), spoil, Break(), log_every_n_steps=100).fit(FusedMLP(), mlp_loader())
    saved = PlainMLP()
    load_adapter(saved, tmp_path / "adapter-interrupted")
    for name, tensor in adapter_state_dict(saved).items():
        assert torch.equal(tensor, spoil.states[1][name]), name
    assert '"global_step": 1' in (tmp_path / "adapter-interrupted" / "manifest.json").read_text()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_optimizer_that_cannot_leave_out_a_step_is_stopped_at_once(tmp_path):
    spoil = SpoilSecondOfEachEpoch()
    with pytest.raises(NonFiniteGradientError, match=r"at optimizer step 2, .*The step was not made: the weights are"):
        trainer(tmp_path, finetuning(), spoil, log_every_n_steps=100).fit(PlainMLP(), mlp_loader())
    assert len(spoil.states) == 2


@pytest.mark.usefixtures("as_on_a_gpu")
def test_run_whose_gradients_are_finite_is_the_same_in_every_bit(tmp_path):
    watched, unwatched = FusedMLP(), FusedMLP()
    for module, every in ((watched, 1), (unwatched, 0)):
        torch.manual_seed(0)
        run = trainer(tmp_path, finetuning(check_finite_every_n_steps=every), max_epochs=2, gradient_clip_val=0.1)
        run.fit(module, mlp_loader())
        assert not hasattr(run.optimizers[0], "found_inf")
    for name, tensor in adapter_state_dict(watched).items():
        assert torch.equal(tensor, adapter_state_dict(unwatched)[name]), name


class Plain(torch.optim.AdamW):
    """Another class, whose step may be another one."""


@pytest.mark.parametrize(
    ("kind", "fused", "can"),
    [
        (torch.optim.AdamW, True, True),
        (torch.optim.Adam, True, True),
        (torch.optim.SGD, True, True),
        (torch.optim.AdamW, False, False),
        (Plain, True, False),
    ],
)
def test_fused_optimizers_leave_out_the_step_and_those_after_it(monkeypatch, kind, fused, can):
    monkeypatch.setattr(finite, "waits_to_read", lambda tensor: True)
    weight, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = kind([weight, other], lr=0.1, fused=fused)
    assert leaves_out_steps(optimizer) == can
    watch = FiniteWatch(CPU, lambda flag: None)
    values = [weight.detach().clone()]
    for step, gradient in enumerate([1.0, math.inf, 1.0], start=1):
        weight.grad, other.grad = torch.full((3,), gradient), torch.ones(2)
        assert watch.check(optimizer, torch.tensor(gradient), step=step, epoch=0, batch=step) == (not can)
        if can:
            optimizer.step()
        values.append(weight.detach().clone())
    found = watch.read(nn.ParameterDict({"weight": weight, "other": other}))
    assert (found.step, found.batch, found.names, found.loss_was_finite) == (2, 2, ["weight"], False)
    assert torch.equal(values[1], values[0]) == (not can)
    assert torch.equal(values[3], values[1])
    assert watch.read(nn.Module()) is None  # once


def test_rank_without_a_gradient_of_its_own_hears_of_another_ones():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    watch = FiniteWatch(CPU, lambda flag: flag.fill_(1.0))
    assert watch.check(optimizer, None, step=5, epoch=1, batch=2)
    found = watch.read(nn.Module())
    assert (found.step, found.epoch, found.names, found.loss_was_finite) == (5, 1, [], None)


def test_what_is_unread_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(finite, "waits_to_read", lambda tensor: True)
    monkeypatch.setattr(finite, "_MOST_UNREAD", 3)
    weight = nn.Parameter(torch.ones(3))
    optimizer, watch = torch.optim.SGD([weight], lr=0.1, fused=True), FiniteWatch(CPU, lambda flag: None)
    answers = []
    for step in range(1, 7):
        weight.grad = torch.ones(3)
        answers.append(watch.check(optimizer, None, step=step, epoch=0, batch=step))
        if answers[-1]:
            assert watch.read(nn.Module()) is None
    assert answers == [False, False, True] * 2
