"""The command line on two processes: once under a real `torchrun`, and for each strategy with torchrun's variables."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genlora_lightning import load_adapter
from genlora_lightning.cli.train import main
from tests.cli.test_train import ROOT, config, models  # noqa: F401 - fixtures
from tests.models import tiny_llama
from tests.ranks import on_ranks

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]

STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "genlora_fsdp": "genlora_fsdp",
    "ModelParallelStrategy": {
        "class_path": "ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    },
}


def under_torchrun(arguments: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


def on_forked_ranks(arguments: list[str], folder: Path) -> None:
    """The same, by processes that need not import all libraries."""

    def run() -> None:
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(arguments)

    on_ranks(run)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", STRATEGIES)
def test_command_line_trains_on_two_processes_of_torchrun(config, tmp_path, name):  # noqa: F811
    overlay = tmp_path / "strategy.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"strategy": STRATEGIES[name], "devices": 2, "max_epochs": 2}}))
    arguments = ["fit", "--config", str(config), "--config", str(overlay)]
    arguments += ["--adapter_dir", str(tmp_path / "adapter"), "--trainer.num_sanity_val_steps", "1"]
    start = under_torchrun if name == "ddp" else on_forked_ranks
    start(arguments, tmp_path)
    (checkpoint,) = Path(tmp_path / "out").rglob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert all(".update." in key for key in content["state_dict"])
    model = tiny_llama()
    load_adapter(model, tmp_path / "adapter")
    assert any(p.abs().max() > 0 for key, p in model.named_parameters() if key.endswith("update.B.latent"))
