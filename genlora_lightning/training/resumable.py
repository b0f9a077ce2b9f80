"""Make data loaders resumable: after a stop they go on with the batch that would have come next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from genlora_lightning.training.random_state import random_state, set_random_state

T = TypeVar("T")


class _Place:
    """Mixin before a DataLoader class: counts the batches handed out, and remembers the randomness an epoch began with.

    The order of an epoch is not stored, but drawn again from the same random state, so that every sampler will do.
    """

    _consumed = 0
    _start: dict[str, Any] | None = None
    _pending: dict[str, Any] | None = None
    _pending_is_taken = False
    _waiting = False
    _skip = 0
    _indices: _Indices | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, as tensors and plain values."""
        return {
            "batches": self._consumed,
            "start": self._start,
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a place of :meth:`state_dict`, with the next batch that is asked for."""
        if len(state["generators"]) != len(self._generators()):
            raise ValueError(
                f"The checkpoint was written with a data loader that had {len(state['generators'])} generators of its "
                f"own; this one has {len(self._generators())}. Use the same data loader to resume."
            )
        for generator, value in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(value)
        self._consumed = int(state["batches"])
        self._start = state["start"]
        self._pending = state if state["batches"] and state["start"] is not None else None
        self._pending_is_taken = self._waiting

    def __iter__(self) -> Iterator[Any]:
        if self._pending_is_taken:
            self._pending = None  # it was the place in the epoch before
        self._pending_is_taken = self._waiting = True
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        # A generator, so that nothing is drawn and no worker is started before the first batch is asked for: until then
        # a state can be loaded, and an epoch be set.
        pending, self._pending, self._waiting = self._pending, None, False
        if pending is None:
            self._consumed, self._start, self._skip = 0, self._random_state(), 0
            if getattr(self, "_iterator", None) is not None:
                # Persistent workers keep their seed. Draw as if they were new, which they are in a resumed run.
                torch.empty((), dtype=torch.int64).random_(generator=getattr(self, "generator", None))
            iterator = iter(super().__iter__())  # type: ignore[misc]
        elif pending["batches"] >= len(cast("DataLoader[Any]", self)):
            self._consumed, self._start = int(pending["batches"]), pending["start"]
            return
        else:
            now = self._random_state()
            self._consumed, self._start = int(pending["batches"]), pending["start"]
            self._set_random_state(pending["start"])
            try:
                iterator = self._fast_forward(self._consumed)
            finally:
                self._set_random_state(now)
        for batch in iterator:
            self._consumed += 1
            yield batch

    def _fast_forward(self, batches: int) -> Iterator[Any]:
        self._skip = batches
        iterator = iter(super().__iter__())  # type: ignore[misc]
        # Samplers draw with their first index, after what the iterator has drawn: now, and not with the first batch.
        if self._indices is not None:
            self._indices.skip()
        self._skip = 0
        return cast("Iterator[Any]", iterator)

    @property
    def _index_sampler(self) -> Any:
        # What torch's iterators draw batches of indices from, once an epoch: skipped ones are never read.
        return _Skipping(super()._index_sampler, self)  # type: ignore[misc]

    def _generators(self) -> list[torch.Generator]:
        batch_sampler = getattr(self, "batch_sampler", None)
        owners = (self, getattr(self, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(item): item for item in found if isinstance(item, torch.Generator)}.values())

    def _random_state(self) -> dict[str, Any]:
        return {"global": random_state(), "generators": [generator.get_state() for generator in self._generators()]}

    def _set_random_state(self, state: dict[str, Any]) -> None:
        set_random_state(state["global"])
        for generator, value in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(value)


class _Skipping:
    """An index sampler whose first batches are left out when its loader says so."""

    def __init__(self, sampler: Any, loader: _Place) -> None:
        self.sampler = sampler
        self.loader = loader

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        self.loader._indices = _Indices(iter(self.sampler), self.loader._skip)
        return self.loader._indices


class _Indices:
    """Batches of indices without the first ones."""

    def __init__(self, indices: Iterator[Any], left_out: int) -> None:
        self.indices = indices
        self.left_out = left_out

    def skip(self) -> None:
        while self.left_out:
            next(self.indices, None)
            self.left_out -= 1

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.skip()
        return next(self.indices)


class _Unnoticed:
    """Mixin before a DataLoader class: starting an epoch leaves the global random state as it was."""

    def __iter__(self) -> Iterator[Any]:
        state = torch.get_rng_state()
        try:
            iterator: Iterator[Any] = iter(super().__iter__())  # type: ignore[misc]
            return iterator
        finally:
            torch.set_rng_state(state)


class ResumableDataLoader(_Place, DataLoader[T]):  # type: ignore[misc]
    """torch's ``DataLoader``, with ``state_dict`` and ``load_state_dict``: an epoch goes on where it was left.

    It takes the same arguments. Under :class:`~genlora_lightning.GenLoRAFinetuning` there is no need to use it: the
    callback makes every plain ``DataLoader`` of the training one of these.

    The state holds the number of batches handed out (not those that workers have prefetched) and the random state at
    the epoch's start; the order is drawn again from that, and indices up to the place are skipped without reading the
    data. Any sampler will do that draws from torch's, numpy's or Python's global generator, or from a
    ``torch.Generator`` in its attribute ``generator``. An ``IterableDataset`` has no indices to skip; use
    ``torchdata``'s ``StatefulDataLoader`` for one, which Lightning restores by itself.

    Note:
        What worker processes draw for themselves (random augmentation with ``num_workers > 0``) is not restored in the
        middle of an epoch: each epoch's workers start from the same seed, but not in the middle of their sequence.

    Raises:
        TypeError: The dataset is an ``IterableDataset``.
    """

    def __init__(self, dataset: Dataset[T], *args: Any, **kwargs: Any) -> None:
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"ResumableDataLoader skips examples by their indices, which {type(dataset).__name__}, an "
                "IterableDataset, does not have. Use torchdata's StatefulDataLoader."
            )
        super().__init__(dataset, *args, **kwargs)


def is_resumable(loader: object) -> bool:
    """Whether a loader is one that :func:`make_resumable` made, or a :class:`ResumableDataLoader`."""
    return isinstance(loader, _Place)


def make_resumable(loader: T) -> T:
    """A copy of a torch ``DataLoader`` that knows its place; whatever else, or can do so itself, is left as it is."""
    return _with(_Place, loader)


def make_unnoticed(loader: T) -> T:
    """A copy of a torch ``DataLoader`` whose use for validation does not change the random numbers of the training."""
    return _with(_Unnoticed, loader)


def _with(mixin: type, loader: T) -> T:
    kind: Any = type(loader)
    plain = isinstance(loader, DataLoader) and kind.__iter__ is DataLoader.__iter__
    if not plain or hasattr(loader, "state_dict") or isinstance(cast("Any", loader).dataset, IterableDataset):
        return loader
    exact = mixin is _Place and kind is DataLoader
    made: Any = object.__new__(ResumableDataLoader if exact else type(kind.__name__, (mixin, kind), {}))
    vars(made).update(vars(loader), _iterator=None)
    return cast("T", made)
