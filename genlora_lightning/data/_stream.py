"""Read records as a stream without end: shuffled in a buffer, shared out over processes, and resumed at any batch.

Nothing is kept but the buffer, and the rows of the next batches. A place in the stream is a few numbers: how many
records of this pass were read, and the numbers of those in the buffer and in unfinished batches. To go on from it the
files are read from their beginning, and only these records are parsed.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import get_worker_info
from typing_extensions import override

from genlora_lightning.data._files import check_file, iterate_records
from genlora_lightning.data._formats import Record, read_json_lines
from genlora_lightning.data._hub import PREFIX, stream_hub_records
from genlora_lightning.errors import DataFileError
from genlora_lightning.training.resumable import EndlessBatches

Rows = list[dict[str, Any]]

_JSON_LINES = (".jsonl", ".jsonl.gz")
_WHOLE = ".json"  # one JSON text, which is read as a whole


class RecordStream(EndlessBatches):
    """Batches of the records of files, again and again, each pass in another order.

    Args:
        paths: The files, one after another; a name on the Hub is streamed.
        argument: The argument they were given as, for messages.
        encode: Makes rows of a record; none if it is left out.
        group: Makes the rows of a batch of those of several records, which may be fewer and longer.
        records_in_group: How many records to group at a time.
        collate: Makes a batch of rows.
        batch_size: Rows of a batch.
        buffer_size: Records to draw the next one from.
        seed: Of the draws.
        rank: Which of the processes this is.
        world_size: How many there are; record i goes to part i modulo the number of processes and their workers.

    Raises:
        DataFileError: A file can only be read as a whole.
    """

    def __init__(
        self,
        paths: Sequence[str],
        argument: str,
        *,
        encode: Callable[[Record], Rows],
        group: Callable[[Rows], Rows],
        records_in_group: int,
        collate: Callable[[Rows], Any],
        batch_size: int,
        buffer_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.paths = list(paths)
        self.argument = argument
        self.encode = encode
        self.group = group
        self.records_in_group = records_in_group
        self.collate = collate
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.places: dict[int, Any] = {}
        self.first = 0
        check_streamable(self.paths, argument)

    @override
    def begin(self, places: dict[int, Any], first: int) -> None:
        self.places, self.first = places, first

    @override
    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        worker = get_worker_info()
        workers = 1 if worker is None else worker.num_workers
        part = 0 if worker is None else (worker.id + self.first) % workers
        reader = _Part(self, self.rank * workers + part, self.world_size * workers, self.places.get(part))
        try:
            yield from reader.batches()
        except DataFileError as error:
            if worker is None:
                raise
            yield error, None  # to be raised by the loader: torch would make another error of it

    def records(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, Record | None]]:
        """Yields the number of each record of all files, with the record if it is wanted."""
        number = -1
        for path in self.paths:
            for record in self._read(path, number + 1, wanted):
                number += 1
                yield number, record if record is not None and wanted(number) else None
        if number < 0:
            raise DataFileError(" + ".join(self.paths), f"{self.argument} holds no records")

    def _read(self, path: str, before: int, wanted: Callable[[int], bool]) -> Iterator[Record | None]:
        if path.startswith(PREFIX):
            return stream_hub_records(path, self.argument)
        check_file(path, self.argument)
        if path.lower().endswith(_JSON_LINES):
            return read_json_lines(path, lambda place: wanted(before + place))
        return iterate_records(path, self.argument)


class _Part:
    """What one process reads of a stream.

    Args:
        stream: The stream.
        number: Which part.
        parts: Of how many.
        place: Where it was left, if it was.
    """

    def __init__(self, stream: RecordStream, number: int, parts: int, place: dict[str, Any] | None) -> None:
        self.stream = stream
        self.number = number
        self.parts = parts
        place = place or {"pass": 0, "read": 0, "drawn": 0, "buffer": [], "groups": [], "used": 0}
        self.turn: int = place["pass"]
        self.read: int = place["read"]  # records of all parts that were read in this pass
        self.drawn: int = place["drawn"]
        self.buffer: list[tuple[int, Record]] = []
        self.groups: deque[tuple[list[int], Rows]] = deque()
        self.used: int = place["used"]  # rows of the first group that are in batches
        self._restore(place)

    def batches(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Yields batches, each with the place after it."""
        size, records = self.stream.batch_size, self._shuffled()
        idle_since = 0  # records that made no row
        while True:
            while sum(len(rows) for _, rows in self.groups) - self.used < size:
                found = [next(records) for _ in range(self.stream.records_in_group)]
                rows = self._rows(record for _, record in found)
                idle_since = 0 if rows else idle_since + len(found)
                if idle_since > self.read + self.stream.buffer_size and self.turn > 1:
                    files = " + ".join(self.stream.paths)
                    raise DataFileError(
                        files, "no record of a whole pass can be used: truncation='drop' leaves all out"
                    )
                self.groups.append(([number for number, _ in found], rows))
            taken: Rows = []
            while len(taken) < size:
                rows = self.groups[0][1]
                more = rows[self.used : self.used + size - len(taken)]
                taken += more
                self.used += len(more)
                if self.used == len(rows):
                    self.groups.popleft()
                    self.used = 0
            yield self.stream.collate(taken), self._place()

    def _place(self) -> dict[str, Any]:
        return {
            "pass": self.turn,
            "read": self.read,
            "drawn": self.drawn,
            "buffer": [number for number, _ in self.buffer],
            "groups": [numbers for numbers, _ in self.groups],
            "used": self.used,
        }

    def _restore(self, place: dict[str, Any]) -> None:
        wanted = {*place["buffer"], *(number for numbers in place["groups"] for number in numbers)}
        found: dict[int, Record] = {}
        for number, record in self.stream.records(wanted.__contains__) if wanted else ():
            if record is not None:
                found[number] = record
            if len(found) == len(wanted):
                break
        if len(found) < len(wanted):
            files = " + ".join(self.stream.paths)
            raise DataFileError(files, f"has only {number + 1} records, and the checkpoint was written with more")
        self.buffer = [(number, found[number]) for number in place["buffer"]]
        for numbers in place["groups"]:
            self.groups.append((list(numbers), self._rows(found[number] for number in numbers)))

    def _rows(self, records: Iterator[Record]) -> Rows:
        return self.stream.group([row for record in records for row in self.stream.encode(record)])

    def _shuffled(self) -> Iterator[tuple[int, Record]]:
        """Yields this part's records without end: each time one of the buffer, whose place the next one takes."""
        while True:
            for number, record in self._unread():
                if len(self.buffer) < self.stream.buffer_size:
                    self.buffer.append((number, record))
                    continue
                drawn = self._draw()
                out, self.buffer[drawn] = self.buffer[drawn], (number, record)
                yield out
            if not self.buffer and self.read < self.parts:
                files = " + ".join(self.stream.paths)
                raise DataFileError(
                    files, f"{self.read} records cannot be shared out over {self.parts} processes; use fewer workers"
                )
            while self.buffer:
                drawn = self._draw()
                self.buffer[drawn], self.buffer[-1] = self.buffer[-1], self.buffer[drawn]
                yield self.buffer.pop()
            self.turn, self.read, self.drawn = self.turn + 1, 0, 0

    def _unread(self) -> Iterator[tuple[int, Record]]:
        start, parts = self.read, self.parts

        def is_next(number: int) -> bool:
            return number >= start and number % parts == self.number

        for number, record in self.stream.records(is_next):
            if number < start:
                continue
            self.read = number + 1
            if record is not None:
                yield number, record

    def _draw(self) -> int:
        self.drawn += 1
        return random.Random(f"{self.stream.seed} {self.number} {self.turn} {self.drawn}").randrange(len(self.buffer))


