"""Whose logger a message goes to, and from which rank."""

from __future__ import annotations

import logging

import pytest

import genlora_lightning
from genlora_lightning.callbacks.log import LIGHTNING, PACKAGE, rank_zero_logger


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.name} {record.levelname} {record.getMessage()}")


def nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that has set up no logging: pytest listens at the root, in each phase of a test anew."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def set_level(monkeypatch: pytest.MonkeyPatch, logger: logging.Logger, level: int) -> None:
    monkeypatch.setattr(logger, "level", level)
    logger.manager._clear_cache()  # type: ignore[attr-defined]  # as `setLevel` does


def heard_by(name: str) -> tuple[logging.Logger, Kept]:
    logger, kept = logging.getLogger(name), Kept()
    logger.addHandler(kept)
    return logger, kept


def test_where_nobody_set_up_logging_messages_go_where_lightnings_do(monkeypatch):
    nobody_listens(monkeypatch)
    lightning, kept = heard_by(LIGHTNING)
    set_level(monkeypatch, lightning, logging.INFO)
    try:
        rank_zero_logger(f"{PACKAGE}.part").info("said")
        rank_zero_logger(f"{PACKAGE}.part").debug("whispered")
    finally:
        lightning.removeHandler(kept)
    assert kept.messages == [f"{LIGHTNING} INFO said"]


def test_a_program_that_listens_gets_messages_by_module_and_level(monkeypatch):
    nobody_listens(monkeypatch)
    own, kept = heard_by(PACKAGE)
    lightning, theirs = heard_by(LIGHTNING)
    set_level(monkeypatch, own, logging.WARNING)
    try:
        log = rank_zero_logger(f"{PACKAGE}.part")
        log.info("said")
        log.warning("with %d %%", 3)
    finally:
        own.removeHandler(kept)
        lightning.removeHandler(theirs)
    assert kept.messages == [f"{PACKAGE}.part WARNING with 3 %"]
    assert theirs.messages == []


def test_a_level_alone_silences(monkeypatch):
    nobody_listens(monkeypatch)
    lightning, kept = heard_by(LIGHTNING)
    set_level(monkeypatch, logging.getLogger(PACKAGE), logging.ERROR)
    try:
        rank_zero_logger(f"{PACKAGE}.part").warning("said")
    finally:
        lightning.removeHandler(kept)
    assert kept.messages == []


def test_other_ranks_say_nothing(monkeypatch):
    own, kept = heard_by(PACKAGE)
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    try:
        rank_zero_logger(f"{PACKAGE}.part").error("said")
    finally:
        own.removeHandler(kept)
    assert kept.messages == []


def test_the_package_itself_adds_no_handler_that_is_heard():
    handlers = logging.getLogger(genlora_lightning.__name__).handlers
    assert [type(handler) for handler in handlers] == [logging.NullHandler]
