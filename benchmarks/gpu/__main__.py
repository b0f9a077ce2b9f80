"""One command that proves the library on a GPU: that it is right, how fast it is, and how good in long runs.

::

    python -m benchmarks.gpu run --seconds 420      # three stages, each within a limit of its own
    python -m benchmarks.gpu report                 # REPORT.md and docs/images/gpu-*.png, from the rows alone
    python -m benchmarks.gpu pack                   # what a machine without a network needs, and what to type there
    python -m benchmarks.gpu unpack FOLDER …        # there

Each measurement is a row at once. The same command goes on where it was stopped; `--tiny` tries all of it on a CPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "gpu.jsonl"
ASSETS = ROOT / "data" / "gpu"
STAGES = {"right": 60.0, "fast": 180.0, "good": float("inf")}  # seconds at most; what is left over goes to the last


def run(given: argparse.Namespace) -> int:
    """Run the stages, each in a process of its own that ends with its time; the number of those with gaps."""
    end = time.time() + given.seconds
    stages = [stage for stage in STAGES if not given.only or stage in given.only]
    gaps = []
    for stage in stages:
        limit = end - time.time()
        if stage != stages[-1] and not given.tiny:  # that is for processors of any speed
            limit = min(limit, STAGES[stage])
        started = time.time()
        code = _in_process(stage, given, limit)
        print(f"{stage}: {'complete' if code == 0 else 'with gaps'} after {time.time() - started:.0f} s", flush=True)
        gaps += [stage] if code else []
    print(f"Rows are in {given.results}." + (f" Gaps in {', '.join(gaps)}: run it again." if gaps else ""), flush=True)
    return len(gaps)


def _in_process(stage: str, given: argparse.Namespace, limit: float) -> int:
    command = [sys.executable, "-m", "benchmarks.gpu", "stage", stage, "--end", str(time.time() + limit)]
    command += ["--device", given.device, "--results", str(given.results), "--assets", str(given.assets)]
    command += ["--tiny"] if given.tiny else []
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return process.wait(timeout=max(1.0, limit))
    except subprocess.TimeoutExpired:
        return 1
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            process.wait()


def stage(given: argparse.Namespace) -> int:
    """Measure what is missing of one stage."""
    import torch

    from benchmarks.quality.runs import end_with_parent

    from . import assets, fast, good, right
    from .rows import Rows

    end_with_parent()
    if given.tiny:
        torch.set_num_threads(1)
    if given.tiny and given.stage == "good":
        assets.make_tiny(given.assets)
    assets.use(given.assets)
    # A measurement that begins must have a chance to end.
    rows = Rows(given.results, given.device, end=given.end - 3)
    if given.stage == "right":
        return 0 if right.run(rows, tiny=given.tiny) else 1
    if given.stage == "fast":
        return 0 if fast.run(rows, tiny=given.tiny) else 1
    return 0 if good.run(given.results.parent, given.device, given.end - 3, tiny=given.tiny) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure what is missing")
    runs.add_argument("--seconds", type=float, default=420.0, help="for all stages (default: %(default)g)")
    runs.add_argument("--only", nargs="+", choices=[*STAGES], default=[], help="these stages")
    one = commands.add_parser("stage")
    one.add_argument("stage", choices=[*STAGES])
    one.add_argument("--end", type=float, required=True)
    for command in (runs, one):
        command.add_argument("--device", help="torch's name of it (default: cuda; with --tiny: cpu)")
        command.add_argument("--tiny", action="store_true", help="all in small, to try it out")
        command.add_argument("--assets", type=Path, help=f"folder that was unpacked to (default: {ASSETS})")
    report = commands.add_parser("report", help="make tables and pictures from the rows")
    for command in (runs, one, report):
        text = "file of rows (default: %(default)s); those on quality go into quality.csv beside it"
        command.add_argument("--results", type=Path, default=RESULTS, help=text)
    report.add_argument("--markdown", type=Path, default=Path(__file__).with_name("REPORT.md"), help="file to write")
    report.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    pack = commands.add_parser("pack", help="gather what a machine without a network lacks")
    pack.add_argument("--to", type=Path, default=ROOT / ".gpu-pack", help="folder (default: %(default)s)")
    pack.add_argument("--have", type=Path, help="names of the packages there (default: installed.txt)")
    unpack = commands.add_parser("unpack", help="put what was carried where `run` finds it")
    unpack.add_argument("parts", nargs="+", type=Path, help="folders of the pack")
    unpack.add_argument("--to", type=Path, default=ASSETS, help="folder (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    given = _parser().parse_args(arguments)
    if given.command in ("run", "stage"):
        given.device = given.device or ("cpu" if given.tiny else "cuda")
        given.results = given.results.resolve()
        given.assets = (given.assets or (given.results.parent / "tiny" if given.tiny else ASSETS)).resolve()
    if given.command == "run":
        return min(1, run(given))
    if given.command == "stage":
        return stage(given)
    if given.command == "report":
        from .report import write_report

        write_report(given.results, given.markdown, given.images)
    elif given.command == "pack":
        from .pack import pack

        pack(given.to, given.have)
    else:
        from .pack import unpack

        unpack(given.parts, given.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
