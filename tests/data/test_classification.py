from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from genlora_lightning.data import DataFileError, TextClassificationDataModule

Write = Callable[..., str]


def reviews(count: int = 20) -> list[dict[str, Any]]:
    return [{"text": f"one film of {i}", "label": "good" if i % 4 else "bad"} for i in range(count)]


def module(tokenizer: Any, train_file: str, **options: Any) -> TextClassificationDataModule:
    return TextClassificationDataModule(tokenizer, train_file, **options)


def labelled_texts(loader: Any, tokenizer: Any) -> list[tuple[str, int]]:
    return [
        (tokenizer.decode(ids[mask.bool()]), int(label))
        for batch in loader
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]


def test_batches_hold_padded_texts_and_label_numbers(write: Write, tokenizer_folder: str) -> None:
    data = module(tokenizer_folder, write("train.jsonl", reviews()), batch_size=8)
    data.prepare_data()
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [8, 8, 4]
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["labels"].shape == batch["input_ids"].shape[:1]
        assert batch["labels"].dtype == torch.int64
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[1] % 8 == 0
        assert batch["attention_mask"][:, 0].all(), "padding is on the right"
    assert data.label_names == ["bad", "good"]
    assert data.num_labels == 2
    expected = sorted((record["text"], int(record["label"] == "good")) for record in reviews())
    assert sorted(labelled_texts(batches, data.tokenizer)) == expected


def test_csv_and_jsonl_give_equal_batches(write: Write, tokenizer: Any) -> None:
    records = [{"sentence": f"film {i}", "stars": i % 11 + 1} for i in range(22)]
    batches = []
    for name in ("train.jsonl", "train.csv"):
        data = module(tokenizer, write(name, records), text_column="sentence", label_column="stars")
        data.setup("fit")
        assert data.label_names == [str(star) for star in range(1, 12)], "numbers are sorted as numbers"
        batches.append(list(data.train_dataloader()))
    for left, right in zip(*batches, strict=True):
        assert all(torch.equal(left[key], right[key]) for key in ("input_ids", "attention_mask", "labels"))


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_numbers_with_a_fraction_are_not_taken_for_classes(write: Write, tokenizer: Any, name: str) -> None:
    path = write(name, [{"text": f"film {i}", "label": i / 8} for i in range(1, 20)])
    with pytest.raises(
        DataFileError, match=r":[12]: .*got 0\.125; for numbers to predict set problem_type='regression'"
    ):
        module(tokenizer, path).setup("fit")
    path = write(name, [{"text": "a film", "label": 0.5}, {"text": "b film", "label": 1.5}])
    data = module(tokenizer, path, label_names=["0.5", "1.5"])
    data.setup("fit")
    assert sorted(labelled_texts(data.train_dataloader(), tokenizer)) == [("a film", 0), ("b film", 1)]


def all_labels(loader: Any) -> torch.Tensor:
    return torch.cat([batch["labels"] for batch in loader])


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
def test_several_labels_an_example(write: Write, tokenizer: Any, name: str) -> None:
    labels: list[list[Any]] = [["long", "sad"], [], ["sad"], ["funny"], [2]]
    path = write(name, [{"text": f"film {i}", "label": given} for i, given in enumerate(labels)])
    options = {"problem_type": "multi_label_classification", "label_names": ["funny", "long", "sad"]}
    data = module(tokenizer, path, test_file=path, **options)
    data.setup("fit")
    data.setup("test")
    expected = torch.tensor([[0.0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1]])
    assert torch.equal(all_labels(data.test_dataloader()), expected)
    assert torch.equal(all_labels(data.train_dataloader()).sum(0), expected.sum(0))
    found = module(
        tokenizer, write(name, [{"text": "x", "label": ["b", "a"]}, {"text": "y", "label": ["c"]}]), **options
    )
    found._label_names = None
    assert found.label_names == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv"])
@pytest.mark.parametrize("labels", [[0.25, 3, -1e-3], [[0.5, 1], [2, 3.5], [0, 0]]])
def test_numbers_to_predict(write: Write, tokenizer: Any, name: str, labels: list[Any]) -> None:
    path = write(name, [{"text": f"film {i}", "label": given} for i, given in enumerate(labels)])
    data = module(tokenizer, path, test_file=path, problem_type="regression", val_fraction=0.4)
    data.setup("fit")
    data.setup("test")
    assert torch.equal(all_labels(data.test_dataloader()), torch.tensor(labels))
    assert data.num_labels == (2 if isinstance(labels[0], list) else 1)
    data = module(tokenizer, path, predict_file=write("p.jsonl", [{"text": "x"}]), problem_type="regression")
    data.setup("predict")
    assert "labels" not in next(iter(data.predict_dataloader()))


