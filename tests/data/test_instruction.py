from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from genlora_lightning.data import DataFileError, InstructionDataModule
from genlora_lightning.data._chat import IGNORE_INDEX
from genlora_lightning.data._formats import SUFFIXES

Write = Callable[..., str]
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def pairs(count: int = 20) -> list[dict[str, Any]]:
    return [{"prompt": f"{WORDS[i % 10]} and {i}?", "completion": " ".join(WORDS[: i % 7 + 1])} for i in range(count)]


def conversations(count: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": pair["prompt"]},
                {"role": "assistant", "content": pair["completion"]},
                {"role": "user", "content": "Good?"},
                {"role": "assistant", "content": f"It is good, {i}."},
            ]
        }
        for i, pair in enumerate(pairs(count))
    ]


def module(tokenizer: Any, train_file: str, **options: Any) -> InstructionDataModule:
    return InstructionDataModule(tokenizer, train_file, **options)


def prompts(loader: Any, tokenizer: Any) -> list[str]:
    rows = [row for batch in loader for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    texts = [tokenizer.decode(ids[mask.bool()]) for ids, mask in rows]
    return [text.split("user\n")[1].split("<|im_end|>")[0] for text in texts]


def answers(loader: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row[row != IGNORE_INDEX]) for batch in loader for row in batch["labels"]]


def test_batches_hold_right_padded_tokens_with_labels_on_the_answers(write: Write, tokenizer_folder: str) -> None:
    data = module(tokenizer_folder, write("train.jsonl", pairs()), batch_size=6)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [6, 6, 6, 2], "the last, smaller batch is kept"
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["labels"].shape
        assert batch["input_ids"].shape[1] % 8 == 0
        assert (batch["attention_mask"].diff(dim=1) <= 0).all(), "padding is on the right"
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORE_INDEX).all()
        labelled = batch["labels"] != IGNORE_INDEX
        assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    expected = sorted(pair["completion"] + "<|im_end|>" for pair in pairs())
    assert sorted(answers(batches, data.tokenizer)) == expected
    assert sorted(prompts(batches, data.tokenizer)) == sorted(pair["prompt"] for pair in pairs())


@pytest.mark.parametrize("records", [pairs(5), conversations(5)], ids=["pairs", "messages"])
def test_all_formats_give_equal_batches(write: Write, tokenizer: Any, records: list[dict[str, Any]]) -> None:
    batches = []
    for suffix in SUFFIXES:
        data = module(tokenizer, write(f"train{suffix}", records), batch_size=2)
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
    for other in batches[1:]:
        for left, right in zip(batches[0], other, strict=True):
            assert left.keys() == right.keys()
            assert all(torch.equal(left[key], right[key]) for key in left)


