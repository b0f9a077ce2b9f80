from __future__ import annotations

import pytest
import torch
from torch import distributed, nn

from genlora_lightning.distributed.collectives import outer_modules, reduce_gradients, transformer_blocks
from genlora_lightning.injection.inject import inject_adapters
from tests.conftest import small_config
from tests.models import tiny_bert, tiny_llama
from tests.ranks import on_ranks

needs_distributed = pytest.mark.skipif(
    not distributed.is_available(), reason="torch is built without torch.distributed"
)


@needs_distributed
def test_a_missing_gradient_counts_as_zeros_and_stays_missing_only_where_no_rank_has_one():
    def reduce() -> list[torch.Tensor | None]:
        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
        parameters[0].grad = torch.tensor([1.0, -3.0]) * (rank + 1)
        parameters[1].grad = torch.tensor([4.0, 0.0]) if rank == 1 else None
        parameters[2].grad = torch.tensor([-0.0, -0.0]) if rank == 0 else None  # a gradient, which happens to be zero
        reduce_gradients(parameters)
        distributed.destroy_process_group()
        return [parameter.grad for parameter in parameters]

    for first, second, third, fourth in on_ranks(reduce):
        assert first.tolist() == [1.5, -4.5]
        assert second.tolist() == [2.0, 0.0]
        assert third is not None
        assert third.tolist() == [0.0, 0.0]
        assert fourth is None


@pytest.mark.parametrize(("make", "blocks"), [(tiny_llama, "LlamaDecoderLayer"), (tiny_bert, "BertLayer")])
def test_blocks_are_the_members_of_the_lists_that_hold_adapters(make, blocks):
    model = make()
    inject_adapters(model, small_config())
    assert [type(block).__name__ for block in transformer_blocks(model)] == [blocks] * 2


def test_lists_within_blocks_are_parts_of_them_and_lists_without_adapters_are_none():
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    model.frozen = nn.ModuleList([nn.Conv1d(2, 2, 1)])
    inject_adapters(model, small_config())
    assert transformer_blocks(model) == [block]
    assert outer_modules(model) == [block, model.frozen[0]]