@pytest.mark.parametrize(
    ("problem_type", "label", "message"),
    [
        ("multi_label_classification", "good", r"field 'label' must be a list of labels, such as .*, got 'good'"),
        ("multi_label_classification", ["good", "good"], r"field 'label' has a label twice"),
        ("multi_label_classification", ["good", "odd"], r"unknown label 'odd'; known are bad, good"),
        ("multi_label_classification", ["good", 0.5], r"unknown label '0\.5'"),
        ("multi_label_classification", ["good", True], r"field 'label' must be a string or a whole number, got True"),
        ("regression", "good", r"field 'label' must be a finite number, or a list of such, got 'good'"),
        ("regression", float("nan"), r"field 'label' must be a finite number, .*, got nan"),
        ("regression", 1e39, r"field 'label' must be a finite number, .*, got 1e\+39"),
        ("regression", True, r"field 'label' must be a finite number, .*, got True"),
        ("regression", [], r"field 'label' must be a finite number, .*, got \[\]"),
        ("regression", [1.0], r"field 'label' has 1 numbers where there should be 2"),
        ("regression", "", r"field 'label' is empty"),
    ],
)
def test_labels_of_another_kind_are_refused_with_their_line(
    write: Write, tokenizer: Any, problem_type: str, label: Any, message: str
) -> None:
    path = write("train.jsonl", [{"text": "x", "label": label}])
    data = module(tokenizer, path, problem_type=problem_type, label_names=["bad", "good"])
    with pytest.raises(DataFileError, match=r"train\.jsonl:1: " + message):
        data.setup("fit")


def test_list_in_a_csv_file_must_be_json(write: Write, tokenizer: Any) -> None:
    path = write("train.csv", 'text,label\nx,"[good, bad]"\n')
    data = module(tokenizer, path, problem_type="multi_label_classification", label_names=["bad", "good"])
    with pytest.raises(DataFileError, match=r"train\.csv:2: column 'label' is not valid JSON"):
        data.setup("fit")


def test_given_label_names_decide_the_numbers(write: Write, tokenizer: Any) -> None:
    records = [{"text": "a film", "label": "bad"}, {"text": "b film", "label": 0}, {"text": "c film", "label": "2"}]
    data = module(tokenizer, write("train.jsonl", records), label_names=["good", "fair", "bad"])
    assert data.num_labels == 3
    data.setup("fit")
    assert sorted(labelled_texts(data.train_dataloader(), tokenizer)) == [("a film", 2), ("b film", 0), ("c film", 2)]


def test_labels_are_known_before_setup_and_in_every_stage(write: Write, tokenizer: Any) -> None:
    train = write("train.jsonl", reviews())
    assert module(tokenizer, train).num_labels == 2
    data = module(tokenizer, train, test_file=write("test.jsonl", [{"text": "x", "label": "good"}]))
    data.setup("test")
    assert labelled_texts(data.test_dataloader(), tokenizer) == [("x", 1)]


