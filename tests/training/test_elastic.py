"""A run draws ranks by its seed and the optimizer step, and leaves the model whole."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from genlora_lightning import GenLoRAConfig, GenLoRAFinetuning, LoRAConfig
from genlora_lightning.injection.elastic import draw_ranks
from genlora_lightning.injection.inject import adapter_layers
from tests.distributed.runs import PlainLlama, SaveAt, fit, llama_loader

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CONFIGS = {"lora": LoRAConfig(rank=4, elastic=[1, 2, 4]), "genlora": GenLoRAConfig(rank=4, elastic=[1, 2, 4])}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


class Draws(Callback):
    """The ranks of each forward, and those outside of a batch's."""

    def __init__(self) -> None:
        self.used: list[tuple[int, list[int]]] = []
        self.outside: set[int] = set()

    def ranks(self, module: Any) -> list[int]:
        return [layer.active_config.rank for layer in adapter_layers(module).values()]

    def on_before_backward(self, trainer, pl_module, loss):
        self.used.append((trainer.global_step, self.ranks(pl_module)))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.outside |= set(self.ranks(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.outside |= set(self.ranks(pl_module))


def run(folder: Any, config: Any, *callbacks: Callback, generate: Any = "forward", **settings: Any) -> Any:
    adapter = GenLoRAFinetuning(config, adapter_dir=str(folder / "adapter"), overwrite=True, generate=generate)
    settings = {"loader": llama_loader(32), "accumulate_grad_batches": 2, **settings}
    return fit("single", "replicate", folder, PlainLlama("init", "adamw"), *callbacks, adapter=adapter, **settings)


@each
@pytest.mark.parametrize("batches", [2, 3])  # between two steps, and inside of one
def test_resumed_run_draws_and_trains_the_same_in_every_bit(config, batches, tmp_path, monkeypatch):
    file, whole, rest = tmp_path / "half.ckpt", Draws(), Draws()
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    expected = run(tmp_path, config, whole, SaveAt(file, batches))
    monkeypatch.setenv("PL_GLOBAL_SEED", "13")  # that of the run counts
    resumed = run(tmp_path, config, rest, ckpt_path=file)
    assert rest.used == whole.used[batches:]
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in expected.state.items())
    other = run(tmp_path, config)
    assert any(not torch.equal(tensor, other.state[name]) for name, tensor in expected.state.items())


def test_draws_are_those_of_seed_and_step_and_end_with_the_batch(tmp_path):
    draws, config = Draws(), CONFIGS["lora"]
    module = run(tmp_path, config, draws).trainer.lightning_module
    assert [step for step, _ in draws.used] == [0, 0, 1, 1, 2, 2, 3, 3]
    for step, ranks in draws.used:
        draw_ranks(module, step, os.environ.get("PL_GLOBAL_SEED", "0"))
        assert draws.ranks(module) == ranks
    assert draws.outside == {4}


@each
def test_one_generation_per_step_trains_the_same(config, tmp_path):
    each_forward, once = run(tmp_path, config), run(tmp_path, config, generate="step")
    for name, tensor in each_forward.state.items():
        torch.testing.assert_close(once.state[name], tensor, rtol=1e-4, atol=1e-6)


def test_error_in_a_batch_leaves_the_adapter_whole(tmp_path):
    class Fails(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.module = pl_module
            raise RuntimeError("in the middle")

    fails = Fails()
    with pytest.raises(RuntimeError, match="in the middle"):
        run(tmp_path, dataclasses.replace(CONFIGS["lora"]), fails)
    assert {layer.active_config.rank for layer in adapter_layers(fails.module).values()} == {4}
