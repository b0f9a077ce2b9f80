"""A rank is killed in a real torchrun run, which starts again and goes on from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from genlora_lightning.artifacts.adapter_folder import WEIGHTS_FILE
from tests.cli.test_train import ROOT, WORDS, models, write_config  # noqa: F401  (`models` is a fixture)

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]
STEPS, INTERVAL, KILLED_AFTER = 10, 3, 5


class KillRankOne(Callback):
    """Kills rank 1 after a step, once."""

    def __init__(self, mark: str, step: int) -> None:
        self.mark, self.step = Path(mark), step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class RecordSteps(Callback):
    """Writes down where each start of the run begins, on rank 0."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with self.file.open("a") as file:
                file.write(f"{trainer.global_step} ")


def run_of(folder: Path, models: Path, *, killed: bool) -> Path:  # noqa: F811
    """The configuration of a run of two epochs of 6 steps on two ranks, which ends after 10."""
    folder.mkdir()
    rows = [{"prompt": f"what is the {word} ?", "completion": word} for word in WORDS[:6] * 4]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    saver = {"every_n_train_steps": INTERVAL, "save_top_k": -1, "filename": "{step}"}
    kill = {"mark": str(folder / "killed"), "step": KILLED_AFTER}
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": saver},
        {"class_path": f"{__name__}.RecordSteps", "init_args": {"file": str(folder / "starts")}},
    ]
    if killed:
        callbacks.append({"class_path": f"{__name__}.KillRankOne", "init_args": kill})
    return write_config(
        folder / "run.yaml",
        ckpt_path="auto",
        adapter={"rank": 4, "num_groups_b": 2},
        adapter_dir=str(folder / "adapter"),
        model={
            "class_path": "CausalLMModule",
            "init_args": {"model": str(models / "llama"), "optimizer": {"lr": 0.01}},
        },
        data={
            "class_path": "InstructionDataModule",
            "init_args": {"train_file": str(folder / "data.jsonl"), "batch_size": 2},
        },
        trainer={
            "accelerator": "cpu",
            "devices": 2,
            "strategy": {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "gloo"}},
            "max_steps": STEPS,
            "default_root_dir": str(folder),
            "enable_model_summary": False,
            "callbacks": callbacks,
        },
    )


def torchrun(config: Path) -> str:
    elastic = ["--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", *elastic, "train.py", "fit", "--config", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_run_whose_rank_is_killed_restarts_from_the_last_checkpoint_and_ends_as_an_undisturbed_one(
    models,  # noqa: F811
    tmp_path,
):
    torchrun(run_of(tmp_path / "whole", models, killed=False))
    output = torchrun(run_of(tmp_path / "killed", models, killed=True))
    assert (tmp_path / "killed" / "killed").exists()
    last = KILLED_AFTER // INTERVAL * INTERVAL
    assert (tmp_path / "killed" / "starts").read_text().split() == ["0", str(last)]
    assert f"step={last}.ckpt" in output
    whole, killed = (load_file(tmp_path / name / "adapter" / WEIGHTS_FILE) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, killed[name]), name