def check_streamable(paths: Sequence[str], argument: str) -> None:
    """Checks that files can be read piece by piece.

    Raises:
        DataFileError: One cannot.
    """
    for path in paths:
        if path.lower().endswith(_WHOLE):
            reason = f"{argument} is one JSON text, which is read as a whole; to stream it make it a .jsonl file"
            raise DataFileError(path, reason)


def part_of(trainer: Any, is_validated: bool) -> tuple[int, int]:
    """Returns the number of this process, and of how many, after a look at whether a run on a stream has an end.

    Args:
        trainer: Lightning's, or None.
        is_validated: Whether there are validation data.

    Raises:
        ValueError: It has no end, or no place for the validation.
    """
    if trainer is None:
        return 0, 1
    if not isinstance(trainer.limit_train_batches, int):
        if trainer.max_steps == -1:
            raise ValueError(
                "streaming=true: a stream has no end, and nobody knows its length. Set the trainer's max_steps."
            )
        if is_validated and trainer.limit_val_batches and isinstance(trainer.val_check_interval, float):
            raise ValueError(
                f"streaming=true: an epoch of a stream has no end at which to validate (val_check_interval is "
                f"{trainer.val_check_interval}). Set the trainer's val_check_interval to a number of batches."
            )
    share = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {"rank": 0, "num_replicas": 1}
    return share["rank"], share["num_replicas"]
