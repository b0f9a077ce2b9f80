"""Load texts with what is to be predicted of them: a label, several labels, or numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from typing_extensions import override

from genlora_lightning.data._base import FileDataModule
from genlora_lightning.data._files import (
    is_blank,
    normalized,
    structured_field,
    text_field,
)
from genlora_lightning.data._formats import Record
from genlora_lightning.data._hub import import_datasets
from genlora_lightning.data._labels import check_label_names, label_index, label_text, names_of
from genlora_lightning.errors import DataFileError
from genlora_lightning.fields import shown

#: What a head predicts, by transformers' names.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

_LARGEST_FLOAT32 = 3.4e38


class TextClassificationDataModule(FileDataModule):
    """Labelled texts from JSONL, JSON, CSV, Parquet or Arrow files.

    Batches are dictionaries of ``input_ids`` and ``attention_mask`` (batch, length) and ``labels``; batches for
    prediction have labels where the file has. What a label is depends on ``problem_type``:

    - ``single_label_classification``: a name or a whole number; in batches its place in `label_names` (batch,).
    - ``multi_label_classification``: a list of such, which may be empty; in batches 1.0 for each label that the text
      has, else 0.0 (batch, labels).
    - ``regression``: a finite number, or a list of as many as the first record has; in batches (batch,) or (batch,
      values).

    A list in a table may be JSON text, and in a CSV file is: ``["a", "b"]``, which CSV writes as ``"[""a"", ""b""]"``.

    Args:
        tokenizer: A Hugging Face id, a local folder, or a tokenizer.
        train_file: Training data: .jsonl, .jsonl.gz, .json (a list of records), .csv, .parquet or .arrow; or a data set
            on the Hugging Face Hub, ``hf://org/name``, ``hf://org/name:split`` or ``hf://org/name:config:split``
            (``@revision`` may follow the name), of which nothing is executed. The other files likewise. A list
            of such is one set; a mapping gives each a weight: 2.0 is seen twice in an epoch, 0.5 by half, drawn by
            ``seed``. What is held out for validation is not weighted.
        val_file: Validation data.
        test_file: Test data.
        predict_file: Texts for prediction; labels are optional. Without it, those of ``test_file`` are taken.
        val_fraction: The share of ``train_file`` to hold out for validation when there is no ``val_file``, about the
            same of each label. Texts that differ at most in case and white space stay on one side.
        text_column: The field with the text.
        label_column: The field with the label.
        label_names: The labels in the order of their numbers. A label in a file is one of the names, or a name's place
            in this list, from 0. If not given, the labels are those of ``train_file``, sorted (as numbers, if all are);
            numbers with a fraction are then taken for a mistake. For regression the names of the values.
        problem_type: What a label is; null: ``single_label_classification``.
        batch_size: Examples in a training batch, per device.
        eval_batch_size: Examples in a batch of validation, test and prediction; ``batch_size`` if not given.
        max_length: The longest sequence, in tokens. Longer texts lose their end; how many is reported.
        seed: Decides the split and the order of training examples.
        num_workers: Processes that make batches. The data are tokenized once, in memory, so 0 is rarely slow.
        pad_to_multiple_of: Batches are padded to a multiple of so many tokens.
        group_by_length: Make batches of examples of similar length, which saves padding; predictions keep their file's
            order. In training it has no effect where Lightning puts its distributed sampler in place.
        cache_dir: A folder in which tokenized data are kept for the next run. By default nothing is written.
        trust_remote_code: Run the Python code that comes with the tokenizer.
        revision: The tokenizer's branch, tag or commit on the Hub.

    Raises:
        ValueError: An argument is out of its range, or arguments exclude each other; the message names both.
    """

    def __init__(
        self,
        tokenizer: str | Any,
        train_file: str | list[str] | dict[str, float],
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        val_fraction: float = 0.0,
        text_column: str = "text",
        label_column: str = "label",
        label_names: list[str] | None = None,
        problem_type: ProblemType | None = None,
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
        self.problem_type: ProblemType = problem_type or "single_label_classification"
        if self.problem_type not in get_args(ProblemType):
            raise ValueError(f"problem_type must be one of {', '.join(get_args(ProblemType))}, got {problem_type!r}")
        check_label_names(label_names, least=1 if self.problem_type == "regression" else 2)
        self.text_column = text_column
        self.label_column = label_column
        self._label_names = label_names
        self._names_given = label_names is not None

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of their numbers; read from the training file if they were not given.

        Raises:
            DataFileError: A label of the training file is missing or malformed, or all are equal.
        """
        if self._label_names is None:
            records = self.records("train")
            if self.problem_type == "regression":
                self._label_names = [f"LABEL_{index}" for index in range(len(self._values(records[0])))]
            else:
                found = {label for record in records for label in self._label_texts(record)}
                self._label_names = names_of(found, " + ".join(self.files["train"]))
        return list(self._label_names)

    @property
    def num_labels(self) -> int:
        """The number of labels, or of values to predict."""
        return len(self.label_names)

    def _label_field(self, record: Record) -> Any:
        """Returns the field with the label; a list in a CSV file, which is JSON text, as a list."""
        name = self.label_column
        if name in record.fields and not isinstance(record.fields[name], str):
            return record.fields[name]
        text = text_field(record, name).strip()
        if self.problem_type == "single_label_classification" or not text.startswith("["):
            return text
        return structured_field(record, name)

    def _label_texts(self, record: Record) -> list[str]:
        label = self._label_field(record)
        if self.problem_type == "single_label_classification":
            return [self._label_text(record, label)]
        if not isinstance(label, list):
            reason = f'field {self.label_column!r} must be a list of labels, such as ["a", "b"], got {shown(label)}'
            raise DataFileError(record.where, reason)
        return [self._label_text(record, one) for one in label]

    def _label_text(self, record: Record, label: Any) -> str:
        hint = "for numbers to predict set problem_type='regression', for names that look like numbers "
        return label_text(label, record.where, self.label_column, names_given=self._names_given, hint=hint)

    def _values(self, record: Record) -> list[float]:
        label = self._label_field(record)
        values = []
        for value in label if isinstance(label, list) and label else [label]:
            try:
                number = float("nan") if isinstance(value, (bool, list)) else float(value)
            except (TypeError, ValueError, OverflowError):
                number = float("nan")
            if not abs(number) <= _LARGEST_FLOAT32:
                reason = f"field {self.label_column!r} must be a finite number, or a list of such, got {shown(label)}"
                raise DataFileError(record.where, reason)
            values.append(number)
        return values

    def _label(self, record: Record) -> int | float | list[float]:
        """Returns a record's label as batches have it."""
        if self.problem_type == "regression":
            values = self._values(record)
            if len(values) != self.num_labels:
                reason = (
                    f"field {self.label_column!r} has {len(values)} numbers where there should be {self.num_labels}"
                )
                raise DataFileError(record.where, reason)
            return values if len(values) > 1 else values[0]
        indices = [label_index(label, self.label_names, record.where) for label in self._label_texts(record)]
        if self.problem_type == "single_label_classification":
            return indices[0]
        if len(set(indices)) < len(indices):
            raise DataFileError(record.where, f"field {self.label_column!r} has a label twice")
        return [float(index in indices) for index in range(self.num_labels)]

    @override
    def _parse(self, record: Record, split: str) -> dict[str, Any]:
        text = text_field(record, self.text_column)
        if split == "predict" and is_blank(record.fields.get(self.label_column)):
            return {"where": record.where, "text": text, "labels": None}
        return {"where": record.where, "text": text, "labels": self._label(record)}

    @override
    def _duplicate_key(self, example: dict[str, Any]) -> str:
        return normalized(example["text"])

    @override
    def _stratum(self, example: dict[str, Any]) -> str:
        return "" if self.problem_type == "regression" else str(example["labels"])

    @override
    def _encoder(self, split: str) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
        tokenizer, max_length = self.tokenizer, self.max_length

        def encode(example: dict[str, Any]) -> list[dict[str, Any]]:
            ids = list(tokenizer(example["text"], verbose=False)["input_ids"])
            whole = len(ids)
            if whole > max_length:  # the tokenizer keeps its closing special tokens when it cuts
                ids = list(tokenizer(example["text"], truncation=True, max_length=max_length)["input_ids"])
            if not ids:
                raise DataFileError(example["where"], "the tokenizer makes no token of this text")
            cut = whole - len(ids)
            return [{"input_ids": ids, "length": len(ids), "cut_tokens": cut, "labels": example["labels"]}]

        return encode

    @override
    def _features(self, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
        datasets = import_datasets()
        text, number = datasets.Value("string"), datasets.Value("int64")
        tokens = datasets.Sequence(datasets.Value("int32"))
        label = number
        if self.problem_type != "single_label_classification":
            label = datasets.Value("float32")
            if self.problem_type == "multi_label_classification" or self.num_labels > 1:
                label = datasets.Sequence(label)
        columns = {"where": text, "text": text, "labels": label}
        return columns, {"input_ids": tokens, "length": number, "cut_tokens": number, "labels": label}

    @override
    def _identity(self) -> str:
        return f"{self.max_length} {self.problem_type}"

    @override
    def _batch_keys(self, split: str, rows: Any) -> tuple[str, ...]:
        known = split != "predict" or all(label is not None for label in rows["labels"])
        return ("input_ids", "labels") if known else ("input_ids",)
