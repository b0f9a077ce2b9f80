"""Training data go on in the middle of an epoch where a checkpoint left them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from genlora_lightning import InstructionDataModule


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_order_goes_on_in_the_middle_of_an_epoch_and_in_the_next(
    write: Callable[..., str], tokenizer: Any, group_by_length: bool, num_workers: int
) -> None:
    rows = [{"prompt": f"{'one ' * (index % 7)}{index}", "completion": str(index)} for index in range(22)]
    file = write("train.jsonl", rows)

    def loader() -> Any:
        data = InstructionDataModule(
            tokenizer=tokenizer,
            train_file=file,
            batch_size=4,
            group_by_length=group_by_length,
            num_workers=num_workers,
        )
        data.setup("fit")
        return data.train_dataloader()

    def ids(batches: Any) -> list[Any]:
        return [batch["input_ids"].tolist() for batch in batches]

    whole = loader()
    first = ids(whole)
    iterator = iter(whole)
    for _ in range(2):
        next(iterator)
    state = whole.state_dict()
    rest, third = ids(iterator), ids(whole)
    assert len(first) == 6
    assert first != third
    fresh = loader()
    fresh.load_state_dict(state)
    torch.manual_seed(99)
    assert ids(fresh) == rest
    assert ids(fresh) == third
