"""Load data for text classification: one text and one label a record."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from typing_extensions import override

from genlora_lightning.data._base import FileDataModule
from genlora_lightning.data._files import Record, normalized, read_records, text_field
from genlora_lightning.data._loading import import_datasets
from genlora_lightning.errors import DataFileError


class TextClassificationDataModule(FileDataModule):
    """Labelled texts from JSONL or CSV files.

    Labels are names or whole numbers. Batches are dictionaries of ``input_ids`` and ``attention_mask`` (batch, length)
    and ``labels`` (batch,): the label's place in `label_names`. Batches for prediction have labels where the file has.

    Args:
        tokenizer: A Hugging Face id, a local folder, or a tokenizer.
        train_file: Training data, .jsonl or .csv.
        val_file: Validation data.
        test_file: Test data.
        predict_file: Texts for prediction; labels are optional. Without it, those of ``test_file`` are taken.
        val_fraction: The share of ``train_file`` to hold out for validation when there is no ``val_file``, about the
            same of each label. Texts that differ at most in case and white space stay on one side.
        text_column: The field with the text.
        label_column: The field with the label.
        label_names: The labels in the order of their numbers. A label in a file is one of the names, or a name's place
            in this list, from 0. If not given, the labels are those of ``train_file``, sorted (as numbers, if all are).
        batch_size: Examples in a training batch, per device.
        eval_batch_size: Examples in a batch of validation, test and prediction; ``batch_size`` if not given.
        max_length: The longest sequence, in tokens. Longer texts lose their end; how many is reported.
        seed: Decides the split and the order of training examples.
        num_workers: Processes that make batches. The data are tokenized once, in memory, so 0 is rarely slow.
        pad_to_multiple_of: Batches are padded to a multiple of so many tokens.
        group_by_length: Make training batches of examples of similar length, which saves padding. It has no effect
            where Lightning puts its distributed sampler in place.
        cache_dir: A folder in which tokenized data are kept for the next run. By default nothing is written.
        trust_remote_code: Run the Python code that comes with the tokenizer.
        revision: The tokenizer's branch, tag or commit on the Hub.

    Raises:
        ValueError: An argument is out of its range, or arguments exclude each other; the message names both.
    """

    def __init__(
        self,
        tokenizer: str | Any,
        train_file: str,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        val_fraction: float = 0.0,
        text_column: str = "text",
        label_column: str = "label",
        label_names: list[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        max_length: int = 256,
        seed: int = 42,
        num_workers: int = 0,
        pad_to_multiple_of: int = 8,
        group_by_length: bool = False,
        cache_dir: str | None = None,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer=tokenizer,
            files={"train": train_file, "val": val_file, "test": test_file, "predict": predict_file},
            val_fraction=val_fraction,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            max_length=max_length,
            seed=seed,
            num_workers=num_workers,
            pad_to_multiple_of=pad_to_multiple_of,
            group_by_length=group_by_length,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
        if text_column == label_column:
            raise ValueError(f"text_column and label_column are both {text_column!r}")
        if label_names is not None and (len(label_names) < 2 or len(set(label_names)) < len(label_names)):
            raise ValueError(f"label_names must be at least two distinct names, got {label_names}")
        self.text_column = text_column
        self.label_column = label_column
        self._label_names = label_names

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of their numbers; read from the training file if they were not given.

        Raises:
            DataFileError: A label of the training file is missing or malformed, or all are equal.
        """
        if self._label_names is None:
            path = self.files["train"]
            assert path is not None, "train_file is required"
            found = {self._label_text(record) for record in read_records(path, "train_file")}
            if len(found) < 2:
                raise DataFileError(path, f"all records have the label {found.pop()!r}; there is nothing to tell apart")
            self._label_names = sorted(found, key=int) if all(map(_is_integer, found)) else sorted(found)
        return list(self._label_names)

    @property
    def num_labels(self) -> int:
        """The number of labels."""
        return len(self.label_names)

    def _label_text(self, record: Record) -> str:
        label = record.fields.get(self.label_column)
        if isinstance(label, int) and not isinstance(label, bool):
            return str(label)
        if self.label_column in record.fields and not isinstance(label, str):
            reason = f"field {self.label_column!r} must be a string or a whole number, got {label!r:.80}"
            raise DataFileError(record.where, reason)
        return text_field(record, self.label_column).strip()

    def _label_index(self, record: Record) -> int:
        names = self.label_names
        label = self._label_text(record)
        if label in names:
            return names.index(label)
        if _is_integer(label) and 0 <= int(label) < len(names) and not all(map(_is_integer, names)):
            return int(label)
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise DataFileError(record.where, f"unknown label {label!r}; known are {shown}")

    @override
    def _parse(self, record: Record, split: str) -> dict[str, Any]:
        text = text_field(record, self.text_column)
        if split == "predict" and record.fields.get(self.label_column) in (None, ""):
            return {"where": record.where, "text": text, "labels": None}
        return {"where": record.where, "text": text, "labels": self._label_index(record)}

    @override
    def _duplicate_key(self, example: dict[str, Any]) -> str:
        return normalized(example["text"])

    @override
    def _stratum(self, example: dict[str, Any]) -> str:
        return str(example["labels"])

    @override
    def _encoder(self, split: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        tokenizer, max_length = self.tokenizer, self.max_length

        def encode(example: dict[str, Any]) -> dict[str, Any]:
            ids = list(tokenizer(example["text"], verbose=False)["input_ids"])
            whole = len(ids)
            if whole > max_length:  # the tokenizer keeps its closing special tokens when it cuts
                ids = list(tokenizer(example["text"], truncation=True, max_length=max_length)["input_ids"])
            if not ids:
                raise DataFileError(example["where"], "the tokenizer makes no token of this text")
            return {
                "input_ids": ids,
                "length": len(ids),
                "cut_tokens": whole - len(ids),
                "labels": example["labels"],
            }

        return encode

    @override
    def _features(self, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
        datasets = import_datasets()
        text, number = datasets.Value("string"), datasets.Value("int64")
        tokens = datasets.Sequence(datasets.Value("int32"))
        columns = {"where": text, "text": text, "labels": number}
        return columns, {"input_ids": tokens, "length": number, "cut_tokens": number, "labels": number}

    @override
    def _identity(self) -> str:
        return str(self.max_length)

    @override
    def _batch_keys(self, split: str, rows: Any) -> tuple[str, ...]:
        known = split != "predict" or all(label is not None for label in rows["labels"])
        return ("input_ids", "labels") if known else ("input_ids",)


def _is_integer(label: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", label) is not None
