"""Log what a run has to say, once however many processes it has, under the names of the modules that say it."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

PACKAGE = __name__.partition(".")[0]
LIGHTNING = "lightning.pytorch"


class RankZeroLogger(logging.LoggerAdapter):  # type: ignore[type-arg]  # generic since 3.11 only
    """A logger that is silent on all ranks but the first.

    Where a program has set up no logging, neither handlers nor a level of ours, messages go where Lightning's own do,
    which sets up its logger by itself.
    """

    @override
    def isEnabledFor(self, level: int) -> bool:
        return getattr(rank_zero_only, "rank", 0) == 0 and self._receiver().isEnabledFor(level)

    @override
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if self.isEnabledFor(level):
            self._receiver().log(level, msg, *args, **kwargs)

    def _receiver(self) -> logging.Logger:
        own: logging.Logger = self.logger
        return own if _is_set_up(own) else logging.getLogger(LIGHTNING)


def rank_zero_logger(name: str) -> RankZeroLogger:
    """Make the logger of a module.

    Nothing is set up here: handlers and levels are the matter of programs, of which the command line is one
    (:mod:`genlora_lightning.cli.log`).

    Args:
        name: The module's ``__name__``.
    """
    return RankZeroLogger(logging.getLogger(name), {})


def _is_set_up(logger: logging.Logger) -> bool:
    """Whether somebody listens to a logger, or has said how much is to be heard of it."""
    found: logging.Logger | None = logger
    while found is not None:
        if any(not isinstance(handler, logging.NullHandler) for handler in found.handlers):
            return True
        if found.parent is not None and found.level != logging.NOTSET:  # the root has a level from the start
            return True
        found = found.parent if found.propagate else None
    return False
