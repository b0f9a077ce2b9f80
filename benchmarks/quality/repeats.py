"""Repeated text: what of the data to test and validate stands in the training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SEQUENCE = 12  # tokens in a row that tell repeated text from new one


def repeated(parts: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[bool]]:
    """Tell of all texts but those to train whether more than a tenth of their sequences of tokens stand in training.

    Documents are in one split as a whole, but manual pages share their options and their ends, files their parts, and
    messages of a program differ by a word.
    """
    known = {sequence for tokens in parts["train"] for sequence in _sequences(tokens)}

    def is_known(tokens: Sequence[int]) -> bool:
        found = [sequence in known for sequence in _sequences(tokens)]
        return sum(found) > len(found) / 10

    return {split: [is_known(tokens) for tokens in found] for split, found in parts.items() if split != "train"}


def _sequences(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[at : at + SEQUENCE]) for at in range(len(tokens) - SEQUENCE + 1)]
