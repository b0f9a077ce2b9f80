"""The files that start several nodes, run for real: two nodes on this machine, one process each, a faked SLURM."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from genlora_lightning.artifacts.inspection import verify_adapter
from tests.cli.test_train import ROOT, models  # noqa: F401  (`models` is a fixture)
from tests.distributed.test_auto_resume import run_of

FOLDER = ROOT / "examples" / "multi_node"
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")

# srun starts its command once on each node, and fails if one of them does.
FAKES = {
    "scontrol": "#!/bin/sh\necho 127.0.0.1\necho 127.0.0.1\n",
    "srun": '#!/bin/bash\nshift\n"$@" & first=$!\n"$@" & second=$!\nwait $first && wait $second\n',
}


def free_job_id() -> int:
    """A job's number whose port, as the script computes it, is free."""
    for number in range(4000, 20000, 37):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + number % 20000)) != 0:
                return number
    raise RuntimeError("no port is free")


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sbatch"])
def test_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", str(FOLDER / script)], check=True)


def test_torchrun_script_asks_for_the_place_to_meet():
    environment = {key: value for key, value in os.environ.items() if key != "MASTER"}
    done = subprocess.run([FOLDER / "torchrun.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MASTER: host:port of one of the nodes" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_slurm_job_of_two_nodes_trains_one_adapter(models: Path, tmp_path: Path) -> None:  # noqa: F811
    config = run_of(tmp_path / "run", models, killed=False)
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text(yaml.safe_dump({"trainer": {"devices": 1, "num_nodes": 2}}))
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = free_job_id()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_NTASKS": "2",  # of which torchrun's own variables must win
        "SLURM_JOB_NAME": "genlora",
    }
    command = ["bash", FOLDER / "slurm.sbatch", "--config", config, "--config", nodes]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank: 1, MEMBER: 2/2" in (done.stdout + done.stderr).replace("GLOBAL_RANK", "rank")
    assert (tmp_path / "run" / "starts").read_text().split() == ["0"]  # one rank 0, not two runs
    verify_adapter(tmp_path / "run" / "adapter")
