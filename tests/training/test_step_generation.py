"""Runs with ``generate="step"`` against the same runs with plain autograd in each forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.adapters.genlora.generate import pass_gradients_on
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.layers.accumulation import is_generated_once
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import small_config
from tests.layers.test_sharing import generations
from tests.plain import PlainMLP, mlp_loader, trainer
from tests.training.test_resume import Noisy, SaveAt, loader, seed


class Plain(Callback):
    """Has the adapters computed by the formula, left to autograd."""

    def on_fit_start(self, trainer, pl_module):
        set_fused(pl_module, False)


def fit(
    folder: Any, generate: str, *callbacks: Any, module: Any = None, data: Any = None, val: Any = None, **settings: Any
) -> Any:
    torch.manual_seed(7)
    module = module or PlainMLP()
    adapter = GenLoRAFinetuning(
        small_config(exclude_modules=["4"]), save_adapter=False, generate="forward" if generate == "plain" else generate
    )
    callbacks = (*callbacks, Plain()) if generate == "plain" else callbacks
    run = trainer(folder, adapter, *callbacks, **settings)
    run.fit(module, data or mlp_loader(80, 4), val, ckpt_path=None)
    module.steps = run.global_step
    assert not is_generated_once(module)
    return module


def assert_same(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    assert one.steps == other.steps
    torch.testing.assert_close(one.losses, other.losses, rtol=0, atol=tolerance)
    for name, tensor in adapter_state_dict(other).items():
        torch.testing.assert_close(adapter_state_dict(one)[name], tensor, rtol=0, atol=tolerance)


class NoLoss(PlainMLP):
    """Gives no loss for the last micro-batch of a window."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 4 == 3 else loss


