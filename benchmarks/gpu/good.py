"""How good: the quality benchmark's questions for SmolLM2-135M in long runs, several at a time on one card.

Any prefix of the order is useful: first each arm once at the rate that short runs suggest, then half and twice that
rate, then more seeds at the rate with the lowest validation loss.
"""

from __future__ import annotations

import math
import multiprocessing
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.quality.experiments import GENLORAS, Arm, groups_only, lora
from benchmarks.quality.methods import Shapes, linear_shapes
from benchmarks.quality.rows import Row, append_row, read_rows
from benchmarks.quality.runs import Spec, execute, get_task, start_worker

EXPERIMENT = "quality"  # the CSV file's name
TASKS = ("siqa", "asdiv")
SEEDS = (0, 1, 2)
FACTORS = (1.0, 0.5, 2.0)  # on an arm's rate, with the first seed
# Rates that runs of 100 steps on these tasks suggest (benchmarks/quality/results/llm.csv), halved for the longer run.
ARMS = (
    lora(1, 2e-3),
    replace(GENLORAS[0], lr=4e-3),
    lora(2, 2e-3),
    replace(GENLORAS[2], lr=4e-3),
    lora(4, 1e-3),
    replace(GENLORAS[3], lr=4e-3),
    replace(groups_only("the paper's form", 8, (1, 2)), lr=2e-3),  # no signs, R 16, 8 groups of A and of B
    lora(8, 1e-3),
    lora(16, 5e-4),
    lora(32, 5e-4),
    lora(64, 2.5e-4),
)


@dataclass(frozen=True)
class Size:
    """How much is run.

    Args:
        steps: Of a run.
        workers: Processes beside each other.
        arms: Which.
        tasks: Which.
        seeds: The first tries the rates, the others take its best.
    """

    steps: int
    workers: int
    arms: tuple[Arm, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]


FULL = Size(1000, 12, ARMS, TASKS, SEEDS)
TINY = Size(3, 1, (ARMS[0], ARMS[6]), TASKS[:1], SEEDS[:2])


def run(folder: Path, device: str, end: float, *, tiny: bool) -> bool:
    """Make the runs that are missing until the time is over; whether all were made."""
    size = TINY if tiny else FULL
    shapes = {task: linear_shapes(get_task(task).skeleton()) for task in size.tasks}
    cells = [(arm.name, _spec(size, arm, task, shapes[task])) for arm in size.arms for task in size.tasks]
    started: dict[Future[dict[str, object]], tuple[str, Spec]] = {}
    skipped: set[str] = set()
    longest = 0.0
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(size.workers, mp_context=context, initializer=start_worker)
    try:
        while True:
            done = read_rows(folder)
            busy = {spec.key for _, spec in started.values()}
            for arm, spec in _order(cells, size.seeds, done, busy | skipped):
                if len(started) >= size.workers or time.time() + longest > end:
                    break
                started[pool.submit(execute, spec, EXPERIMENT, arm, device)] = (arm, spec)
            if not started:
                return next(_order(cells, size.seeds, done, set()), None) is None
            for future in wait(started, timeout=max(0.0, end - time.time()), return_when=FIRST_COMPLETED).done:
                arm, spec = started.pop(future)
                try:
                    row = future.result()
                except Exception:
                    skipped.add(spec.key)
                    print(f"good: {arm}, {spec.task}: failed\n{traceback.format_exc()}", flush=True)
                    continue
                append_row(EXPERIMENT, row, folder)
                longest = max(longest, float(str(row["seconds"])))
                print(f"good: {arm}, {spec.task}, lr {spec.lr:g}, seed {spec.seed}: {row['seconds']:.0f} s", flush=True)
            if time.time() >= end:
                return False
    finally:
        if started:  # the time is over
            for process in [*(pool._processes or {}).values()]:
                process.kill()
        pool.shutdown(cancel_futures=True)


def _order(
    cells: list[tuple[str, Spec]], seeds: tuple[int, ...], done: dict[str, Row], skip: set[str]
) -> Iterator[tuple[str, Spec]]:
    """The runs that are missing, the most worth knowing first."""
    wanted = [(arm, replace(spec, lr=spec.lr * factor)) for factor in FACTORS for arm, spec in cells]
    for seed in seeds[1:]:
        for arm, spec in cells:
            tries = [replace(spec, lr=spec.lr * factor) for factor in FACTORS]
            if all(one.key in done for one in tries):
                wanted.append((arm, replace(min(tries, key=lambda one: _loss(done[one.key])), seed=seed)))
    yield from ((arm, spec) for arm, spec in wanted if spec.key not in done and spec.key not in skip)


def _spec(size: Size, arm: Arm, task: str, shapes: Shapes) -> Spec:
    return Spec(
        task=task,
        method=arm.method,
        settings=arm.settings(shapes),
        lr=arm.lr,
        seed=size.seeds[0],
        steps=size.steps,
        stage="final",
    )


def _loss(row: Row) -> float:
    return float(row["val_loss"]) if row["status"] == "ok" else math.inf
