"""Rows of tokens, in an embedding and a tied head, are trained under each strategy as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genlora_lightning import GenLoRAFinetuning, LoRAConfig, load_adapter
from genlora_lightning.injection.state import adapter_state_dict
from tests.distributed.runs import STRATEGIES, PlainLlama, Record, SaveAt, fit, llama_loader
from tests.models import tiny_llama
from tests.ranks import on_ranks

CONFIG = LoRAConfig(rank=2, target_modules=["q_proj"], tokens_to_train=[60, 5, 33])


class Tied(PlainLlama):
    def build(self) -> None:
        with torch.random.fork_rng():
            self.net = tiny_llama()


def run(strategy: str, folder: Path, *callbacks: Any, policy: str = "replicate", **settings: Any) -> Record:
    adapter = GenLoRAFinetuning(CONFIG, adapter_dir=str(folder / strategy), adapter_sharding=policy)
    module = Tied("init", "adamw")
    return fit(strategy, policy, folder, module, *callbacks, adapter=adapter, loader=llama_loader(16), **settings)


@pytest.mark.timeout(200)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.filterwarnings("ignore:.* has both parameters with requires_grad=True and False:UserWarning")
def test_rows_train_and_resume_under_every_strategy_as_in_one_process(tmp_path):
    one = run("single", tmp_path, SaveAt(tmp_path / "single.ckpt", 2))

    def all_strategies() -> list[Any]:
        found, before = [], "single"
        for strategy in STRATEGIES:
            whole = run(strategy, tmp_path, SaveAt(tmp_path / f"{strategy}.ckpt", 2))
            resumed = run(strategy, tmp_path, ckpt_path=tmp_path / f"{before}.ckpt")
            found.append((strategy, whole.losses, whole.state, resumed.state))
            before = strategy
        with pytest.raises(ValueError, match="cannot be sharded: the rows of its `tokens_to_train`"):
            run("fsdp2", tmp_path / "refused", policy="shard")
        return found

    for strategy, losses, state, resumed in on_ranks(all_strategies, seconds=160)[0]:
        torch.testing.assert_close(losses, one.losses, rtol=0, atol=1e-5)
        for found in (state, resumed):
            assert found.keys() == one.state.keys()
            for name, tensor in one.state.items():
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
        module = Tied()
        load_adapter(module, tmp_path / strategy)
        for name, tensor in adapter_state_dict(module).items():
            assert torch.equal(tensor, resumed[name]), (strategy, name)
