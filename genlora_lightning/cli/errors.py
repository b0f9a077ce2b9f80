"""Turn an error into the one line that a user of the command line reads."""

from __future__ import annotations

import inspect
import linecache
import re
import sys
import traceback
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

_PACKAGE = __name__.partition(".")[0]
_SETTING_UP = (
    "lightning.fabric.strategies.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.strategies.",
    "lightning.pytorch.trainer.connectors.",
)
_NOISE = "Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"


def find_user_error(error: BaseException) -> BaseException | None:
    """Find the error that was raised on purpose, to tell the user something; ``None`` if there is none.

    An error is meant for the user if a ``raise`` statement of this package raised it (an error that comes out of an
    expression, and a failed assertion, are faults of the program), if the operating system refused something that this
    package asked for, or if it is Lightning's complaint about its settings. The parser packs errors of the classes it
    instantiates into errors of its own; these are unpacked. What Lightning raises where it sets a run up is meant for
    the user, too: a package that a logger needs, sizes that do not fit the devices.
    """
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, MisconfigurationException):
            return current
        module, is_raise_statement = _origin(current)
        if is_raise_statement and module.startswith(_SETTING_UP):
            return current
        if module.partition(".")[0] == _PACKAGE and not isinstance(current, AssertionError):
            return current if is_raise_statement or isinstance(current, OSError) else None
        current = current.__cause__ if module.partition(".")[0] == "jsonargparse" else None
    return None


def one_line(message: str, short_names: list[str], options: list[str]) -> str:
    """A parser's nested message as one line: without what only its author can use, with what was probably meant.

    Args:
        message: The parser's message.
        short_names: Classes that need no import path.
        options: The parser's options, without the leading dashes.
    """
    parts: list[str] = []
    for line in message.splitlines():
        part = line.strip(" -")
        unknown = re.fullmatch(r"Expected a dot import path string: (\S+)", part)
        if unknown:
            known = ", ".join(short_names)
            part = f"no class is known as {unknown[1]!r}; give an import path (package.module.Class) or one of {known}"
        if part and not re.match(_NOISE, part) and part not in parts:
            parts.append(part)
    text = " ".join(parts).rstrip(".")
    if re.search(r"arguments are required: \w+\.model$", text):
        return "there is no model: give --config FILE, which `genlora init` writes for your data."
    meant = _probably_meant(text, options)
    return f"{text}; did you mean {meant!r}?" if meant else f"{text}."


def leave(message: str, code: int, cause: BaseException | None = None) -> NoReturn:
    """End the program with a message on standard error, which names the process where there are several.

    Raises:
        SystemExit: Always.
    """
    rank = getattr(rank_zero_only, "rank", 0)
    print(f"[rank {rank}] {message}" if rank else message, file=sys.stderr, flush=True)
    raise SystemExit(code) from cause


def _origin(error: BaseException) -> tuple[str, bool]:
    """The module in which an error came up, and whether it did in a line that begins with ``raise``."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return "", False
    frame, number = frames[-1]
    line = linecache.getline(frame.f_code.co_filename, number, frame.f_globals)
    return str(frame.f_globals.get("__name__", "")), line.lstrip().startswith("raise ")


def _probably_meant(text: str, options: list[str]) -> str | None:
    of_class = re.search(r"class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text)
    if of_class:
        module, _, name = of_class[1].rpartition(".")
        known, given = list(inspect.signature(getattr(import_module(module), name)).parameters), of_class[2]
    else:
        of_parser = re.search(r"does not accept option '([\w.]+)'|unrecognized arguments: --([\w.]+)", text)
        if not of_parser:
            return None
        known, given = options, of_parser[1] or of_parser[2]
    section, _, last = given.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    return next((beside[name] for name in get_close_matches(last, beside, n=1)), None)
