"""Real processes on gloo, forked so that nothing has to be imported again, as a launcher would start them."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock


class RankError(AssertionError):
    """A rank failed or did not end in time."""


def on_ranks(function: Callable[[], Any], *, world_size: int = 2, seconds: float = 120.0) -> list[Any]:
    """Call a function in so many processes, whose environment is torchrun's; what it returns, by rank.

    Raises:
        RankError: A rank raised (the message is its traceback), or they took longer; they are killed then.
    """
    # The ranks of tests in two workers of pytest-xdist would starve each other.
    lock = FileLock(Path(tempfile.gettempdir()) / f"ranks-of-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}")
    with tempfile.TemporaryDirectory() as folder, lock:
        port = free_port()
        children = [fork_rank(function, rank, world_size, port, Path(folder)) for rank in range(world_size)]
        try:
            problem = _wait(children, Path(folder), time.monotonic() + seconds)
        finally:
            for child in children:
                _kill(child)
        if problem:
            raise RankError(problem)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fork_rank(function: Callable[[], Any], rank: int, world_size: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",
        }
        torch.save(function(), folder / f"{rank}.partial")
        os.replace(folder / f"{rank}.partial", folder / f"{rank}.pt")
        code = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _wait(children: list[int], folder: Path, end: float) -> str:
    waiting = dict(enumerate(children))
    while waiting:
        for rank, child in list(waiting.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                continue
            del waiting[rank]
            children.remove(child)
            if status:
                time.sleep(0.3)  # the others' errors, which may be the cause
                errors = [f"rank {path.stem}: {path.read_text()}" for path in sorted(folder.glob("*.error"))]
                return "\n".join(errors) or f"rank {rank} ended with status {status}"
        if time.monotonic() > end:
            return f"ranks {sorted(waiting)} did not end in time"
        time.sleep(0.02)
    return ""


def _kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
