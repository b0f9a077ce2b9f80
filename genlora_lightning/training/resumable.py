"""Make data loaders resumable: after a stop they go on with the batch that would have come next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import override

from genlora_lightning.training.random_state import random_state, set_random_state

T = TypeVar("T")
_NO_MORE = object()
LATEST_FETCH = "latest fetch"  # in the state of a loader without a length


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
    _latest_fetch: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, as tensors and plain values."""
        state = {
            "batches": self._consumed,
            "start": self._start,
            "generators": [generator.get_state() for generator in self._generators()],
        }
        return state if has_length(self) else {**state, LATEST_FETCH: self._latest_fetch}

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
        in_the_epoch = state["batches"] or self._fetched_ahead(state)
        self._pending = state if in_the_epoch and state["start"] is not None else None
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
        randomness = None
        if pending is None:
            self._consumed, self._start, self._skip = 0, self._random_state(), 0
            if getattr(self, "_iterator", None) is not None:
                # Persistent workers keep their seed. Draw as if they were new, which they are in a resumed run.
                torch.empty((), dtype=torch.int64).random_(generator=getattr(self, "generator", None))
            iterator = iter(super().__iter__())  # type: ignore[misc]
        elif has_length(self) and pending["batches"] >= len(cast("DataLoader[Any]", self)):
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
            randomness = self._fetched_ahead(pending)
        while (batch := self._fetch(iterator, randomness)) is not _NO_MORE:
            randomness = None
            self._consumed += 1
            yield batch

    def _fetch(self, iterator: Iterator[Any], randomness: dict[str, Any] | None) -> Any:
        # Lightning fetches one batch ahead of a loader without a length, before the step that is made before it. What
        # the dataset draws for such a batch is drawn from the same random state when it is fetched again.
        if randomness is None and has_length(self):
            return next(iterator, _NO_MORE)
        now = self._random_state()
        self._latest_fetch = {"batches": self._consumed, "random": randomness or now}
        if randomness is None:
            return next(iterator, _NO_MORE)
        self._set_random_state(randomness)
        try:
            return next(iterator, _NO_MORE)
        finally:
            self._set_random_state(now)

    @staticmethod
    def _fetched_ahead(state: dict[str, Any]) -> dict[str, Any] | None:
        # The random state to fetch a state's next batch from, if it had been fetched already.
        latest = state.get(LATEST_FETCH)
        return latest["random"] if latest is not None and latest["batches"] == state["batches"] else None

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
    ``torch.Generator`` in its attribute ``generator``; a ``batch_sampler`` need not have a length. An
    ``IterableDataset`` has no indices to skip; use
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


class EndlessBatches(IterableDataset[tuple[Any, Any]]):
    """Batches without end, each with the place in the stream after it; what :class:`EndlessLoader` reads.

    Every worker process reads a part of its own.
    """

    def begin(self, places: dict[int, Any], first: int) -> None:
        """Say where the parts begin.

        Args:
            places: For each part the place after its last batch; parts that have none begin at the beginning.
            first: The part that the first worker reads.
        """
        raise NotImplementedError


class EndlessLoader(_Place, DataLoader[Any]):
    """A loader of :class:`EndlessBatches` that goes on exactly where it was left.

    The state holds the places of the last batches that were handed out: Lightning fetches one ahead, which a checkpoint
    must not count. An epoch, where one ends (``limit_train_batches``), does not begin the stream anew.

    Args:
        dataset: The stream.
        num_workers: Processes that read it, as many parts.
        pin_memory: As torch's.

    Raises:
        ValueError: When a state is loaded: it is of another number of parts.
    """

    _AHEAD = 4  # batches that may be fetched and not trained on

    def __init__(self, dataset: EndlessBatches, num_workers: int, pin_memory: bool = False) -> None:
        # A generator of its own: the seed of the workers is then not drawn from the training's random numbers.
        options: dict[str, Any] = {"generator": torch.Generator(), "collate_fn": _as_it_is, "pin_memory": pin_memory}
        super().__init__(dataset, batch_size=None, num_workers=num_workers, **options)
        self._parts = max(1, num_workers)
        self._before = 0  # batches of the epochs before
        self._latest: list[tuple[int, Any]] = []  # numbers of batches, and the places after them
        self._running: Iterator[Any] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "batches": self._consumed,
            "before": self._before,
            "parts": self._parts,
            "places": list(self._latest),
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("parts") != self._parts:
            raise ValueError(
                f"The checkpoint was written with a stream that {state.get('parts')} workers read, and "
                f"this run has {self._parts}. Set the data's `num_workers` as it was."
            )
        handed = state["before"] + state["batches"]
        self._before, self._consumed = int(state["before"]), int(state["batches"])
        self._latest = [(number, place) for number, place in state["places"] if number < handed]
        if not {*range(max(0, handed - self._parts), handed)} <= {number for number, _ in self._latest}:
            raise ValueError(f"The checkpoint does not hold the stream's place after batch {handed}.")
        self._running, self._pending = None, {"batches": self._consumed}

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self._batches()

    @override
    def _batches(self) -> Iterator[Any]:
        if self._pending is None:  # a new epoch
            self._before, self._consumed = self._before + self._consumed, 0
        self._pending = None
        if self._running is None:
            handed = self._before + self._consumed
            places = {number % self._parts: place for number, place in self._latest}
            cast("EndlessBatches", self.dataset).begin(places, handed % self._parts)
            self._running = iter(DataLoader.__iter__(self))
        for batch, place in self._running:
            if isinstance(batch, Exception):
                raise batch
            number = self._before + self._consumed
            self._latest = [*self._latest, (number, place)][-self._parts - self._AHEAD :]
            self._consumed += 1
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def has_length(loader: Any) -> bool:
    """Whether a loader says how many batches it has; Lightning fetches one ahead if not, to know the last one."""
    try:
        len(loader)
    except (TypeError, NotImplementedError):
        return False
    return True


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