def test_every_answer_of_a_conversation_is_learned(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", conversations(1))
    for train_on, expected in (("all", "one<|im_end|>It is good, 0.<|im_end|>"), ("last", "It is good, 0.<|im_end|>")):
        data = module(tokenizer, path, train_on=train_on)
        data.setup("fit")
        assert answers(data.train_dataloader(), tokenizer) == [expected]


def test_chat_template_and_system_prompt_replace_the_defaults(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", pairs(1))
    data = module(tokenizer, path, system_prompt="Six of ten.")
    data.setup("fit")
    text = tokenizer.decode(next(iter(data.train_dataloader()))["input_ids"][0])
    assert text.startswith("<|im_start|>system\nSix of ten.<|im_end|>")
    data = module(tokenizer, path, chat_template="none", pad_to_multiple_of=1)
    data.setup("fit")
    text = tokenizer.decode(next(iter(data.train_dataloader()))["input_ids"][0])
    assert text == "one and 0?one<|im_end|>"


def test_template_that_teaches_no_end_is_reported(
    write: Write, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with caplog.at_level(logging.INFO, "genlora_lightning"):
        module(tokenizer, write("train.jsonl", pairs(1))).setup("fit")
        assert "cannot learn where to stop" not in caplog.text
        module(tokenizer, write("train.jsonl", pairs(1)), chat_template=template).setup("fit")
    assert "cannot learn where to stop" in caplog.text


# Splits


def with_duplicates() -> list[dict[str, Any]]:
    again = [{"prompt": f"  {pair['prompt'].upper()}", "completion": "ten"} for pair in pairs(40)]
    return pairs(40) + again


def test_validation_split_shares_no_prompt_with_training(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", with_duplicates())
    data = module(tokenizer, path, val_fraction=0.25)
    data.setup("fit")
    train, val = (
        [text.strip().lower() for text in prompts(loader, tokenizer)]
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(train) == 60
    assert len(val) == 20
    assert not set(train) & set(val)
    assert data.summary()["val"]["also_in_train"] == 0


def test_split_and_order_depend_on_the_seed_only(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", pairs(40))

    def seen(seed: int, stage: str = "fit") -> tuple[list[str], list[str], list[str]]:
        torch.seed()  # another state of the global generator in every run
        data = module(tokenizer, path, val_fraction=0.25, seed=seed)
        data.setup(stage)
        val = prompts(data.val_dataloader(), tokenizer)
        if stage != "fit":
            return [], [], val
        loader = data.train_dataloader()
        return prompts(loader, tokenizer), prompts(loader, tokenizer), val

    first, second, val = seen(1)
    assert (first, second, val) == seen(1)
    assert val == seen(1, "validate")[2]
    assert first != second, "every epoch has an order of its own"
    assert sorted(first) == sorted(second)
    assert val != seen(2)[2]


def test_prompts_of_the_training_file_in_other_files_are_counted(write: Write, tokenizer: Any) -> None:
    train, val = write("train.jsonl", pairs(10)), write("val.jsonl", pairs(12)[8:])
    data = module(tokenizer, train, val_file=val)
    data.setup("fit")
    assert data.summary()["val"]["also_in_train"] == 2


def test_setup_reads_each_split_once_and_only_when_needed(
    write: Write, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from genlora_lightning.data import _records

    read: list[str] = []
    original = _records.read_records
    monkeypatch.setattr(_records, "read_records", lambda path, name: read.append(name) or original(path, name))
    test = write("test.jsonl", pairs(3))
    data = module(tokenizer, write("train.jsonl", pairs(9)), test_file=test, val_fraction=0.3)
    data.setup("fit")
    assert read == ["train_file"]
    data.setup("fit")
    data.setup("validate")
    assert read == ["train_file"]
    data.setup("test")
    assert read == ["train_file", "test_file"]
    assert set(data.summary()) == {"train", "val", "test"}
    everything = module(tokenizer, write("train.jsonl", pairs(9)), test_file=test)
    everything.setup()
    assert set(everything.summary()) == {"train", "test", "predict"}


# Length


def test_truncation_is_reported_once_with_its_counts(
    write: Write, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    records = [*pairs(3), {"prompt": "one two three four " * 20, "completion": "five"}]
    path = write("train.jsonl", records)
    with caplog.at_level(logging.INFO, "genlora_lightning"):
        data = module(tokenizer, path, max_length=64)
        data.setup("fit")
        data.setup("fit")
    counts = data.summary()["train"]
    assert counts["cut_examples"] == 1
    assert counts["cut_tokens"] > 0
    assert counts["longest"] == 64
    assert counts["examples"] == 4
    assert caplog.text.count("cut examples") == 1

    data = module(tokenizer, path, max_length=64, truncation="drop")
    data.setup("fit")
    assert data.summary()["train"]["dropped_examples"] == 1
    assert data.summary()["train"]["cut_examples"] == 0
    assert sum(len(batch["input_ids"]) for batch in data.train_dataloader()) == 3
    with pytest.raises(DataFileError, match=r"train\.jsonl:4: \d+ tokens are more than max_length=64"):
        module(tokenizer, path, max_length=64, truncation="error").setup("fit")
    with pytest.raises(ValueError, match=r"the training split is empty: each of its 4 example\(s\) .*max_length=5"):
        module(tokenizer, path, max_length=5, truncation="drop").setup("fit")


def test_summary_counts_what_is_in_the_batches(write: Write, tokenizer: Any) -> None:
    data = module(tokenizer, write("train.jsonl", conversations(7)), val_fraction=0.3, batch_size=3)
    data.setup("fit")
    summary = data.summary()
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        batches = list(loader)
        assert summary[split]["examples"] == sum(len(batch["input_ids"]) for batch in batches)
        assert summary[split]["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in batches)
        assert summary[split]["answer_tokens"] == sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in batches)
    header, _, *lines = data.summary_table().splitlines()
    assert header.split()[:3] == ["data", "examples", "tokens"]
    assert [line.split()[0] for line in lines] == ["training", "validation"]
    assert json.loads(json.dumps(summary)) == summary


def test_group_by_length_saves_padding_and_loses_nothing(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", [{"prompt": "one " * (i * 17 % 40 + 1), "completion": str(i)} for i in range(200)])
    for loader in ("train", "val", "test"):
        totals = {}
        for grouped in (False, True):
            files = {"val_file": path, "test_file": path, "eval_batch_size": 4}
            data = module(tokenizer, path, group_by_length=grouped, **files)
            data.setup()
            batches = list(getattr(data, f"{loader}_dataloader")())
            totals[grouped] = sum(batch["input_ids"].numel() for batch in batches)
            assert sorted(answers(batches, tokenizer)) == sorted(f"{i}<|im_end|>" for i in range(200))
        assert totals[True] < 0.9 * totals[False]
        lengths = [batch["input_ids"].shape[1] for batch in batches]
        assert lengths != sorted(lengths), "the first batches alone stand for all"


# Prediction


def test_prediction_batches_are_left_padded_prompts(write: Write, tokenizer: Any) -> None:
    test = write("test.jsonl", conversations(5))
    data = module(tokenizer, write("train.jsonl", pairs(2)), test_file=test, batch_size=2, eval_batch_size=5)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "prompt", "completion"}
    assert (batch["attention_mask"].diff(dim=1) >= 0).all(), "padding is on the left"
    assert batch["attention_mask"][:, -1].all()
    assert batch["prompt"] == ["Good?"] * 5
    assert batch["completion"] == [f"It is good, {i}." for i in range(5)]
    for row, mask, record in zip(batch["input_ids"], batch["attention_mask"], conversations(5), strict=True):
        expected = tokenizer.apply_chat_template(record["messages"][:-1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(row[mask.bool()]) == expected


def test_predict_file_needs_no_answers(write: Write, tokenizer: Any) -> None:
    records: list[dict[str, Any]] = [{"prompt": "Good?"}, {"messages": [{"role": "user", "content": "Bad?"}]}]
    predict = write("predict.jsonl", records)
    data = module(tokenizer, write("train.jsonl", pairs(2)), predict_file=predict, test_file="unused.jsonl")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["prompt"] == ["Good?", "Bad?"]
    assert "completion" not in batch


# Caches


@pytest.mark.parametrize("cached", [False, True])
def test_changed_file_is_never_answered_from_an_old_state(
    write: Write, tokenizer: Any, tmp_path: Path, cached: bool
) -> None:
    import os

    cache = str(tmp_path / "cache") if cached else None

    def learned(**options: Any) -> list[str]:
        data = module(tokenizer, path, cache_dir=cache, **options)
        data.setup("fit")
        return answers(data.train_dataloader(), tokenizer)

    path = write("train.jsonl", [{"prompt": "Good?", "completion": "yes"}])
    stamp = os.stat(path)
    assert learned() == ["yes<|im_end|>"]
    write("train.jsonl", [{"prompt": "Good?", "completion": "nay"}])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # same size, same times, other contents
    assert learned() == ["nay<|im_end|>"]
    assert learned(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}") == ["nay"]
    assert learned() == ["nay<|im_end|>"]
    assert (tmp_path / "cache").exists() == cached


def test_nothing_is_written_unless_asked_for(
    write: Write, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    cache = tmp_path / "hf_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    path = write("train.jsonl", pairs(10))
    before = sorted(tmp_path.rglob("*"))
    data = module(tokenizer, path, val_fraction=0.2)
    data.setup("fit")
    assert list(data.train_dataloader())
    assert sorted(tmp_path.rglob("*")) == before
    assert data._datasets["train"].cache_files == []


def test_cached_run_gives_the_same_batches_and_counts(write: Write, tokenizer: Any, tmp_path: Path) -> None:
    path = write("train.jsonl", [*pairs(6), {"prompt": "one " * 90, "completion": "two"}])
    runs = []
    for _ in range(2):
        data = module(tokenizer, path, cache_dir=str(tmp_path / "cache"), truncation="drop", max_length=80)
        data.setup("fit")
        runs.append((data.summary(), [batch["input_ids"].tolist() for batch in data.train_dataloader()]))
    assert runs[0] == runs[1]
    assert runs[0][0]["train"]["dropped_examples"] == 1


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"val_fraction must be at least 0 and below 1, got 1\.0"),
        ({"val_fraction": -0.1}, r"val_fraction must be at least 0 and below 1, got -0\.1"),
        ({"val_fraction": 0.1, "val_file": "v.jsonl"}, r"val_file='v\.jsonl' and val_fraction=0\.1 exclude each other"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be an integer of at least 1, got 0"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be an integer of at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
        ({"truncation": "right"}, "truncation must be one of error, drop, left, got 'right'"),
        ({"train_on": "first"}, "train_on must be one of all, last, got 'first'"),
        ({"chat_template": "none", "system_prompt": "x"}, "system_prompt needs a chat template"),
    ],
)
def test_bad_arguments_are_refused_at_once(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tokenizer, "train.jsonl", **options)


def test_missing_files_are_refused_before_anything_is_loaded(write: Write) -> None:
    train = write("train.jsonl", pairs(1))
    for option in ("val_file", "test_file", "predict_file"):
        with pytest.raises(FileNotFoundError, match=f"{option}: there is no file 'gone.jsonl'"):
            module("./no-tokenizer", train, **{option: "gone.jsonl"}).prepare_data()
    with pytest.raises(ValueError, match=r"there is no folder '\./no-tokenizer'"):
        module("./no-tokenizer", train).prepare_data()


def test_missing_template_is_refused_early(write: Write, make_tokenizer: Callable[..., Any]) -> None:
    bare = make_tokenizer(None)
    data = module(bare, write("train.jsonl", pairs(2)))
    with pytest.raises(ValueError, match="the tokenizer has no chat template; set chat_template"):
        data.prepare_data()
    with pytest.raises(ValueError, match="the tokenizer has no chat template; set chat_template"):
        data.setup("fit")
    data = module(bare, write("train.jsonl", pairs(2)), chat_template="none")
    data.setup("fit")
    assert sorted(answers(data.train_dataloader(), bare)) == ["one two<|im_end|>", "one<|im_end|>"]


def test_bad_record_is_reported_with_file_and_line(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", [*pairs(2), {"prompt": "x", "completion": ""}])
    with pytest.raises(DataFileError, match=r"train\.jsonl:3: field 'completion' is empty"):
        module(tokenizer, path).setup("fit")


def test_split_that_cannot_be_made_is_an_error(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", [{"prompt": "Good?", "completion": str(i)} for i in range(5)])
    with pytest.raises(ValueError, match=r"the validation split is empty: val_fraction=0\.5 of .* all 5 example\(s\)"):
        module(tokenizer, path, val_fraction=0.5).setup("fit")


def test_stage_without_data_says_what_to_set(write: Write, tokenizer: Any) -> None:
    data = module(tokenizer, write("train.jsonl", pairs(2)))
    for stage in ("validate", "test", "predict"):  # Lightning does so where the user gives another loader, too
        data.setup(stage)
        with pytest.raises(RuntimeError, match=r"the training data were not set up; call setup\(\) first"):
            data.train_dataloader()
    with pytest.raises(ValueError, match="there are no test data; set test_file"):
        data.test_dataloader()
    with pytest.raises(ValueError, match="there are no prediction data; set predict_file or test_file"):
        data.predict_dataloader()
    assert len(data.val_dataloader()) == 0
    data.setup("validate")
    with pytest.raises(ValueError, match="there are no validation data; set val_file or val_fraction"):
        data.val_dataloader()


# With Lightning


class Recorder(LightningModule):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "predict": []}

    def training_step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.seen["train"].append(batch)
        return self.weight * 1.0

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.seen["val"].append(batch)

    def predict_step(self, batch: dict[str, Any]) -> torch.Tensor:
        self.seen["predict"].append(batch)
        return batch["input_ids"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(**{**quiet, "enable_model_summary": False, "max_epochs": 1, "log_every_n_steps": 1, **options})


def uses_trainer(test: Any) -> Any:
    """Lets warnings pass that Lightning gives whatever the data: no workers, and its own use of a deprecated class."""
    for pattern in ("ignore:.*does not have many workers:UserWarning", "ignore:.*LeafSpec:FutureWarning"):
        test = pytest.mark.filterwarnings(pattern)(test)
    return test


@uses_trainer
@pytest.mark.filterwarnings("ignore:Total length of `NoValidationData` across ranks is zero")  # what we want it to ask
@pytest.mark.parametrize("val_fraction", [0.0, 0.5])
def test_trainer_fits_with_and_without_validation_data(write: Write, tokenizer: Any, val_fraction: float) -> None:
    data = module(tokenizer, write("train.jsonl", pairs(8)), val_fraction=val_fraction, batch_size=4)
    model = Recorder()
    trainer().fit(model, datamodule=data)
    assert len(model.seen["train"]) == (1 if val_fraction else 2)
    assert len(model.seen["val"]) == (2 if val_fraction else 0)  # the sanity check and the epoch's end
    assert data.state_dict() == {}
    assert not data.hparams, "a checkpoint's paths must not override the command line's"


@uses_trainer
def test_trainer_predicts(write: Write, tokenizer: Any) -> None:
    data = module(tokenizer, write("train.jsonl", pairs(2)), test_file=write("test.jsonl", pairs(3)))
    model = Recorder()
    trainer().predict(model, datamodule=data)
    assert model.seen["predict"][0]["completion"] == [pair["completion"] for pair in pairs(3)]


@uses_trainer
@pytest.mark.filterwarnings(
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)  # Python 3.12 on DataLoader's fork
def test_a_worker_process_gives_the_same_batches(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", pairs(9))
    runs = []
    for workers in (0, 1):
        data = module(tokenizer, path, batch_size=4, num_workers=workers)
        data.setup("fit")
        loader = data.train_dataloader()
        assert loader.persistent_workers == bool(workers)
        epochs = [sorted(answers(loader, tokenizer)) for _ in range(2)]
        assert epochs[0] == epochs[1]
        runs.append(epochs)
    assert runs[0] == runs[1]


@uses_trainer
@pytest.mark.filterwarnings("ignore:Total length of `NoValidationData` across ranks is zero")
def test_another_loader_is_used_after_a_data_module(write: Write, tokenizer: Any) -> None:
    data = module(tokenizer, write("train.jsonl", pairs(4)), batch_size=4)
    model = Recorder()
    run = trainer()
    run.fit(model, datamodule=data)
    mine = torch.utils.data.DataLoader(list(data.train_dataloader()), batch_size=None)  # type: ignore[arg-type]
    run.validate(model, dataloaders=mine, verbose=False)
    run.predict(model, dataloaders=mine, return_predictions=False)
    assert [len(model.seen[what]) for what in ("val", "predict")] == [1, 1]
    with pytest.raises(ValueError, match="there are no validation data; set val_file or val_fraction"):
        run.validate(model, datamodule=data)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_batch_name_their_adapters(write: Write, tokenizer: Any, streaming: bool) -> None:
    names = ["legal", "support", "support", "legal", "legal"]
    records = [{**pair, "expert": name} for pair, name in zip(pairs(5), names, strict=True)]
    expected = {pair["prompt"]: name for pair, name in zip(pairs(5), names, strict=True)}
    file = write("train.jsonl", records)
    data = module(
        tokenizer, file, test_file=file, adapter_field="expert", batch_size=2, streaming=streaming, shuffle_buffer=2
    )
    data.trainer = Trainer(logger=False, accelerator="cpu", max_steps=1)
    data.setup()
    batches = list(islice(data.train_dataloader(), 3))
    shown = prompts(batches, data.tokenizer)
    assert [expected[prompt] for prompt in shown] == [name for batch in batches for name in batch["adapter"]]
    assert [name for batch in data.predict_dataloader() for name in batch["adapter"]] == names
    assert [name for batch in data.test_dataloader() for name in batch["adapter"]] == names


def test_records_without_the_field_of_their_adapter_are_refused(write: Write, tokenizer: Any) -> None:
    with pytest.raises(DataFileError, match="field 'expert' is missing"):
        module(tokenizer, write("train.jsonl", pairs(2)), adapter_field="expert").setup("fit")
    with pytest.raises(ValueError, match="packing and adapter_field exclude each other"):
        module(tokenizer, write("train.jsonl", pairs(2)), adapter_field="expert", packing=True)
