"""How good: the quality benchmark's texts and questions for SmolLM2-135M, several runs at a time on one card.

Any prefix of the order is useful: first LoRA and GenLoRA once at the rate that short runs suggest, then at twice and
half that rate, and beyond, as long as the best one is the last on its side; then more seeds at the rate with the lowest
validation loss; then other forms, then other methods.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.quality.arms import (
    GENLORAS,
    LEADERS,
    OTHERS,
    RELATIVES,
    SHARED_DIRECTION,
    Arm,
    groups_only,
    lora,
)
from benchmarks.quality.experiments import CAPACITY_TASKS
from benchmarks.quality.methods import Shapes, linear_shapes
from benchmarks.quality.rows import Row, append_row, read_rows
from benchmarks.quality.runs import Spec, execute, get_task, start_worker

EXPERIMENT = "quality"  # the CSV file's name
TASKS = CAPACITY_TASKS
SEEDS = (0, 1, 2)
FACTORS = (1.0, 2.0, 0.5)  # on an arm's rate, with the first seed; then beyond, while the best is the last on its side
# What the claim is about, then what else could be better, then other methods, each at a rate that shorter runs suggest.
CORE = (
    lora(2, 4e-3),
    replace(GENLORAS[2], lr=4e-3),
    lora(32, 1e-3),
    lora(1, 4e-3),
    lora(8, 2e-3),
    replace(GENLORAS[1], lr=4e-3),  # the defaults
)
FORMS = (
    *(replace(arm, lr=4e-3) for arm in SHARED_DIRECTION),
    replace(groups_only("the paper's form", 8, (1, 2)), lr=2e-3),  # no signs, R 16, 8 groups of A and of B
    replace(GENLORAS[0], lr=4e-3),
    replace(GENLORAS[3], lr=4e-3),
    lora(64, 5e-4),
)
METHODS = (
    *(replace(arm, lr=2 * arm.lr) for arm in OTHERS if arm.method in ("vera", "randlora", "lokr")),
    *RELATIVES,
    *LEADERS,
)


@dataclass(frozen=True)
class Size:
    """How much is run.

    Args:
        steps: Of a run.
        workers: Processes beside each other.
        arms: Which, in groups: the runs of one are all made before those of the next.
        tasks: Which.
        seeds: The first tries the rates, the others take its best.
        furthest: How far from an arm's rate others are tried, as a factor up or down.
    """

    steps: int
    workers: int
    arms: tuple[tuple[Arm, ...], ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    furthest: float


FULL = Size(400, 12, (CORE, FORMS, METHODS), TASKS, SEEDS, 8.0)
TINY = Size(3, 1, ((CORE[0],), (FORMS[2],)), TASKS[:1], SEEDS[:2], 1.0)


def run(folder: Path, device: str, end: float, *, tiny: bool) -> bool:
    """Make the runs that are missing until the time is over; whether all were made."""
    size = TINY if tiny else FULL
    shapes = {task: linear_shapes(get_task(task).skeleton()) for task in size.tasks}
    groups = [
        [(arm.name, _spec(size, arm, task, shapes[task])) for arm in arms for task in size.tasks] for arms in size.arms
    ]
    started: dict[Future[dict[str, object]], tuple[str, Spec]] = {}
    skipped: set[str] = set()
    longest = 0.0
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(size.workers, mp_context=context, initializer=start_worker)
    try:
        while True:
            done = read_rows(folder)
            busy = {spec.key for _, spec in started.values()}
            for arm, spec in _order(groups, size, done, busy | skipped):
                if len(started) >= size.workers or time.time() + longest > end:
                    break
                started[pool.submit(execute, spec, EXPERIMENT, arm, device)] = (arm, spec)
            if not started:
                return next(_order(groups, size, done, set()), None) is None
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
    groups: list[list[tuple[str, Spec]]], size: Size, done: Mapping[str, Row], skip: set[str]
) -> Iterator[tuple[str, Spec]]:
    """The runs that are missing, the most worth knowing first."""
    wanted = []
    for cells in groups:
        tried = [(arm, tried_rates(spec, done, size.furthest)) for arm, spec in cells]
        for round_ in itertools.zip_longest(*(specs for _, (specs, _) in tried)):
            wanted += [(arm, spec) for (arm, _), spec in zip(tried, round_, strict=True) if spec is not None]
        for seed in size.seeds[1:]:
            wanted += [(arm, replace(best, seed=seed)) for arm, (_, best) in tried if best is not None]
    yield from ((arm, spec) for arm, spec in wanted if spec.key not in done and spec.key not in skip)


def tried_rates(spec: Spec, done: Mapping[str, Row], furthest: float) -> tuple[list[Spec], Spec | None]:
    """The first seed's runs, and the best of them when all are there and rates on both sides of it are worse."""
    factors = [*FACTORS]
    while True:
        tries = {factor: replace(spec, lr=spec.lr * factor) for factor in factors}
        if any(one.key not in done for one in tries.values()):
            return [*tries.values()], None
        best = min(factors, key=lambda factor: _loss(done[tries[factor].key]))
        if best == max(factors) and best < furthest:
            factors.append(2 * best)
        elif best == min(factors) and best > 1 / furthest:
            factors.append(best / 2)
        else:
            return [*tries.values()], tries[best]


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
