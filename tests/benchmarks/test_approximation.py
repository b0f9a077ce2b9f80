"""What families of updates can hold of another update: closed forms, and fits that reach them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.quality.approximation import Target, best_of_rank, fitted, root_of, second_moments, squares
from genlora_lightning import GenLoRAConfig, LoRAConfig
from genlora_lightning.adapters.base import MatrixShape


def target(n_out: int = 24, n_in: int = 16, seed: int = 0) -> Target:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, n_in, generator=draw) @ torch.randn(n_in, n_in, generator=draw)
    return Target(0.01 * torch.randn(n_out, n_in, generator=draw), root_of(x.T @ x / len(x)))


def left(one: Target, found: torch.Tensor) -> float:
    error, whole = squares(one, found)
    return error / whole


def test_moments_are_means_over_the_inputs_of_all_forwards():
    linear = nn.Linear(5, 3)
    batches = [torch.randn(2, 4, 5), torch.randn(3, 5)]
    found = second_moments({"a": linear}, [lambda batch=batch: linear(batch) for batch in batches])
    rows = torch.cat([batches[0].flatten(0, 1), batches[1]])
    torch.testing.assert_close(found["a"], rows.T @ rows / len(rows))
    linear(batches[0])  # the hooks are gone
    torch.testing.assert_close(found["a"], rows.T @ rows / len(rows))


def test_root_times_itself_is_the_moment_but_for_a_ridge():
    x = torch.randn(50, 6)
    moment = x.T @ x / 50
    root = root_of(moment)
    torch.testing.assert_close(root @ root, moment, atol=1e-3, rtol=1e-3)


def test_best_matrix_of_a_rank_leaves_the_singular_values_after_it():
    one = target()
    values = torch.linalg.svdvals(one.weighed).square()
    for rank in (1, 2, 8, 16):
        found = best_of_rank(one, rank)
        assert torch.linalg.matrix_rank(found) == rank
        assert left(one, found) == pytest.approx((values[rank:].sum() / values.sum()).item(), abs=1e-4)
    assert left(one, torch.zeros_like(one.delta)) == 1.0


def test_fit_of_a_lora_reaches_the_closed_form():
    one = target()
    update = LoRAConfig(rank=2).make(MatrixShape(24, 16), generator=torch.Generator().manual_seed(0))
    best = left(one, best_of_rank(one, 2))
    assert 0.3 < best < 0.9
    assert best - 1e-6 <= left(one, fitted(update, one, lr=3e-2)) < 1.01 * best


def test_fit_holds_all_of_what_the_family_has_itself():
    config = GenLoRAConfig(rank=4, num_latents_b=2, num_groups_b=2)
    shape = MatrixShape(24, 16)
    # Of signs and functions the seed decides, so that another update of the same layer's can become this one.
    update, other = (config.make(shape, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    one = target()
    found = fitted(update, one, lr=1e-2, steps=50)
    again = fitted(other, Target(found, one.root), lr=1e-2, steps=50)
    assert left(Target(found, one.root), again) < 0.2
