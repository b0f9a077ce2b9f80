"""Two gloo ranks, forked, so that nothing has to be imported again; a rank that hangs fails the test."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_two_ranks(work: Callable[[int], Any], folder: Path, *, elastic: bool = False, seconds: float = 90) -> list[Any]:
    """Do ``work(rank)`` on both ranks; what each returns (tensors and plain values).

    Args:
        work: What to do, in a process group.
        folder: For the ranks to meet in.
        elastic: Leave it to the work to make the process group, from torchrun's variables, as a Trainer does.
        seconds: How long it may take.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = partial(_run_elastic, port=port) if elastic else _run
    context = mp.start_processes(run, (work, str(folder)), nprocs=2, join=False, start_method="fork")
    end = time.monotonic() + seconds
    while not context.join(timeout=5, grace_period=5):  # it returns when the first one ends
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise AssertionError("the ranks hang")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


def _run(rank: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.save(work(rank), os.path.join(folder, f"rank{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _run_elastic(rank: int, work: Callable[[int], Any], folder: str, port: int) -> None:
    torch.set_num_threads(1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.save(work(rank), os.path.join(folder, f"rank{rank}.pt"))
