"""The quality benchmark's commands: `run` makes what is missing of an experiment, `report` tables and pictures."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

# Before torch is imported, here and in the workers: one thread per run, several runs at a time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from .experiments import EXPERIMENTS, Experiment
from .planned import Planned, narrowed, pending, total_runs
from .rows import RESULTS, append_row, read_rows
from .runs import execute, start_worker


def run_all(name: str, experiment: Experiment, folder: Path, workers: int, most: int | None = None) -> int:
    """Make the runs that are missing; returns how many failed with an error.

    Each finished run is a row at once, so that nothing is lost when this is stopped; the next call goes on from there.
    """
    failed: set[str] = set()
    running: dict[Future[dict[str, object]], Planned] = {}
    started = 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
        while True:
            done = read_rows(folder)
            under_way = {planned.spec.key for planned in running.values()}
            for planned in pending(experiment, done, {*under_way, *failed}):
                if len(running) >= workers or (most is not None and started >= most):
                    break
                running[pool.submit(execute, planned.spec, name, planned.arm)] = planned
                started += 1
            if not running:
                return len(failed)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                planned = running.pop(future)
                try:
                    row = future.result()
                except Exception:
                    failed.add(planned.spec.key)
                    say(
                        f"FAILED {planned.arm} on {planned.spec.task}, lr {planned.spec.lr:g}\n{traceback.format_exc()}"
                    )
                    continue
                append_row(name, row, folder)
                say(describe(row))


def describe(row: dict[str, object]) -> str:
    """A line about a finished run."""
    scores = []
    for split in ("val", "test"):
        if isinstance(loss := row[f"{split}_loss"], float):
            scores.append(f"{split} {loss:.4f} / {row[f'{split}_accuracy']:.4f}")
    rank = f"rank {row['entropy_rank']:.1f}" if isinstance(row["entropy_rank"], float) else ""
    return (
        f"{row['task']:8} {row['arm']:16} {row['adapter_parameters']:>9,}  {row['stage']:6} lr {row['lr']:<8.3g} "
        f"seed {row['seed']:<3} {row['status']}  {'  '.join(scores)}  {rank}  {row['seconds']:.0f} s"
    )


def say(text: str) -> None:
    """Print with the time, at once."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs of an experiment that are missing")
    run.add_argument("experiment", choices=sorted(EXPERIMENTS))
    run.add_argument("--workers", type=int, default=2, help="single-thread processes (default: 2)")
    run.add_argument("--tasks", nargs="*", default=[], help="only these tasks")
    run.add_argument("--methods", nargs="*", default=[], help="only these arms, by their names in the tables")
    run.add_argument("--most", type=int, help="stop after this many runs")
    run.add_argument("--plan", action="store_true", help="list what could start now, and run nothing")
    report = commands.add_parser("report", help="make the tables and pictures from the results")
    peft_form = commands.add_parser(
        "peft-form", help="write the final runs as PEFT's method comparison does, a JSON file each"
    )
    peft_form.add_argument("folder", type=Path, help="where to")
    for command in (run, report, peft_form):
        command.add_argument(
            "--results", type=Path, default=RESULTS, help="folder of the CSV files (default: %(default)s)"
        )
    given = parser.parse_args(arguments)
    if given.command == "report":
        from .report import write_report

        write_report(given.results)
        return 0
    if given.command == "peft-form":
        from .peft_form import write

        say(f"{write(read_rows(given.results).values(), given.folder)} files in {given.folder}")
        return 0
    try:
        experiment = narrowed(EXPERIMENTS[given.experiment], given.tasks, given.methods)
    except ValueError as error:
        parser.error(str(error))
    if given.plan:
        for planned in pending(experiment, read_rows(given.results)):
            spec = planned.spec
            print(
                f"{spec.task:8} {planned.arm:16} {spec.stage:6} lr {spec.lr:<8.3g} seed {spec.seed:<3} {spec.settings}"
            )
        return 0
    say(f"{given.experiment}: {total_runs(experiment)} runs in all, results in {given.results}")
    failed = run_all(given.experiment, experiment, given.results, given.workers, given.most)
    if failed:
        print(f"error: {failed} runs failed; their tracebacks are above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
