"""A run whose ranks read their parts of the base, under each strategy, against one process that loads all of it."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from genlora_lightning import CausalLMModule, GenLoRAFinetuning, OptimizerConfig
from genlora_lightning.artifacts.adapter_folder import read_adapter
from tests.backbone.test_low_memory import saved
from tests.conftest import small_config
from tests.distributed.ranks import on_two_ranks
from tests.models import tiny_llama
from tests.modules.conftest import loader, text_batch

strategies = pytest.importorskip("genlora_lightning.training.strategies", reason="sharding strategies are not there")
pytestmark = pytest.mark.timeout(120)

STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp1": lambda: strategies.GenLoRAFSDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda: ModelParallelStrategy(2, 1, process_group_backend="gloo"),
}


def fit(model: str, folder, *, low_memory: bool, **settings: object) -> tuple[CausalLMModule, int]:
    """Three steps on batches of two; a rank of two takes one of them. Returns the base's values that are held."""
    torch.manual_seed(4)
    module = CausalLMModule(model, low_memory=low_memory, optimizer=OptimizerConfig(lr=0.01, eps=1e-3))
    rows = [([3 + i, 4 + i], [5 + i, 6 + i]) for i in range(6)]
    rank = settings.pop("rank", None)
    mine = [rows[i : i + 2] if rank is None else rows[i + rank : i + rank + 1] for i in (0, 2, 4)]
    sharding = settings.pop("sharding", None)
    policy = {} if sharding is None else {"adapter_sharding": sharding}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[GenLoRAFinetuning(small_config(), **policy)],
        **settings,
    )
    trainer.fit(module, loader([text_batch(group) for group in mine]))
    held = sum(
        (p.to_local() if hasattr(p, "to_local") else p).numel() for p in module.parameters() if not p.requires_grad
    )
    return module, held


@pytest.mark.parametrize(
    ("strategy", "sharding"),
    [("ddp", None), ("fsdp1", "replicate"), ("fsdp1", "shard"), ("fsdp2", "replicate"), ("fsdp2", "shard")],
)
def test_ranks_that_read_their_parts_end_where_one_process_does(tmp_path, strategy, sharding):
    from safetensors.torch import load_file

    model = saved(tiny_llama(intermediate_size=27), tmp_path / "model")
    _, all_values = fit(model, tmp_path / "single", low_memory=False)

    def work(rank):
        settings = {"strategy": STRATEGIES[strategy](), "devices": 2, "use_distributed_sampler": False}
        module, held = fit(model, tmp_path / "ranks", low_memory=True, rank=rank, sharding=sharding, **settings)
        return {"held": held, "meta": sum(p.is_meta for p in module.parameters())}

    results = on_two_ranks(work, tmp_path, elastic=True)
    for result in results:
        assert result["meta"] == 0
        assert result["held"] <= (1.0 if strategy == "ddp" else 0.65) * all_values
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("single", "ranks"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=2e-6)
    # The base's fingerprint, of values that no rank had read when it was taken.
    stored = [read_adapter(tmp_path / name / "adapter") for name in ("single", "ranks")]
    assert stored[0].base["fingerprint"] == stored[1].base["fingerprint"]
