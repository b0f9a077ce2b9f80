"""Ranks are killed at random moments of a run, which goes on with `ckpt_path: auto` and ends as an undisturbed one."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from genlora_lightning.artifacts.adapter_folder import WEIGHTS_FILE
from genlora_lightning.cli.train import main
from tests.cli.test_train import models  # noqa: F401  (a fixture)
from tests.distributed.test_auto_resume import run_of
from tests.ranks import fork_rank, free_port

# In all (a smaller KILLS, with a SEED each, does them in parts), and of one run at most.
KILLS, EACH = int(os.environ.get("KILLS", "60")), 6
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"class_path": "DDPStrategy", "init_args": {"process_group_backend": "gloo"}},
    "fsdp2": {
        "class_path": "ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
    },
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]


def start(config: Path, folder: Path) -> list[int]:
    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(["fit", "--config", str(config)])

    port = free_port()
    return [fork_rank(run, rank, 2, port, folder) for rank in range(2)]


def attempt(config: Path, kill_after: float | None, order: random.Random) -> bool:
    """Run until the end, or until a rank is killed, as torchrun then kills the other one; whether it ended."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        children = start(config, folder)
        end = time.monotonic() + (120 if kill_after is None else kill_after)
        waiting = set(children)
        while waiting and time.monotonic() < end:
            for child in [*waiting]:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    waiting.discard(child)
                    errors = "\n".join(path.read_text() for path in folder.glob("*.error"))
                    assert not status, errors
            time.sleep(0.01)
        if not waiting:
            return True
        assert kill_after is not None, "the run did not end in time"
        victims = [*waiting]
        order.shuffle(victims)
        for child in victims:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            time.sleep(order.uniform(0, 0.1))
        return False


def prepare(folder: Path, models: Path, strategy: str) -> Path:  # noqa: F811
    config = run_of(folder, models, killed=False)
    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["strategy"] = STRATEGIES[strategy]
    config.write_text(yaml.safe_dump(settings))
    return config


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_run_is_lost_however_its_ranks_are_killed(models, tmp_path, strategy):  # noqa: F811
    order = random.Random(strategy + os.environ.get("SEED", ""))
    before = time.monotonic()
    assert attempt(prepare(tmp_path / "whole", models, strategy), None, order)
    duration = time.monotonic() - before
    expected = load_file(tmp_path / "whole" / "adapter" / WEIGHTS_FILE)
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / f"run{runs}"
        config = prepare(folder, models, strategy)
        runs += 1
        ended = False
        for _ in range(EACH):
            ended = attempt(config, order.uniform(0, 1.1 * duration), order)
            if ended:
                break
            kills += 1
        assert ended or attempt(config, None, order)
        found = load_file(folder / "adapter" / WEIGHTS_FILE)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensor, found[name]), f"{name} after {kills} kills"
        # The rank that is left may have time to save what it has.
        left = {path.name for path in folder.iterdir() if "adapter" in path.name}
        assert left <= {"adapter", "adapter-interrupted"}
    print(f"{strategy}: {kills} kills in {runs} runs")
