from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from genlora_lightning import GenLoRAFinetuning, LoRAConfig, load_adapter
from genlora_lightning.errors import DivergedError
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.training.divergence import LossCurve
from tests.plain import PlainMLP, mlp_loader, trainer
from tests.ranks import on_ranks


def diverged_at(losses: list[float]) -> int:
    curve = LossCurve()
    for step, loss in enumerate(losses, 1):
        curve.add(loss)
        if curve.divergence(step):
            return step
    return len(losses) if curve.divergence(len(losses), at_the_end=True) else 0


def noise(steps: int, spread: float, seed: int = 0) -> torch.Tensor:
    return (spread * torch.randn(steps, generator=torch.Generator().manual_seed(seed))).exp()


def falling(steps: int) -> torch.Tensor:
    return 0.5 + 1.5 * torch.exp(-torch.arange(steps) / (steps / 4))


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ([4.5, 4.4, 6.0, 9.0, 12.0, 15.0, 18.0, 20.0, *[22.0] * 19], 25),
        ([2.5, 7.0, 25.0, 22.0, 12.0, 9.0, 8.0, *[7.5] * 30], 25),  # after the first step, and then better
        ([4.5, 12.0, *(20 * noise(40, 0.2)).tolist()], 25),
        ([2.5] * 8 + [min(7.5, 2.5 * 1.3**step) for step in range(40)], 40),
        ([2.0] * 50 + [1.0] * 100 + [7.0] * 40, 168),  # long after all was well
        ([2.0, 2.0, 2.0, *[9.0] * 13], 16),  # a run of few steps, at its end
        ([2.0] * 30 + [50.0 * step for step in range(1, 41)], 48),
    ],
)
def test_divergence_is_seen(losses: list[float], at: int) -> None:
    assert diverged_at(losses) == at


def healing_spike() -> torch.Tensor:
    losses = 2 * noise(200, 0.1)
    losses[60:] += 10 * torch.exp(-torch.arange(140) / 12)
    return losses


@pytest.mark.parametrize(
    "losses",
    [
        2 * torch.ones(100),
        healing_spike(),
        torch.linspace(1.0, 1.9, 200),  # a slow drift
        -noise(100, 0.5),
        torch.linspace(0.0, 5.0, 100),  # such as a policy's
        torch.linspace(1e-4, 0.09, 100),
        torch.cat([0.02 * noise(50, 0.5), torch.tensor([30.0] * 15), 0.02 * noise(50, 0.5)]),
    ],
)
def test_what_is_none_is_not_taken_for_a_divergence(losses: torch.Tensor) -> None:
    assert diverged_at(losses.tolist()) == 0


@pytest.mark.parametrize("spread", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("steps", [15, 30, 300])
def test_ordinary_noise_is_not_taken_for_a_divergence(steps: int, spread: float) -> None:
    curves = [2 * noise(steps, spread, seed) for seed in range(60)]
    curves += [falling(steps) * noise(steps, spread, seed) for seed in range(60)]
    assert [index for index, losses in enumerate(curves) if diverged_at(losses.tolist())] == []


class Pushed(Callback):
    """Makes what is trained worse from some step on, as too high a rate does; keeps the states before it."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = adapter_state_dict(pl_module)
        if trainer.global_step >= self.start:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.0  # nothing but this moves them, and not to infinity
            with torch.no_grad():
                for tensor in state.values():
                    tensor.add_(0.5 * torch.randn_like(tensor))
        self.states[trainer.global_step] = {name: t.clone() for name, t in state.items()}


def finetuning(**settings: Any) -> GenLoRAFinetuning:
    return GenLoRAFinetuning(LoRAConfig(rank=4), **settings)  # the last linear too: the loss has no bound


def run(folder: Any, *callbacks: Any, module: Any = None, **settings: Any) -> PlainMLP:
    module = module or PlainMLP()
    trainer(folder, *callbacks, **{"max_epochs": 40, "log_every_n_steps": 10, **settings}).fit(module, mlp_loader())
    return module


@pytest.mark.parametrize("accumulate", [1, 2])
def test_diverged_run_stops_and_the_best_adapter_is_kept(tmp_path, accumulate):
    pushed = Pushed(60)
    module = PlainMLP(lr=0.005)
    message = r"diverges: the median loss of the 20 steps until step \d+ is .* and 0\.\d+ at the start\. The weights"
    with pytest.raises(DivergedError, match=message) as caught:
        run(tmp_path, pushed, finetuning(), module=module, max_epochs=80, accumulate_grad_batches=accumulate)
    text = str(caught.value)
    best = int(text.split("set back to step ")[1].split(",")[0])
    assert 20 <= best < 60
    assert f"adapter after {best} steps is saved in {tmp_path / 'adapter-interrupted'}" in text
    assert not (tmp_path / "adapter").exists()
    fresh = PlainMLP()
    load_adapter(fresh, tmp_path / "adapter-interrupted")
    for name, tensor in pushed.states[best].items():
        assert torch.equal(adapter_state_dict(fresh)[name], tensor), name
        assert torch.equal(adapter_state_dict(module)[name], tensor), name


def test_run_that_diverges_from_the_start_leaves_the_folder_of_before_alone(tmp_path):
    run(tmp_path, finetuning(), max_epochs=1)
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(DivergedError, match="No adapter is saved, because it never was better than at the start"):
        run(tmp_path, Pushed(1), finetuning(), max_epochs=8, log_every_n_steps=50)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert not (tmp_path / "adapter-interrupted").exists()


class Rising(PlainMLP):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.global_step)


class Watched(Rising):
    watched_loss: torch.Tensor | None = None


def test_who_wants_a_rising_loss_can_have_it(tmp_path):
    with pytest.raises(DivergedError, match=r"which is 1e-06: try 1e-07\. .* set `stop_if_diverged=False`"):
        run(tmp_path, finetuning(), module=Rising(lr=1e-6))
    run(tmp_path, finetuning(stop_if_diverged=False), module=Rising(lr=1e-6))
    run(tmp_path, finetuning(), module=Watched(lr=1e-6))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_step_without_a_loss_counts_for_nothing(tmp_path):
    class Skipping(PlainMLP):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    assert math.isfinite(run(tmp_path, finetuning(), module=Skipping()).losses[-1])


class RisingOnOneRank(PlainMLP):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) * (1 + self.global_step * self.global_rank)


def test_all_ranks_stop_at_the_same_step_whichever_sees_it(tmp_path):
    def train() -> str:
        module = RisingOnOneRank(lr=1e-6)
        with pytest.raises(DivergedError, match="The training diverges") as caught:
            run(tmp_path, finetuning(save_adapter=False), module=module, strategy="ddp", devices=2)
        return str(caught.value)

    first, second = on_ranks(train)
    assert first == second
