"""Speed and memory of GenLoRA and our LoRA beside PEFT's LoRA and VeRA and the frozen base, interleaved in one run.

::

    python examples/quickstart/prepare.py           # once: fetches SmolLM2-135M
    python -m benchmarks.speed run all              # or: steps ranks tokens checkpointing accumulation memory counts …
    python -m benchmarks.speed report               # Markdown: each bar with its figure, and all tables

All arms adapt the same linears (all in the blocks) of copies that share one base's weights. In each round every arm
makes one step, in an order that rotates; ratios are of times of the same round. Each setting is written into the JSON
file when it is measured; the same command goes on where it was stopped. Keep the machine idle while it runs.

| experiment | what is varied |
|---|---|
| steps | both models, fp32 and bf16-mixed, ranks 16 and 64, 4 × 128 tokens |
| ranks | 8, 16, 64, 256 |
| size | GenLoRA of LoRA rank 2's and 8's size (rank 64, 32, 16) beside it; of rank 2's in blocks of a 1B's width |
| tokens | 128 to 1,024 in one sequence (to 512 for MiniLM), rank 16 |
| checkpointing | without and with gradient checkpointing, rank 16 |
| accumulation | 1 and 8 micro-batches of 1 × 128 tokens, rank 16; also generated once per optimizer step |
| memory | peak of a process of its own for each arm (SmolLM2; ranks 16 and 64; with checkpointing) |
| counts | operators, bytes kept for the backward, optimizer state, gradients; the same in every run |
| inference | forwards without autograd, and generation of 32 tokens: adapters on, merged |
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch

from benchmarks.quality.language import MODEL_VARIABLE
from genlora_lightning.text import text_table

from .counts import measure_counts
from .memory import ROOT, measure_memory, work
from .plan import EXPERIMENTS, FULL, QUICK, Cell
from .report import BARS_HEADER, bar_rows, markdown, table
from .results import Results
from .timing import Options, measure_inference, measure_steps

RESULTS = ROOT / "runs" / "benchmarks" / "speed.json"
QUICK_RESULTS = RESULTS.with_name("speed-quick.json")
_NUMBERS = {"rounds": 9, "warmup": 2, "repeats": 3}
_QUICK_NUMBERS = {"rounds": 2, "warmup": 1, "repeats": 1}


def measure(cell: Cell, options: Options) -> dict[str, object]:
    """What is measured in a cell, by arm."""
    if cell.kind == "step":
        return measure_steps(cell, options)
    if cell.kind == "memory":
        return measure_memory(cell, options)
    if cell.kind == "counts":
        return measure_counts(cell)
    return measure_inference(cell, options)


def run(cells: Sequence[Cell], results: Results, options: Options, *, fresh: bool) -> None:
    """Measure the cells that are missing, or all; print a table of each."""
    for number, cell in enumerate(cells, 1):
        place = f"[{number}/{len(cells)}] {cell.key}"
        if not fresh and results.has(cell, options):
            print(f"{place}: measured before", flush=True)
            continue
        start = time.perf_counter()
        arms = measure(cell, options)
        seconds = time.perf_counter() - start
        results.add(cell, options, arms, seconds)
        header, rows = table([cell], results)
        print(f"{place}, {seconds:.0f} s\n{text_table(header, rows, left=2)}\n", flush=True)


def _run_command(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads or torch.get_num_threads())
    if given.model:
        os.environ[MODEL_VARIABLE] = str(Path(given.model).resolve())
    usual = _QUICK_NUMBERS if given.quick else _NUMBERS
    numbers = {key: default if getattr(given, key) is None else getattr(given, key) for key, default in usual.items()}
    folder = os.environ.get(MODEL_VARIABLE)
    options = Options(**numbers, threads=torch.get_num_threads(), device=given.device, folder=folder)
    grid = QUICK if given.quick else FULL
    chosen = EXPERIMENTS if "all" in given.experiments else given.experiments
    cells = dict.fromkeys(cell for name in chosen for cell in grid.cells(name))
    results = Results(given.results or (QUICK_RESULTS if given.quick else RESULTS))
    run([*cells], results, options, fresh=given.fresh)
    print(text_table(BARS_HEADER, bar_rows(results)))
    print(f"\nResults are in {results.path}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="measure what is missing of some experiments")
    runs.add_argument("experiments", nargs="+", choices=[*EXPERIMENTS, "all"], metavar="experiment")
    runs.add_argument("--model", help=f"folder of SmolLM2-135M (default: ${MODEL_VARIABLE}, or the quickstart's)")
    runs.add_argument("--rounds", type=int, help="rounds that count (default: 9)")
    runs.add_argument("--warmup", type=int, help="rounds before them (default: 2)")
    runs.add_argument("--repeats", type=int, help="processes for each figure of memory (default: 3)")
    runs.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    runs.add_argument("--device", default="cpu", help="torch's name of it (default: %(default)s)")
    runs.add_argument(
        "--quick", action="store_true", help="two tiny models of random weights, a round or two: to try it out"
    )
    runs.add_argument("--fresh", action="store_true", help="measure what is there, too")
    report = commands.add_parser("report", help="make a Markdown table from the results")
    report.add_argument("--markdown", type=Path, help="file to write (default: print)")
    for command in (runs, report):
        command.add_argument(
            "--results", type=Path, help=f"JSON file (default: {RESULTS}; quick: {QUICK_RESULTS.name})"
        )
    worker = commands.add_parser("worker")
    worker.add_argument("request", type=json.loads)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "worker":
            print(json.dumps(work(given.request)))
        elif given.command == "run":
            _run_command(given)
        else:
            text = markdown(Results(given.results or RESULTS))
            given.markdown.write_text(text) if given.markdown else print(text)
    except FileNotFoundError as error:  # of a model
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
