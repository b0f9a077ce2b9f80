"""Bring what a run says to the terminal, as text or as JSON lines, and to a file in the run's folder."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from genlora_lightning.callbacks.log import LIGHTNING, PACKAGE
from genlora_lightning.callbacks.progress import PROGRESS_LOG
from genlora_lightning.cli.errors import leave
from genlora_lightning.reports.record import LOG_FILE
from genlora_lightning.training.run_folder import recorded_folder

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[str, ...] = get_args(LogLevel)

_WARNINGS = "py.warnings"  # as in `logging.captureWarnings`
_OTHERS = (LIGHTNING, "lightning.fabric", "transformers")
_PRINTED = "printed"  # of records that reach the terminal in another way
_MOST_BEFORE = 10_000  # messages before there is a folder


class RunLogs:
    """What one command says, from its first message on; see :func:`run_logs`.

    Attributes:
        as_json: Whether each message is a line of JSON, on the terminal and in the file.
    """

    def __init__(self) -> None:
        self.as_json = False
        self._own = logging.getLogger(PACKAGE)
        self._warnings = logging.getLogger(_WARNINGS)
        self._others = [logging.getLogger(name) for name in _OTHERS]
        self._loggers = [self._own, self._warnings, *self._others]
        self._before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in self._loggers]
        self._terminal = _Terminal()
        self._file = MemoryHandler(_MOST_BEFORE, flushLevel=logging.CRITICAL + 1)
        self._open: logging.FileHandler | None = None
        self._begun = False

    def begin(self, log_format: LogFormat = "text", level: LogLevel = "info") -> None:
        """Say how messages look, and from which level on they are of interest."""
        self.as_json, self._begun = log_format == "json", True
        formatter = _JsonLines() if self.as_json else None
        self._terminal.setFormatter(formatter)
        for handler in (self._terminal, self._file):
            handler.setLevel(level.upper())
        self._own.setLevel(level.upper())
        self._own.addHandler(self._terminal)
        self._warnings.propagate = False
        for logger in self._loggers:
            logger.addHandler(self._file)
        for logger in self._others:
            logger.setLevel(max(logger.level, getattr(logging, level.upper())))
            if self.as_json:  # theirs would print text between the lines
                logger.handlers, logger.propagate = [self._terminal, self._file], False
        if self.as_json:
            self._warnings.addHandler(self._terminal)

    def write_to(self, file: Path) -> None:
        """Append to a file what was said so far, and what follows."""
        if self._open is not None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        self._open = logging.FileHandler(file, encoding="utf-8")
        self._open.setFormatter(_JsonLines() if self.as_json else _Lines())
        self._file.setTarget(self._open)
        self._file.flush()
        self._file.capacity = 1  # from now on nothing waits

    def end(self) -> None:
        """Leave logging as it was."""
        for logger, handlers, level, propagate in self._before:
            logger.handlers = handlers
            logger.setLevel(level)
            logger.propagate = propagate
        self._file.close()
        if self._open is not None:
            self._open.close()

    def leave(self, message: str, code: int, cause: BaseException | None = None) -> NoReturn:
        """End the program as :func:`~genlora_lightning.cli.errors.leave` does, with the message in the file, too.

        Raises:
            SystemExit: Always.
        """
        self._own.error("%s", message, extra={_PRINTED: not self.as_json})
        if self.as_json:
            raise SystemExit(code) from cause
        leave(message, code, cause)

    def failed(self, error: BaseException) -> None:
        """Write an error to the file that Python is going to print by itself."""
        self._own.error("%s", error, exc_info=error, extra={_PRINTED: not self.as_json})

    def show_warning(self, shown: Any, message: Warning | str, category: type[Warning], *where: Any) -> None:
        """Log a warning; as text Python shows it itself.

        Args:
            shown: What shows it otherwise.
            message: As of ``warnings.showwarning``; so are the others.
            category: Its class.
            where: File, line, and more.
        """
        if self._begun:
            text = " ".join(str(message).split())
            self._warnings.warning("%s", text, extra={"category": category.__name__})
        if not self.as_json:
            shown(message, category, *where)


@contextmanager
def run_logs() -> Iterator[RunLogs]:
    """Context manager in which warnings and messages can be written to a run's folder; leaves logging as it was."""
    logs = RunLogs()
    shown = warnings.showwarning
    try:
        # Warnings that are errors, or recorded by somebody, stay so: this comes after the filters.
        warnings.showwarning = lambda *warning: logs.show_warning(shown, *warning)
        yield logs
    finally:
        warnings.showwarning = shown
        logs.end()


class LogFile(Callback):
    """Opens the file of a command's messages in the run's folder, on the first rank.

    Args:
        logs: The command's.
    """

    def __init__(self, logs: RunLogs) -> None:
        self._logs = logs

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = recorded_folder(trainer)
        if folder is not None:
            self._logs.write_to(folder / LOG_FILE)


class _Terminal(logging.Handler):
    """Progress goes to standard output, the rest to standard error, whatever these are by then."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, _PRINTED, False):
            return
        stream = sys.stdout if record.name == PROGRESS_LOG else sys.stderr
        try:
            stream.write(f"{self.format(record)}\n")
            stream.flush()
        except (OSError, ValueError):  # closed by the one who read it
            self.handleError(record)


class _Lines(logging.Formatter):
    """Time, level, module and message, in one line or more."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{_time(record)} {record.levelname:7} {record.name.removeprefix(PACKAGE + '.')}: {text}"


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": super().format(record),
        }
        for name in ("category", "figures"):
            if hasattr(record, name):
                fields[name] = getattr(record, name)
        return json.dumps(_finite(fields), ensure_ascii=False)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinities: they become text."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
