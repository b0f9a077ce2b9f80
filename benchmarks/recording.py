"""Measure what it costs that a run keeps its log, environment, spectra and answers, and ends with a report.

Runs of ``genlora fit`` with all of it and without any, by turns in one process: the ratio of their CPU times, which
other work on the machine disturbs less than it does clocks, and of the run with all of it the seconds of each part and
its share of them. The parts alone need no second run (``--pairs 0``).

    python benchmarks/recording.py --config my.yaml --steps 100 --pairs 3
    OMP_NUM_THREADS=1 python benchmarks/recording.py --config genlora:quickstart --steps 55 --pairs 0
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from genlora_lightning.cli import train
from genlora_lightning.cli.log import LogFile
from genlora_lightning.training.record import RunRecord
from genlora_lightning.training.samples import AnswerSamples
from genlora_lightning.training.spectra import UpdateSpectra

KINDS = (LogFile, RunRecord, UpdateSpectra, AnswerSamples)
HOOKS = ("setup", "on_train_start", "on_train_batch_end", "on_validation_end", "on_train_end", "on_fit_end")
OFF = ["--spectra", "false", "--samples", "0", "--report", "false", "--log_level", "error"]


def main() -> None:
    """Measure, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a configuration of `genlora fit`")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument(
        "--pairs", type=int, default=3, help="runs of each kind (default: %(default)s); 0: only with all"
    )
    parser.add_argument("more", nargs="*", help="more arguments of `genlora fit`, after `--`")
    options = parser.parse_args()
    length = ["--trainer.max_steps", str(options.steps), "--trainer.max_epochs", "-1"]
    given = ["--config", options.config, *length, *options.more]
    ratios, parts = [], []
    with tempfile.TemporaryDirectory() as folder:
        fit([*given, "--trainer.max_steps", "1", *OFF], folder)  # imports, and files that are read for the first time
        for _ in range(max(1, options.pairs)):
            with measured_parts() as spent:
                with_all = fit(given, folder)
            if options.pairs:
                ratios.append(with_all / fit([*given, *OFF], folder))
            parts.append({**spent, "run": with_all})
    shares = [{name: seconds / of["run"] for name, seconds in of.items() if name != "run"} for of in parts]
    result = {"cpu_seconds": parts, "shares": [{**one, "all": sum(one.values())} for one in shares]}
    if ratios:
        result = {"cpu_time_ratios": ratios, "median": statistics.median(ratios), **result}
    print(json.dumps(result, indent=2))


def fit(arguments: list[str], folder: str) -> float:
    """CPU seconds of one run."""
    begun = time.process_time()
    train.main(["fit", *arguments, "--trainer.default_root_dir", folder])
    return time.process_time() - begun


@contextmanager
def measured_parts() -> Iterator[dict[str, float]]:
    """Context manager that adds up the CPU seconds of each part."""
    spent: dict[str, float] = defaultdict(float)

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return original(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - begun

        return call

    patches = [
        mock.patch.object(train, "write_report", counted("report", train.write_report)),
        mock.patch.object(logging.FileHandler, "emit", counted(LogFile.__name__, logging.FileHandler.emit)),
    ]
    hooks = [(kind, hook) for kind in KINDS for hook in HOOKS if hook in vars(kind)]
    patches += [mock.patch.object(kind, hook, counted(kind.__name__, getattr(kind, hook))) for kind, hook in hooks]
    for patch in patches:
        patch.start()
    try:
        yield spent
    finally:
        for patch in patches:
            patch.stop()


if __name__ == "__main__":
    main()
