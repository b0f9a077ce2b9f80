"""Find the configurations that come with the package: `genlora:llama-8b` for `llama-8b.yaml`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "configs"
PREFIX = "genlora:"


def config_names() -> list[str]:
    """List the names, without the prefix."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def config_path(name: str) -> Path:
    """Find a configuration by its name, with or without the prefix.

    Raises:
        ValueError: There is none of that name; the message lists those that are.
    """
    wanted = name.removeprefix(PREFIX).removesuffix(".yaml")
    if wanted not in config_names():
        known = ", ".join(PREFIX + one for one in config_names())
        raise ValueError(f"There is no configuration {name!r} in the package. It has {known}.")
    return FOLDER / f"{wanted}.yaml"


def with_paths(arguments: Iterable[str]) -> list[str]:
    """Put paths in the place of names, where an argument or what follows its `=` begins with the prefix."""
    found = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        found.append(f"{option}{equals}{config_path(value)}" if value.startswith(PREFIX) else argument)
    return found
