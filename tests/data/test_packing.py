"""Packed rows hold every example once, and training on them is training on the examples."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from genlora_lightning import CausalLMModule, InstructionDataModule
from genlora_lightning.data._packing import PackedCollator, PackedRows, pack
from tests.models import tiny_llama


def test_rows_hold_each_example_once_and_no_more_than_fits():
    draw = random.Random(0)
    lengths = [draw.randint(1, 64) for _ in range(500)]
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(500))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 64
    assert len(rows) <= 1.03 * sum(lengths) / 64  # best fit, the longest first, leaves little


@pytest.mark.parametrize("lengths", [[], [64], [64, 64], [1] * 65])
def test_rows_are_as_few_as_can_be_where_that_is_plain(lengths):
    assert len(pack(lengths, 64)) == -(-sum(lengths) // 64)


EXAMPLES = [
    {"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]},
    {"input_ids": [7, 8, 9], "labels": [7, 8, 9]},
    {"input_ids": [10, 11, 12, 13, 14], "labels": [-100, 11, -100, 13, 14]},
]


@pytest.fixture
def module():
    model = tiny_llama().eval()
    module = CausalLMModule("unused")
    module.adapter_root = lambda: model
    module.model = model
    return module


def batch(rows: list[list[int]], multiple: int = 1) -> dict[str, torch.Tensor]:
    packed = PackedRows(EXAMPLES, rows)
    return PackedCollator(0, multiple)([packed[n] for n in range(len(rows))])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_losses_of_packed_rows_are_those_of_the_examples_alone(module, attention):
    module.model.config._attn_implementation = attention
    with torch.no_grad():
        together = batch([[0, 2], [1]], multiple=16)
        logits, labels = module.answer_logits(together)
        packed = module._summed_loss(logits, labels, together)
        alone = torch.zeros(())
        for number in range(3):
            one = batch([[number]])
            del one["position_ids"]
            logits, labels = module.answer_logits(one)
            alone += module._summed_loss(logits, labels, one)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_padding_is_marked_and_nothing_predicts_across_examples():
    made = batch([[0, 1], [2]], multiple=8)
    assert made["input_ids"].shape == (2, 8)
    assert made["attention_mask"].sum(1).tolist() == [7, 5]
    assert made["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert made["labels"][0].tolist() == [-100, -100, 5, 6, -100, 8, 9, -100]


def test_a_model_that_mixes_the_texts_of_a_row_is_refused(module):
    class Mixing(nn.Module):
        config = module.model.config

        def forward(self, input_ids, position_ids, use_cache):  # a recurrence knows no positions
            states = nn.functional.one_hot(input_ids, 64).float().cumsum(1)
            return type("Output", (), {"logits": states})()

    module.adapter_root = Mixing
    with pytest.raises(
        ValueError, match=r"This Mixing, with its attention, does not keep the texts of a packed row apart"
    ):
        module.answer_logits(batch([[0, 1]]))


def test_packed_batches_of_the_data_module_hold_what_plain_ones_do(tokenizer, write, caplog):
    rows = [{"prompt": f"q{n} " * (1 + n % 5), "completion": "a" * (1 + n % 7)} for n in range(30)]
    file = write("train.jsonl", rows)

    def answers(**options) -> tuple[list[int], int]:
        data = InstructionDataModule(tokenizer, file, max_length=256, batch_size=4, **options)
        data.setup("fit")
        batches = list(data.train_dataloader())
        found = sorted(int(t) for b in batches for t in b["labels"].flatten() if t != -100)
        return found, sum(b["input_ids"].numel() for b in batches)

    plain, packed = answers(), answers(packing=True)
    assert packed[0] == plain[0]
    assert packed[1] < plain[1]
    with pytest.raises(ValueError, match="packing and group_by_length exclude each other"):
        InstructionDataModule(tokenizer, file, packing=True, group_by_length=True)
