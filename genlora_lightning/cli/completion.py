"""Print a script with which a shell completes the tool's commands, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
# Of the training commands, which have a parser of their own with hundreds of settings.
_TRAINING_OPTIONS = {
    "--config": "configuration file, or genlora:NAME",
    "--ckpt_path": "checkpoint to go on from, or to measure",
    "--print_config": "print all settings, and do nothing",
    "--help": "show all settings",
}


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def completion_script(tool: argparse.ArgumentParser, training: Iterable[str], shell: str) -> str:
    """Make the script for one shell.

    Args:
        tool: The parser of the whole tool; options are added to its training commands.
        training: Their names.
        shell: One of :data:`SHELLS`.

    Raises:
        ModuleNotFoundError: shtab is not installed; the message says how to.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Completion needs shtab: pip install 'genlora-lightning[completion]', or pip install shtab."
        ) from error
    commands: dict[str, argparse.ArgumentParser] = next(a.choices for a in tool._actions if isinstance(a.choices, dict))
    for name in training:
        for option, what in _TRAINING_OPTIONS.items():
            flag: Any = {"action": "store_true"} if option in ("--print_config", "--help") else {}
            commands[name].add_argument(option, help=what, **flag)
    for command in commands.values():
        for action in command._actions:
            if action.nargs != 0 and action.type is None and not action.choices:  # it takes a word
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(tool, shell=shell)
    return script