class Skipping(PlainMLP):
    """Ends its epochs in the middle of a window."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == 6 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    ("made", "settings"),
    [
        (PlainMLP, {"max_epochs": 4}),  # 20 steps
        (PlainMLP, {"max_epochs": 4, "gradient_clip_val": 0.05}),
        (PlainMLP, {"max_epochs": 4, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (PlainMLP, {"max_epochs": 3, "accumulate_grad_batches": 7}),  # an incomplete window ends each epoch
        (PlainMLP, {"max_steps": 8, "max_epochs": -1, "limit_train_batches": 9}),
        (NoLoss, {"max_epochs": 4}),
        (Skipping, {"max_epochs": 4}),
    ],
)
def test_losses_and_adapters_equal_those_of_the_plain_path(tmp_path, made, settings):
    settings = {"accumulate_grad_batches": 4, **settings}
    plain, ours = (fit(tmp_path, generate, module=made(), **settings) for generate in ("plain", "step"))
    assert_same(ours, plain)
    assert plain.losses[0] != plain.losses[-1]


def test_validation_in_the_middle_of_a_window_disturbs_nothing(tmp_path):
    settings = {"accumulate_grad_batches": 4, "max_epochs": 2}
    validating = {"val": mlp_loader(16), "val_check_interval": 3}
    quiet, validated = (fit(tmp_path, "step", **settings, **more) for more in ({}, validating))
    assert quiet.losses == validated.losses
    assert_same(validated, quiet, 0.0)
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=-1)
    saved = fit(tmp_path, "step", saver, enable_checkpointing=True, **settings, **validating)
    assert_same(saved, quiet)
    states = [torch.load(file, weights_only=True) for file in tmp_path.glob("*.ckpt")]
    assert sum(bool(state["genlora"]["resume"]["gradients"]) for state in states) > 4


def test_accumulation_may_change_during_the_run(tmp_path):
    runs = [
        fit(tmp_path, generate, GradientAccumulationScheduler({0: 1, 1: 3, 2: 4}), max_epochs=4)
        for generate in ("plain", "step")
    ]
    assert_same(*runs)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_a_window_generates_once(tmp_path, monkeypatch, micro_batches):
    passed = []

    def passing(parameters, *args, **kwargs):
        passed.append(len(parameters))
        pass_gradients_on(parameters, *args, **kwargs)

    monkeypatch.setattr("genlora_lightning.adapters.genlora.generator.pass_gradients_on", passing)
    with generations(monkeypatch) as calls:
        fit(tmp_path, "step", accumulate_grad_batches=micro_batches, max_steps=1, max_epochs=-1)
    assert sum(calls) == sum(passed) == 2 * 2


class Watch(Callback):
    """When the adapters have gradients, and whether a window is open."""

    def on_fit_start(self, trainer, pl_module):
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        has = any(p.grad is not None for n, p in pl_module.named_parameters() if ".update." in n)
        self.seen.append((is_generated_once(pl_module), has))


def test_one_micro_batch_per_step_shares_nothing(tmp_path):
    watch = Watch()
    fit(tmp_path, "step", watch, accumulate_grad_batches=1)
    assert watch.seen == [(False, True)] * 20
    fit(tmp_path, "step", watch, accumulate_grad_batches=2)
    assert watch.seen[2:] == [(True, False), (False, True)] * 9 or watch.seen[::2] == [(True, False)] * 10


@pytest.mark.parametrize("batches", [5, 6, 7])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_exception"])
def test_stop_inside_a_window_resumes_to_the_uninterrupted_run(tmp_path, batches, hook):
    def run(module, *callbacks, **settings):
        adapter = GenLoRAFinetuning(
            small_config(exclude_modules=["5"], dropout=0.2), save_adapter=False, generate="step"
        )
        made = trainer(tmp_path, adapter, *callbacks, max_epochs=3, accumulate_grad_batches=4)
        made.fit(module, loader("shuffle"), ckpt_path=settings.get("ckpt_path"))
        return adapter_state_dict(module)

    class StopAt(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.fit_loop.total_batch_idx + 1 == batches:
                raise KeyError("stopped")

        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    seed(5)
    whole_module = Noisy()
    whole = run(whole_module)
    seed(5)
    first = Noisy()
    stop = SaveAt(tmp_path / "stopped.ckpt", batches) if hook == "on_train_batch_end" else StopAt()
    with pytest.raises(KeyError, match="stopped"):
        run(first, stop)
    seed(99)
    second = Noisy()
    resumed = run(second, ckpt_path=tmp_path / "stopped.ckpt")
    torch.testing.assert_close(first.losses + second.losses, whole_module.losses, rtol=0, atol=1e-6)
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


def test_error_in_a_window_leaves_the_module_fit_for_another_run(tmp_path):
    class Failing(PlainMLP):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails and batch_idx == 5:
                raise KeyError("x")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(KeyError, match="x"):
        fit(tmp_path, "step", module=module, accumulate_grad_batches=4)
    assert not is_generated_once(module)
    module.fails, module.losses = False, []
    fit(tmp_path, "step", module=module, accumulate_grad_batches=4)
    assert len(module.losses) == 20


def test_manual_optimization_is_refused(tmp_path):
    class Manual(PlainMLP):
        automatic_optimization = False

    with pytest.raises(ValueError, match=r"Manual optimizes manually: set `generate=\"forward\"`"):
        fit(tmp_path, "step", module=Manual())


def test_unknown_value_is_an_error():
    with pytest.raises(ValueError, match=r"`generate` must be one of \('forward', 'step'\), got 'epoch'"):
        GenLoRAFinetuning(generate="epoch")


def test_bfloat16_run_is_as_close_to_plain_autograd_as_generation_in_each_forward(tmp_path):
    settings = {"accumulate_grad_batches": 4, "max_epochs": 4, "precision": "bf16-mixed"}
    plain, forward, ours = (fit(tmp_path, generate, **settings) for generate in ("plain", "forward", "step"))

    def distance(one):
        return max(float((t - adapter_state_dict(plain)[n]).abs().max()) for n, t in adapter_state_dict(one).items())

    assert distance(ours) < 5e-3
    assert distance(ours) < 3 * distance(forward) + 1e-6