def test_validation_split_shares_no_text_with_training_and_keeps_the_shares(write: Write, tokenizer: Any) -> None:
    records = reviews(80) + [record | {"text": record["text"].upper() + " "} for record in reviews(80)]
    data = module(tokenizer, write("train.jsonl", records), val_fraction=0.25, seed=3)
    data.setup("fit")
    train, val = (
        [(text.strip().lower(), label) for text, label in labelled_texts(loader, tokenizer)]
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert len(train) == 120
    assert len(val) == 40
    assert not {text for text, _ in train} & {text for text, _ in val}
    assert Counter(label for _, label in val) == {0: 10, 1: 30}
    again = module(tokenizer, write("train.jsonl", records[::-1]), val_fraction=0.25, seed=3)
    again.setup("validate")
    assert {text for text, _ in val} == {
        text.strip().lower() for text, _ in labelled_texts(again.val_dataloader(), tokenizer)
    }


def test_files_of_a_run_are_named_beside_its_numbers(
    tokenizer: Any, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    files = write("train.jsonl", reviews()), write("val.jsonl", reviews(4))
    with caplog.at_level("INFO"):
        module(tokenizer, files[0], val_file=files[1]).setup("fit")
        module(tokenizer, files[0], test_file=files[1]).setup("predict")
    fitted, predicted = (r.getMessage() for r in caplog.records if r.getMessage().startswith("Data of this run"))
    assert f"Data of this run (training {files[0]}, validation {files[1]}):\n" in fitted
    assert f"Data of this run (prediction {files[1]}):\n" in predicted


def test_long_texts_lose_their_end_and_are_counted(write: Write, make_tokenizer: Callable[..., Any]) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    end = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[end]
    )
    records = [*reviews(4), {"text": "one two three four five " * 30, "label": "good"}]
    data = module(tokenizer, write("train.jsonl", records), max_length=16)
    data.setup("fit")
    counts = data.summary()["train"]
    assert (counts["cut_examples"], counts["longest"], counts["dropped_examples"]) == (1, 16, 0)
    assert counts["cut_tokens"] == len(tokenizer(records[-1]["text"])["input_ids"]) - 16
    texts = [text for text, _ in labelled_texts(data.train_dataloader(), tokenizer)]
    assert all(text.endswith("<|endoftext|>") for text in texts), "closing special tokens survive the cut"
    assert "cut examples" in data.summary_table()


def test_prediction_needs_no_labels(write: Write, tokenizer: Any) -> None:
    train = write("train.jsonl", reviews())
    for name in ("predict.jsonl", "predict.csv"):
        records = [{"text": "x", "label": " "}, {"text": "y y", "label": ""}]
        for unlabelled in (records, [{"text": record["text"]} for record in records]):
            data = module(tokenizer, train, predict_file=write(name, unlabelled))
            data.setup("predict")
            (batch,) = data.predict_dataloader()
            assert set(batch) == {"input_ids", "attention_mask"}
    data = module(tokenizer, train, test_file=write("test.jsonl", reviews(3)))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["labels"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("cached", [False, True])
def test_changed_label_order_is_never_answered_from_a_cache(
    write: Write, tokenizer: Any, tmp_path: Path, cached: bool
) -> None:
    path = write("train.jsonl", reviews(8))
    runs = []
    for names in (["good", "bad"], ["bad", "good"]):
        data = module(tokenizer, path, label_names=names, cache_dir=str(tmp_path / "cache") if cached else None)
        data.setup("fit")
        runs.append(Counter(names[label] for _, label in labelled_texts(data.train_dataloader(), tokenizer)))
    assert runs[0] == runs[1] == {"good": 6, "bad": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_names": ["a"]}, r"label_names must be at least two distinct names, got \['a'\]"),
        ({"label_names": ["a", "a"]}, r"label_names must be at least two distinct names, got \['a', 'a'\]"),
        ({"text_column": "label"}, "text_column and label_column are both 'label'"),
        ({"problem_type": "ranking"}, r"problem_type must be one of single_label_\w+, .*, regression, got 'ranking'"),
        ({"problem_type": "regression", "label_names": []}, r"label_names must be at least one name, got \[\]"),
        ({"val_fraction": 2}, "val_fraction must be at least 0 and below 1, got 2"),
    ],
)
def test_bad_arguments_are_refused_at_once(tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tokenizer, "train.jsonl", **options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": "good"}, r"train\.jsonl:3: field 'text' is missing; fields found: 'label'"),
        ({"text": " ", "label": "good"}, r"train\.jsonl:3: field 'text' is empty"),
        ({"text": 3, "label": "good"}, r"train\.jsonl:3: field 'text' must be a string, got int: 3"),
        ({"text": "x"}, r"train\.jsonl:3: field 'label' is missing; fields found: 'text'"),
        ({"text": "x", "label": ""}, r"train\.jsonl:3: field 'label' is empty"),
        ({"text": "x", "label": 0.5}, r"train\.jsonl:3: field 'label' must be a string or a whole number, got 0\.5"),
        ({"text": "x", "label": "1e3"}, r"train\.jsonl:3: field 'label' must be a string or a whole .*, got 1e3; for"),
        ({"text": "x", "label": ["good"]}, r"train\.jsonl:3: field 'label' must be a string .*, got \['good'\]"),
        ({"text": "x", "label": True}, r"train\.jsonl:3: field 'label' must be a string or a whole number, got True"),
    ],
)
def test_unusable_records_are_refused_with_their_line(
    write: Write, tokenizer: Any, record: dict[str, Any], message: str
) -> None:
    data = module(tokenizer, write("train.jsonl", [*reviews(2), record]))
    with pytest.raises(DataFileError, match=message):
        data.setup("fit")


def test_unknown_label_is_reported_with_its_line_and_what_is_known(write: Write, tokenizer: Any) -> None:
    val = write("val.jsonl", [*reviews(1), {"text": "x", "label": "fair"}])
    with pytest.raises(DataFileError, match=r"val\.jsonl:2: unknown label 'fair'; known are bad, good"):
        module(tokenizer, write("train.jsonl", reviews()), val_file=val).setup("fit")
    numbered = write("train.jsonl", [{"text": "x", "label": 1}, {"text": "y", "label": 2}])
    val = write("val.jsonl", [{"text": "z", "label": 0}])
    with pytest.raises(DataFileError, match=r"val\.jsonl:1: unknown label '0'; known are 1, 2"):
        module(tokenizer, numbered, val_file=val).setup("fit")


def test_a_single_label_is_an_error(write: Write, tokenizer: Any) -> None:
    path = write("train.jsonl", [{"text": "x", "label": "good"}, {"text": "y", "label": "good"}])
    with pytest.raises(DataFileError, match=r"train\.jsonl: all records have the label 'good'"):
        module(tokenizer, path).setup("fit")


def test_text_without_tokens_is_an_error(write: Write) -> None:
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    backend.normalizer = normalizers.Replace("x", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    path = write("train.jsonl", [{"text": "y", "label": 0}, {"text": "xx", "label": 1}])
    with pytest.raises(DataFileError, match=r"train\.jsonl:2: the tokenizer makes no token of this text"):
        module(tokenizer, path).setup("fit")
