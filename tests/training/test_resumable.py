from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from genlora_lightning.training.resumable import ResumableDataLoader, is_resumable, make_resumable, make_unnoticed

DATA = TensorDataset(torch.arange(20))


def batches(loader: Any) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def made(kind: str) -> ResumableDataLoader[Any]:
    own = torch.Generator().manual_seed(4)
    options: dict[str, dict[str, Any]] = {
        "ordered": {"batch_size": 4},
        "shuffled": {"batch_size": 4, "shuffle": True},
        "ragged": {"batch_size": 6, "shuffle": True, "generator": own},
        "weighted": {"batch_size": 4, "sampler": WeightedRandomSampler(torch.ones(20), 20, generator=own)},
        "batch sampler": {"batch_sampler": BatchSampler(SequentialSampler(DATA), 7, drop_last=True)},
        "workers": {"batch_size": 4, "shuffle": True, "num_workers": 2},
    }
    return ResumableDataLoader(DATA, **options[kind])


@pytest.mark.parametrize("kind", ["ordered", "shuffled", "ragged", "weighted", "batch sampler", "workers"])
@pytest.mark.parametrize("seen", [1, 2])
def test_loader_goes_on_with_the_batch_that_would_have_come_next_and_then_the_next_epoch(tmp_path, kind, seen):
    torch.manual_seed(1)
    loader = made(kind)
    first_epoch = batches(loader)
    iterator = iter(loader)
    for _ in range(seen):
        next(iterator)
    torch.save([loader.state_dict(), torch.get_rng_state()], tmp_path / "state.pt")
    rest = [batch[0].tolist() for batch in iterator]
    third = batches(loader)
    if kind not in ("ordered", "batch sampler"):
        assert first_epoch != third

    torch.manual_seed(99)
    state, random_state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = made(kind)
    fresh.load_state_dict(state)
    torch.set_rng_state(random_state)
    assert len(fresh) == len(loader)
    assert batches(fresh) == rest
    assert batches(fresh) == third


def test_data_of_skipped_batches_is_not_read(tmp_path):
    read = []

    class Watched(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> int:
            read.append(index)
            return index

    loader = ResumableDataLoader(Watched(), batch_size=2)
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    read.clear()
    fresh = ResumableDataLoader(Watched(), batch_size=2)
    fresh.load_state_dict(state)
    assert [batch.tolist() for batch in fresh] == [[4, 5], [6, 7], [8, 9]]
    assert read == [4, 5, 6, 7, 8, 9]


def test_batches_that_workers_have_prefetched_are_not_counted():
    loader = made("workers")
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict()["batches"] == 1


def test_copy_is_made_of_plain_loaders_only_and_leaves_the_original():
    class Own(DataLoader):
        """A subclass, as users make them."""

    class OwnOrder(DataLoader):
        def __iter__(self) -> Any:
            return iter([1])

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([1])

    plain, own = DataLoader(DATA, batch_size=4), Own(DATA)
    for loader in (plain, own):
        copy = make_resumable(loader)
        assert isinstance(copy, type(loader))
        assert is_resumable(copy)
        assert not is_resumable(loader)
        assert batches(copy) == batches(loader)
    for other in (OwnOrder(DATA), DataLoader(Stream()), [1, 2], made("ordered")):
        assert make_resumable(other) is other
    with pytest.raises(TypeError, match=r"Stream, an IterableDataset, does not have\. Use torchdata's"):
        ResumableDataLoader(Stream())


def test_unnoticed_loader_leaves_the_random_state_as_it_was():
    before = torch.get_rng_state()
    assert batches(make_unnoticed(DataLoader(DATA, batch_size=10))) == [list(range(10)), list(range(10, 20))]
    assert torch.equal(torch.get_rng_state(), before)
    batches(DataLoader(DATA))
    assert not torch.equal(torch.get_rng_state(), before)


def test_state_of_another_loader_is_an_error():
    state = made("ragged").state_dict()
    with pytest.raises(ValueError, match="had 1 generators of its own; this one has 0"):
        made("ordered").load_state_dict(state)
