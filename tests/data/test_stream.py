"""Streams: nothing is kept, no record is seen twice in a pass, and a run goes on at the very batch."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genlora_lightning import InstructionDataModule
from genlora_lightning.data import DataFileError, _formats

Write = Callable[..., str]


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{'one ' * (index % 5)}p{index}.", "completion": f"c{index}"} for index in range(count)]


def module(tokenizer: Any, file: Any, **options: Any) -> InstructionDataModule:
    given = {"streaming": True, "shuffle_buffer": 6, "batch_size": 3}
    return InstructionDataModule(tokenizer, file, **{**given, **options})


def loader(tokenizer: Any, file: Any, **options: Any) -> Any:
    data = module(tokenizer, file, **options)
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def prompts(tokenizer: Any, batches: Any) -> list[str]:
    """The prompts of batches, `p0` to `pN`, in the order in which they are seen."""
    texts = [tokenizer.decode(ids) for batch in batches for ids in batch["input_ids"]]
    return [text.partition("<|im_start|>assistant")[0].rpartition("p")[2].partition(".")[0] for text in texts]


def test_each_pass_shows_each_record_once_in_another_order(write: Write, tokenizer: Any) -> None:
    stream = loader(tokenizer, write("t.jsonl", pairs(24)))
    seen = prompts(tokenizer, islice(stream, 16))
    first, second = seen[:24], seen[24:]
    assert sorted(first, key=int) == sorted(second, key=int) == [str(index) for index in range(24)]
    assert len({tuple(first), tuple(second), tuple(map(str, range(24)))}) == 3
    again = loader(tokenizer, write("t.jsonl", pairs(24)))
    assert prompts(tokenizer, islice(again, 16)) == seen
    other = loader(tokenizer, write("t.jsonl", pairs(24)), seed=1)
    assert prompts(tokenizer, islice(other, 16)) != seen
    straight = loader(tokenizer, write("t.jsonl", pairs(24)), shuffle_buffer=1)
    assert prompts(tokenizer, islice(straight, 8)) == [str(index) for index in range(24)]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.csv", "t.parquet"])
def test_files_of_each_kind_are_streamed_and_follow_each_other(write: Write, tokenizer: Any, name: str) -> None:
    files = [write(f"{half}{name}", pairs(12)[6 * half : 6 * half + 6]) for half in range(2)]
    seen = prompts(tokenizer, islice(loader(tokenizer, files), 4))
    assert sorted(seen, key=int) == [str(index) for index in range(12)]


def test_a_data_set_of_the_hub_is_streamed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_list(pairs(12)).to_iterable_dataset()
    asked = []

    def load(*_: Any, **options: Any) -> Any:
        asked.append(options["streaming"])
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    seen = prompts(tokenizer, islice(loader(tokenizer, "hf://org/name"), 4))
    assert sorted(seen, key=int) == [str(index) for index in range(12)]
    assert set(asked) == {True}


def test_no_more_is_read_than_the_buffer_and_the_batches_need(
    write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, parsed = Counter(), Counter()
    lines, parse = _formats._decoded_lines, _formats.parse_json

    def counted(path: str) -> Any:
        for line in lines(path):
            read[path] += 1
            yield line

    monkeypatch.setattr(_formats, "_decoded_lines", counted)
    monkeypatch.setattr(_formats, "parse_json", lambda text: parsed.update(["all"]) or parse(text))
    path = write("t.jsonl", pairs(5000))
    stream = loader(tokenizer, path)
    looked = read[path]
    assert looked <= 2  # at the first record, for its form
    iterator = iter(stream)
    for _ in range(4):
        next(iterator)
    assert read[path] - looked == 12 + 6
    state = stream.state_dict()
    assert len(json.dumps(state)) < 3000
    read.clear()
    parsed.clear()
    fresh = loader(tokenizer, path)
    fresh.load_state_dict(state)
    next(iter(fresh))
    assert read[path] < 60
    assert parsed["all"] < 25  # what is past is counted, not parsed


@pytest.mark.parametrize("workers", [2])
def test_processes_and_workers_share_the_records_out(write: Write, tokenizer: Any, workers: int) -> None:
    file = write("t.jsonl", pairs(24))
    seen: list[str] = []
    for rank in range(2):
        data = module(tokenizer, file, num_workers=workers, batch_size=2)
        share = {"rank": rank, "num_replicas": 2}
        strategy = SimpleNamespace(distributed_sampler_kwargs=share)
        data.trainer = SimpleNamespace(max_steps=9, limit_train_batches=1.0, strategy=strategy)  # type: ignore[assignment]
        data.setup("fit")
        seen += prompts(tokenizer, islice(data.train_dataloader(), 6))
    assert sorted(seen, key=int) == [str(index) for index in range(24)]


@pytest.mark.parametrize(
    ("packing", "workers", "batches"), [(False, 0, 5), (True, 0, 2), (True, 0, 19), (False, 2, 1), (True, 2, 9)]
)
def test_a_stream_goes_on_at_the_very_batch(
    write: Write, tokenizer: Any, packing: bool, workers: int, batches: int
) -> None:
    rows = [*pairs(20), *({"text": " ".join(["one two three"] * index)} for index in range(10, 14))]
    file = write("t.jsonl", rows)
    options = {"packing": packing, "num_workers": workers, "max_length": 40, "batch_size": 2}

    def shown(batch: dict[str, torch.Tensor]) -> Any:
        return {name: tensor.tolist() for name, tensor in batch.items()}

    whole = loader(tokenizer, file, **options)
    iterator = iter(whole)
    seen = [shown(next(iterator)) for _ in range(batches)]
    state = pickle.loads(pickle.dumps(whole.state_dict()))
    rest = [shown(batch) for batch in islice(iterator, 12)]

    fresh = loader(tokenizer, file, **options)
    fresh.load_state_dict(state)
    assert [shown(batch) for batch in islice(fresh, 12)] == rest

    # Lightning had fetched a batch that was not trained on.
    fresh = loader(tokenizer, file, **options)
    fresh.load_state_dict({**state, "batches": batches - 1})
    assert shown(next(iter(fresh))) == seen[-1]


def test_packed_rows_are_full_and_hold_every_answer(write: Write, tokenizer: Any) -> None:
    stream = loader(tokenizer, write("t.jsonl", pairs(40)), packing=True, max_length=120, batch_size=2)
    batches = list(islice(stream, 6))
    assert all(batch["input_ids"].shape[0] == 2 for batch in batches)
    assert all((batch["position_ids"] == 0).sum() > 2 for batch in batches)
    full = sum(int(batch["attention_mask"].sum()) for batch in batches) / (12 * 120)
    assert full > 0.7


def test_another_number_of_workers_is_refused(write: Write, tokenizer: Any) -> None:
    file = write("t.jsonl", pairs(8))
    state = loader(tokenizer, file).state_dict()
    with pytest.raises(
        ValueError, match=r"a stream that 1 workers read, and this run has 2\. Set the data's `num_workers`"
    ):
        loader(tokenizer, file, num_workers=2).load_state_dict(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_cannot_be_used_is_one_line(write: Write, tokenizer: Any, workers: int) -> None:
    file = write("t.jsonl", [*pairs(4), {"prompt": 3, "completion": "x"}])
    with pytest.raises(DataFileError, match=r"t\.jsonl:5: field 'prompt' must be a string"):
        list(islice(loader(tokenizer, file, num_workers=workers), 4))


def test_what_cannot_be_streamed_is_refused_at_once(write: Write, tokenizer: Any) -> None:
    for options in ({"val_fraction": 0.1}, {"group_by_length": True}, {"cache_dir": "x"}):
        with pytest.raises(ValueError, match=f"streaming and {next(iter(options))} exclude each other"):
            module(tokenizer, "t.jsonl", **options)
    with pytest.raises(ValueError, match=r"streaming takes files without weights, got \{'a\.jsonl': 2\.0\}"):
        module(tokenizer, {"a.jsonl": 2.0, "b.jsonl": 1.0})
    with pytest.raises(DataFileError, match=r"a\.json: train_file is one JSON text, which is read as a whole"):
        module(tokenizer, "a.json")
    with pytest.raises(ValueError, match="shuffle_buffer must be an integer of at least 1, got 0"):
        module(tokenizer, "t.jsonl", shuffle_buffer=0)
    with pytest.raises(DataFileError, match="1 records cannot be shared out over 2 processes"):
        list(islice(loader(tokenizer, write("t.jsonl", pairs(1)), num_workers=2), 6))


def test_a_run_without_an_end_is_refused(write: Write, tokenizer: Any) -> None:
    from lightning.pytorch import Trainer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    file = write("t.jsonl", pairs(4))
    for given, message in (
        ({"max_epochs": 2}, "streaming=true: a stream has no end, .* Set the trainer's max_steps"),
        ({"max_steps": 2}, r"val_check_interval is 1\.0\)\. Set the trainer's val_check_interval to a number"),
    ):
        data = module(tokenizer, file, val_file=file)
        data.trainer = Trainer(**quiet, **given)
        with pytest.raises(ValueError, match=message):
            data.train_dataloader()


def test_errors_of_data_come_through_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(DataFileError("file:3", "is wrong")))
    assert (str(error), error.where) == ("file:3: is wrong", "file:3")
