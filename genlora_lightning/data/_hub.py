"""Fetch the records of a data set on the Hugging Face Hub. Nothing that comes with it is executed."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from genlora_lightning.data._formats import Record, without_nulls
from genlora_lightning.errors import DataFileError

PREFIX = "hf://"
_NAME = re.compile(
    r"hf://(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?"
    r"(:(?P<config>[\w.-]+))??(:(?P<split>[\w.-]+(\[[^\[\]]*\])?))?"
)


class HubName(NamedTuple):
    """What ``hf://org/name@revision:config:split`` says; all but the name may be left out."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"


def parse_hub_name(path: str, argument: str) -> HubName:
    """Reads ``hf://org/name``, ``hf://org/name:split`` or ``hf://org/name:config:split``.

    ``@revision``, a branch, tag or commit, may follow the name; a split may be cut, as in ``train[:1000]``.

    Args:
        path: The name.
        argument: The argument it was given as, for the message.

    Raises:
        DataFileError: It is none of these.
    """
    match = _NAME.fullmatch(path)
    if match is None:
        forms = "hf://org/name, hf://org/name:split and hf://org/name:config:split, and @revision after the name"
        raise DataFileError(ascii(path), f"{argument} is no name of a data set on the Hub; allowed are {forms}")
    return HubName(match["name"], match["revision"], match["config"], match["split"] or "train")


def load_hub_dataset(path: str, argument: str, *, streaming: bool = False) -> Any:
    """Returns the `datasets.Dataset` of a name; what was fetched before comes from the cache of `datasets`.

    With `streaming` it is an `IterableDataset`, of which nothing is fetched but what is asked for. A local folder
    ``org/name`` goes before the Hub, as `datasets` has it.

    Raises:
        DataFileError: It cannot be fetched, for one because there is no network; in one line.
    """
    wanted = parse_hub_name(path, argument)
    datasets = import_datasets()
    options: dict[str, Any] = {}
    if "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters:
        options["trust_remote_code"] = False  # older versions would ask at the terminal
    try:
        with bars_on_terminals_only(datasets):
            return datasets.load_dataset(
                wanted.name, wanted.config, split=wanted.split, revision=wanted.revision, streaming=streaming, **options
            )
    except Exception as error:  # of several libraries, from the network to the reader of a file
        told = [str(one) for one in (error, error.__cause__) if one is not None]
        reason = " ".join(": ".join(told).split()) or type(error).__name__
        hint = "no network, no such name, configuration or split, or no access"
        raise DataFileError(path, f"{argument} cannot be loaded ({hint}): {reason:.400}") from error


def hub_records(path: str, argument: str) -> Iterator[Record]:
    """Yields the records of a data set by its name, as a table's: without the fields that are null."""
    rows = load_hub_dataset(path, argument).with_format("arrow")  # as they are: no picture or sound is decoded
    number = 0
    for table in rows.iter(1000):
        for fields in table.to_pylist():
            number += 1
            yield Record(f"{path}:record {number}", without_nulls(fields))


def stream_hub_records(path: str, argument: str) -> Iterator[Record]:
    """Yields the records of a data set by its name, fetched as they are asked for; else as `hub_records`."""
    table = load_hub_dataset(path, argument, streaming=True)
    for number, fields in enumerate(table, start=1):
        yield Record(f"{path}:record {number}", without_nulls(fields))


def import_datasets() -> Any:
    """Returns the module `datasets`, or raises an ImportError that says how to install it."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading data needs 'datasets': pip install 'genlora-lightning[data]'") from error
    return datasets


@contextmanager
def bars_on_terminals_only(datasets: Any) -> Iterator[None]:
    """Hides the bars of `datasets` where they would fill a log file."""
    hide = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
