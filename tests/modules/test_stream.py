"""A run on a stream ends at `max_steps`, validates between, and goes on from a checkpoint with every bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from genlora_lightning.data import InstructionDataModule
from genlora_lightning.modules import CausalLMModule
from genlora_lightning.training.optim import OptimizerConfig
from tests.conftest import small_config


@pytest.mark.parametrize(("workers", "limit"), [(0, None), (0, 3), (1, None)])
def test_a_resumed_run_on_a_stream_equals_one_without_a_stop(
    make_trainer: Callable[..., Trainer], model_folders: dict[str, str], tmp_path: Path, workers: int, limit: int | None
) -> None:
    rows = [{"prompt": f"w{3 + n} w{4 + n}", "completion": f" w{30 + n}"} for n in range(20)]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = model_folders["llama"]

    def run(steps: int, ckpt: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        optimizer = OptimizerConfig(lr=0.02, schedule="linear", warmup_ratio=0.1)
        module = CausalLMModule(folder, adapter=small_config(rank=4, dropout=0.2), optimizer=optimizer)
        data = InstructionDataModule(
            folder,
            str(file),
            val_file=str(file),
            chat_template="none",
            batch_size=2,
            streaming=True,
            shuffle_buffer=4,
            num_workers=workers,
        )
        saver = ModelCheckpoint(tmp_path, filename="at-{step}", every_n_train_steps=1, save_top_k=-1)
        options: dict[str, Any] = {"max_steps": steps, "enable_checkpointing": True, "callbacks": [saver]}
        options |= {"val_check_interval": 2} if limit is None else {"limit_train_batches": limit}
        trainer = make_trainer(**options, limit_val_batches=1, accumulate_grad_batches=1)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt)
        assert trainer.global_step == steps
        assert "val_loss" in trainer.callback_metrics
        return {name: tensor.detach().clone() for name, tensor in module.model.state_dict().items()}

    whole = run(11)  # more than a pass
    resumed = run(11, str(tmp_path / f"at-step={6 if limit else 5}.ckpt"))  # with a limit at an epoch's end
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
