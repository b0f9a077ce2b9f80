"""Modules that sharding could get wrong silently: each gives what one process gives, or is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.training.strategies import GenLoRAFSDPStrategy
from tests.conftest import small_config
from tests.distributed.runs import POLICIES, SHARDED, STRATEGIES, PlainLlama, Record, fit, llama_loader
from tests.plain import PlainMLP, mlp_loader, trainer
from tests.ranks import on_ranks

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]
SETTINGS: dict[str, Any] = {"max_steps": 4}


def adapter(policy: str, **config: Any) -> GenLoRAFinetuning:
    return GenLoRAFinetuning(
        small_config(**{"modules_to_train": ["lm_head"], **config}), adapter_sharding=policy, save_adapter=False
    )


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


class Manual(PlainLlama):
    """Optimizes by itself, and clips before it steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.step(batch)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        optimizer.step()
        return loss


def test_manual_optimization_clips_the_gradients_of_all_ranks(tmp_path):
    expected = fit("single", "replicate", tmp_path, Manual(), adapter=adapter("replicate"), **SETTINGS).state
    places = [(kind, "replicate") for kind in STRATEGIES] + [("fsdp2", "shard")]

    def both() -> list[Any]:
        return [fit(*place, tmp_path, Manual(), adapter=adapter(place[1]), **SETTINGS).state for place in places]

    for states in on_ranks(both):
        for state in states:
            assert_close(state, expected)


def test_manual_optimization_of_adapters_sharded_by_fsdp1_is_refused(tmp_path):
    def both() -> None:
        with pytest.raises(ValueError, match=r'Manual optimizes manually, .*set `adapter_sharding="replicate"`, or'):
            fit("fsdp1", "shard", tmp_path, Manual(), adapter=adapter("shard"), **SETTINGS)

    on_ranks(both)


class Normed(PlainMLP):
    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))


@pytest.mark.parametrize("kind", STRATEGIES)
def test_running_statistics_of_a_trained_norm_are_each_rank_s_own_and_end_no_run(tmp_path, kind):
    def both() -> dict[str, Tensor]:
        norm = adapter("replicate", modules_to_train=["1"])
        return fit(kind, "replicate", tmp_path, Normed(), adapter=norm, loader=mlp_loader()).state

    first, second = on_ranks(both)
    assert {name for name, tensor in first.items() if not torch.equal(tensor, second[name])} == {
        "net.1.running_mean",
        "net.1.running_var",
    }


class LateUnfreezing(PlainLlama):
    def configure_optimizers(self):
        for name, parameter in self.named_parameters():
            if "layernorm" in name:
                parameter.requires_grad_(True)
        return super().configure_optimizers()


@pytest.mark.parametrize("kind", STRATEGIES)
def test_what_becomes_trainable_too_late_is_refused(tmp_path, kind):
    def both() -> None:
        with pytest.raises(ValueError, match=r"4 parameters, net\.model\.layers\.0\.input_layernorm\.weight"):
            fit(kind, "replicate", tmp_path, LateUnfreezing(), adapter=adapter("replicate"), **SETTINGS)

    on_ranks(both)


class OwnParameter(PlainLlama):
    """Trains a parameter that lies in none of the modules it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def adapter_root(self) -> nn.Module:
        return self.net

    def step(self, batch):
        return super().step(batch) * self.temperature.squeeze()


@pytest.mark.filterwarnings("ignore:1 trainable parameters, temperature among them, lie outside")
def test_a_parameter_of_the_module_itself_is_trained_alike_or_refused(tmp_path):
    expected = fit("single", "replicate", tmp_path, OwnParameter(), adapter=adapter("replicate"), **SETTINGS).state
    assert expected["temperature"] != 1
    places = [(kind, "replicate") for kind in STRATEGIES] + [("fsdp1", "shard")]

    def both() -> list[Any]:
        with pytest.raises(ValueError, match=r'temperature among them.*set `adapter_sharding="replicate"`'):
            fit("fsdp2", "shard", tmp_path, OwnParameter(), adapter=adapter("shard"), **SETTINGS)
        return [fit(*place, tmp_path, OwnParameter(), adapter=adapter(place[1]), **SETTINGS).state for place in places]

    for states in on_ranks(both):
        for state in states:
            assert_close(state, expected)


@pytest.mark.parametrize("kind", SHARDED)
def test_a_base_cast_by_bf16_true_keeps_sharded_heads_in_float32(tmp_path, kind):
    settings = {**SETTINGS, "precision": "bf16-true"}
    expected = fit("single", "replicate", tmp_path, PlainLlama(), adapter=adapter("replicate"), **settings).state

    def both() -> dict[str, Tensor]:
        return fit(kind, "shard", tmp_path, PlainLlama(), adapter=adapter("shard"), **settings).state

    for state in on_ranks(both):
        assert all(tensor.dtype is torch.float32 for tensor in state.values())
        assert_close(state, expected, 2e-3)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.parametrize("policy", POLICIES)
def test_one_rank_shards_nothing_and_gives_the_same_also_when_it_resumes(tmp_path, policy):
    expected = fit("single", policy, tmp_path, PlainLlama("init", "adamw"), adapter=adapter(policy), max_steps=4).state

    def alone(kind: str, **settings: Any) -> Any:
        strategy = GenLoRAFSDPStrategy() if kind == "fsdp1" else ModelParallelStrategy(1, 1)
        torch.manual_seed(100)
        record = Record()
        own = {"strategy": strategy, "use_distributed_sampler": False, "max_steps": settings.pop("max_steps", 4)}
        run = trainer(tmp_path, adapter(policy), record, **own)
        run.fit(PlainLlama("init", "adamw"), llama_loader(), **settings)
        run.save_checkpoint(tmp_path / f"{kind}-{policy}-{run.global_step}.ckpt")
        return record.state

    def both() -> list[Any]:
        states = []
        for kind in SHARDED:
            alone(kind, max_steps=2)
            states += [alone(kind), alone(kind, ckpt_path=tmp_path / f"{kind}-{policy}-2.ckpt")]
        return states

    for state in on_ranks(both, world_size=1)[0]:
        assert_close(state, expected)


class OneRankOnly(PlainLlama):
    """Has a part that only rank 0's first batches go through."""

    def build(self) -> None:
        super().build()
        self.net.extra = nn.Linear(64, 1)

    def step(self, batch):
        out = self.net(input_ids=batch[0], labels=batch[0])
        return out.loss + (self.net.extra(out.logits).mean() if self.global_rank == 0 else 0.0)


class SaveMidWindow(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 0:
            trainer.save_checkpoint(self.file)


def test_a_checkpoint_inside_a_window_holds_gradients_that_only_one_rank_has(tmp_path):
    def both() -> None:
        saver = SaveMidWindow()
        saver.file = tmp_path / "window.ckpt"
        own = adapter("replicate", modules_to_train=["extra"])
        settings = {"accumulate_grad_batches": 2, "max_steps": 2}
        fit("fsdp2", "replicate", tmp_path, OneRankOnly(), saver, adapter=own, **settings)

    on_ranks(both, seconds=40)
    gradients = torch.load(tmp_path / "window.ckpt", weights_only=True)["genlora"]["resume"]["gradients"]
    # A rank's loss is the mean over its tokens, halved for the window of two; the other rank has none.
    torch.testing.assert_close(gradients["net.extra.bias"], torch.tensor([0.25]))
