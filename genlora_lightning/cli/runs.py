"""Show what runs have come to: `genlora show`, `genlora runs`, and the report at the end of `genlora fit`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from genlora_lightning.text import text_table

# They import torch, which takes seconds: only the commands do.
if TYPE_CHECKING:
    from genlora_lightning.reports.runs import AdapterSizes, Run

REPORT_FILE = "report.html"


def add_show(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one that holds runs: then the newest")
    parser.add_argument("--html", metavar="FILE", help=f"where to write the report (default: {REPORT_FILE} in RUN)")


def run_show(options: argparse.Namespace) -> None:
    """Print a run, and write its report.

    Raises:
        OSError: There is no such folder, or the report cannot be written.
        ValueError: There is no run.
    """
    from genlora_lightning.reports.runs import find_run
    from genlora_lightning.reports.words import facts_of, metric_rows
    from genlora_lightning.storage.paths import local_path

    run = find_run(local_path(options.run, "run"))
    sizes, notes = _sizes_of(run)
    lines = {str(run.folder): "", **facts_of(run, sizes)}
    width = max(len(name) for name in list(lines)[1:])
    print("\n".join(f"{name:{width}}  {text}".rstrip() for name, text in lines.items()))
    rows = metric_rows(run)
    if rows:
        print("\n" + text_table(("figure", "first", "last", "lowest (step)", "highest (step)"), rows))
    for note in (*run.notes, *notes):
        print(f"Note: {note}")
    print(f"\nReport: {_write_run(run, sizes, options.html)}")


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("folder", metavar="FOLDER", nargs="?", default="runs", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="also write a report with the curves of all of them")


def run_runs(options: argparse.Namespace) -> None:
    """Print a table of the runs below a folder.

    Raises:
        OSError: There is no such folder, or the report cannot be written.
    """
    from genlora_lightning.reports.page import runs_page
    from genlora_lightning.reports.runs import find_runs
    from genlora_lightning.reports.words import RUN_COLUMNS, run_cells
    from genlora_lightning.storage.paths import local_path

    runs = find_runs(local_path(options.folder, "folder of runs"))
    if options.json:
        print(json.dumps([run.to_dict() for run in runs], indent=2))
    elif not runs:
        print(f"No runs below {options.folder}.")
    else:
        print(text_table(RUN_COLUMNS, [run_cells(run) for run in runs]))
    if options.html:
        written = _write(runs_page(runs, f"Runs below {options.folder}"), Path(options.html))
        if not options.json:
            print(f"\nReport: {written}")


def write_report(folder: str | Path) -> Path:
    """Write the report of one run into its folder.

    Raises:
        OSError: There is no such folder, or it cannot be written to.
        ValueError: It holds no run.
    """
    from genlora_lightning.reports.runs import find_run

    run = find_run(Path(folder))
    return _write_run(run, _sizes_of(run)[0], None)


def _sizes_of(run: Run) -> tuple[AdapterSizes | None, list[str]]:
    from genlora_lightning.reports.runs import adapter_sizes

    if run.adapter is None:
        return None, []
    try:
        return adapter_sizes(run.adapter), []
    except (ValueError, OSError) as error:  # damaged: the rest of the run is worth seeing all the same
        return None, [str(error)]


def _write_run(run: Run, sizes: AdapterSizes | None, file: str | None) -> Path:
    from genlora_lightning.reports.page import run_page

    return _write(run_page(run, sizes), Path(file) if file else run.folder / REPORT_FILE)


def _write(page: str, file: Path) -> Path:
    from genlora_lightning.storage.atomic import atomic_file

    with atomic_file(file) as out:
        out.write(page.encode())
    return file
