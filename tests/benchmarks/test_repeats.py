"""Repeated text: found by sequences of tokens that training has."""

from __future__ import annotations

from benchmarks.quality.repeats import repeated


def test_repeated_is_text_of_which_training_has_more_than_a_tenth_of_the_sequences():
    new = [list(range(1000 * n, 1000 * n + 112)) for n in range(4)]  # 101 sequences of 12 tokens each
    train = [new[0], [*range(9000, 9050), *new[1][:21]]]  # of the second text ten sequences, …
    test = [new[0], new[1], new[2]]
    assert repeated({"train": train, "val": [new[3]], "test": test}) == {"val": [False], "test": [True, False, False]}
    train[1] += new[1][21:22]  # … then eleven
    assert repeated({"train": train, "test": test})["test"] == [True, True, False]


def test_text_of_fewer_tokens_than_a_sequence_counts_as_new():
    assert repeated({"train": [[1, 2, 3]], "test": [[1, 2, 3]]}) == {"test": [False]}
