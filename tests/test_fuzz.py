"""A small sample of what ``python -m tests.fuzz`` runs, and what it has found."""

from __future__ import annotations

import pytest

from tests.fuzz import HOSTILE, SHARES, TARGETS, fault_of

SAMPLE = 8


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_input_is_read_or_refused_in_words_of_ours(target: str) -> None:
    faults = [fault_of(target, seed) for seed in range(SAMPLE * SHARES[target])]
    assert [fault for fault in faults if fault is not None] == []


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: object, rng: object) -> object:
        yield lambda: {}["x"]

    monkeypatch.setitem(TARGETS, "broken", broken)
    assert "KeyError: 'x'" in str(fault_of("broken", 0))
    assert HOSTILE
