"""Real processes that write, and are killed with SIGKILL: at a random time, or right before their n-th system call.

They are forked, so that nothing has to be imported again.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from genlora_lightning.storage import atomic

# What Python says (PEP 578) before it does it; `fsync` and the exchange of folders are added below.
STEPS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree", "shutil.copyfile"}


def kill_before_step(step: int, write: Callable[[], None]) -> bool:
    """Fork a process that does ``write()`` and kills itself before a step (from 0); whether it came that far."""
    child = os.fork()
    if child == 0:
        count = 0

        def advance() -> None:
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        real_fsync, real_exchange = os.fsync, atomic._exchange

        def fsync(descriptor: int) -> None:
            advance()
            real_fsync(descriptor)

        def exchange(first: object, second: object) -> bool:
            advance()
            return real_exchange(first, second)  # type: ignore[arg-type]

        try:
            os.fsync = fsync
            atomic._exchange = exchange  # type: ignore[assignment]
            sys.addaudithook(lambda event, arguments: advance() if event in STEPS else None)
            write()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the writer failed"
    return os.WIFSIGNALED(status)


def kill_after(seconds: float, write: Callable[[int], None], first: int) -> int:
    """Fork a process that does ``write(first)``, ``write(first + 1)``, … and kill it; the last number that was done.

    The time counts from the end of the first writing.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            number = first
            while True:
                write(number)
                os.write(writing, b"%d\n" % number)
                number += 1
        finally:
            os._exit(1)
    os.close(writing)
    try:
        select.select([reading], [], [], 60)
        time.sleep(seconds)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "the writer failed"
    finally:
        os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        return int(pipe.read().split()[-1])
