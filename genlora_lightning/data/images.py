"""Load pictures with a class each, and decode them in the data loader's workers."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from typing_extensions import override

from genlora_lightning.backbone.pretrained import load_image_processor
from genlora_lightning.data._files import is_blank
from genlora_lightning.data._formats import Record
from genlora_lightning.data._labels import check_label_names, label_index, label_text, names_of
from genlora_lightning.data._pictures import (
    AUGMENTATIONS,
    Augmentation,
    augmented,
    decoded,
    import_pillow,
    picture_records,
    read_facts,
    split_folders,
)
from genlora_lightning.data._records import RecordDataModule
from genlora_lightning.errors import DataFileError
from genlora_lightning.fields import check_choice
from genlora_lightning.training.resumable import ResumableDataLoader


class ImageClassificationDataModule(RecordDataModule):
    """Pictures with a label each, from a folder per class, a data table, or the Hugging Face Hub.

    Batches are dictionaries of ``pixel_values`` (pictures, channels, height, width), made by the model's own image
    processor, and ``labels`` (pictures); batches for prediction have ``image``, the pictures' names, and labels where
    all are known. Pictures are decoded when a batch needs them, in ``num_workers`` processes: turned as EXIF says, in
    RGB without transparency, as transformers' pipelines do; of an animated one the first frame; 16-bit grey in 8 bits.

    When the data are set up each file is opened, but not decoded. Files of equal size with equal first and last 64 KiB
    count as one picture: such never stand on two sides of a split.

    Args:
        image_processor: A Hugging Face id, a local folder, or an image processor of transformers.
        train_file: Training data: a folder with a folder per class (pictures anywhere below it); a table, .csv, .jsonl,
            .json, .parquet or .arrow, with a path beside the table, or bytes, and a label; or a data set on the Hugging
            Face Hub, ``hf://org/name:split``. A folder with ``train``, and ``val`` or ``test``, in it gives all of
            them. A list is one set; a mapping gives each a weight: 2.0 is seen twice in an epoch.
        val_file: Validation data.
        test_file: Test data.
        predict_file: Pictures for prediction; labels are optional, and a folder may hold pictures without a folder per
            class. Without it, those of ``test_file`` are taken.
        val_fraction: The share of ``train_file`` to hold out for validation when there is no ``val_file``, about the
            same of each label.
        image_column: The field of a table with the picture.
        label_column: The field of a table with the label.
        label_names: The labels in the order of their numbers; if not given, those of ``train_file``, sorted.
        augmentation: How training pictures are varied: ``"none"``; ``"flip"``, every second one mirrored; or
            ``"crop-flip"``, also cropped to 50 to 100 percent of the area. It is drawn for each picture by ``seed``,
            whichever process makes it, so that a resumed run sees the same.
        batch_size: Pictures in a training batch, per device.
        eval_batch_size: Pictures in a batch of validation, test and prediction; ``batch_size`` if not given.
        seed: Decides the split, the order of training pictures, and the augmentation.
        num_workers: Processes that decode pictures and make batches.
        trust_remote_code: Run the Python code that comes with the image processor.
        revision: The image processor's branch, tag or commit on the Hub.

    Raises:
        ValueError: An argument is out of its range, or arguments exclude each other; the message names both.
    """

    def __init__(
        self,
        image_processor: str | Any,
        train_file: str | list[str] | dict[str, float],
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        val_fraction: float = 0.0,
        image_column: str = "image",
        label_column: str = "label",
        label_names: list[str] | None = None,
        augmentation: Augmentation = "none",
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        seed: int = 42,
        num_workers: int = 2,
        trust_remote_code: bool | None = None,
        revision: str | None = None,
    ) -> None:
        files: dict[str, Any] = {"train": train_file, "val": val_file, "test": test_file, "predict": predict_file}
        found = split_folders(train_file) if isinstance(train_file, str) else {}
        if found:
            if val_fraction > 0:  # then that is meant
                found.pop("val", None)
            files["train"] = found.pop("train")
            files |= {split: files[split] or folder for split, folder in found.items()}
        super().__init__(
            files=files,
            val_fraction=val_fraction,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        if image_column == label_column:
            raise ValueError(f"image_column and label_column are both {image_column!r}")
        check_choice("augmentation", augmentation, AUGMENTATIONS)
        check_label_names(label_names)
        self.image_column = image_column
        self.label_column = label_column
        self.augmentation = augmentation
        self._label_names = label_names
        self._names_given = label_names is not None
        self._processor_source = image_processor
        self._processor_options = {"trust_remote_code": bool(trust_remote_code), "revision": revision}
        self._processor: Any = None
        self._places: dict[str, str] = {}

    @property
    def image_processor(self) -> Any:
        """The image processor; loaded when it is first asked for."""
        if self._processor is None:
            source = self._processor_source
            own = not isinstance(source, str)
            self._processor = source if own else load_image_processor(source, **self._processor_options)
        return self._processor

    @property
    def label_names(self) -> list[str]:
        """The labels in the order of their numbers; read from the training data if they were not given.

        Raises:
            DataFileError: A picture of the training data has no label, or all have the same.
        """
        if self._label_names is None:
            labels = (self._label_text(record) for record in self.records("train"))
            self._label_names = names_of(labels, " + ".join(self.files["train"]))
        return list(self._label_names)

    @property
    def num_labels(self) -> int:
        """The number of labels."""
        return len(self.label_names)

    @override
    def prepare_data(self) -> None:
        """Checks on one process that the data are there, and fetches the image processor."""
        super().prepare_data()
        import_pillow()
        _ = self.image_processor

    @override
    def train_dataloader(self) -> Any:
        """Returns shuffled batches; order and augmentation depend on `seed` only and are new ones in each epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.augmentation == "none":
            return self._loader("train", shuffle=True, generator=generator)
        sampler = DrawingSampler(len(self.rows("train")), generator)
        return self._loader("train", sampler=sampler, generator=generator)

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Raises in this process what a worker has found wrong with a picture."""
        if isinstance(batch, DataFileError):
            raise batch
        return batch

    @override
    def duplicates(self, split: str) -> list[tuple[str, int]]:
        """Returns pictures that are several times in a split, and how many times; the most frequent first."""
        return [(self._places[digest], count) for digest, count in super().duplicates(split)]

    @override
    def _check_source(self, path: str, argument: str) -> None:
        if not os.path.isdir(path):
            super()._check_source(path, argument)

    @override
    def _read(self, path: str, argument: str) -> Iterator[Record]:
        return picture_records(path, argument, self.image_column, self.label_column)

    @override
    def _read_all(self, path: str, argument: str) -> list[Record]:
        records = list(self._read(path, argument))
        if not records:
            raise DataFileError(path, f"{argument} holds no pictures")
        alone = next((r.where for r in records if os.path.isdir(path) and self.label_column not in r.fields), None)
        if alone is not None and argument != "predict_file":
            raise DataFileError(alone, f"lies in no folder of a class; {argument} must have a folder per class")
        return records

    def _label_text(self, record: Record) -> str:
        value = record.fields.get(self.label_column)
        given = self._names_given or _is_of_folder(record)  # whose name is meant
        return label_text(value, record.where, self.label_column, names_given=given)

    @override
    def _parse(self, record: Record, split: str) -> dict[str, Any]:
        example = {"where": record.where, "image": record.fields[self.image_column], "labels": None}
        if split == "predict":
            if is_blank(record.fields.get(self.label_column)):
                return example
            text = self._label_text(record)
            if _is_of_folder(record) and text not in self.label_names:
                return example  # a folder of some other name
            return {**example, "labels": label_index(text, self.label_names, record.where)}
        return {**example, "labels": label_index(self._label_text(record), self.label_names, record.where)}

    @override
    def _examples(self, name: str, split: str) -> list[dict[str, Any]]:
        examples = super()._examples(name, split)
        facts = read_facts((example["image"], example["where"]) for example in examples)
        for example, known in zip(examples, facts, strict=True):
            example |= dataclasses.asdict(known)
            self._places.setdefault(known.digest, example["where"])
        return examples

    @override
    def _duplicate_key(self, example: dict[str, Any]) -> str:
        return str(example["digest"])

    @override
    def _stratum(self, example: dict[str, Any]) -> str:
        return str(example["labels"])

    @override
    def _make_rows(self, split: str, examples: list[dict[str, Any]]) -> Any:
        classes = Counter(example["labels"] for example in examples if example["labels"] is not None)
        self.counts[split] = {"examples": len(examples), "classes": len(classes)}
        return examples

    @override
    def _loader(self, split: str, **options: Any) -> DataLoader[Any]:
        rows = self.rows(split)
        is_training = split == "train"
        pictures = Pictures(rows, self.image_processor, self.augmentation if is_training else "none")
        known = all(row["labels"] is not None for row in rows)
        kind: type[DataLoader[Any]] = ResumableDataLoader if is_training else DataLoader
        return kind(
            pictures,
            batch_size=self.batch_size if is_training else self.eval_batch_size,
            collate_fn=PictureCollator(known, split == "predict"),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )


class DrawingSampler(Sampler[tuple[int, int]]):
    """A shuffled order, each index with a number that decides what is drawn for it, in whichever process.

    Args:
        length: How many there are.
        generator: The source of randomness; every epoch draws from it.
    """

    def __init__(self, length: int, generator: torch.Generator) -> None:
        self.length = length
        self.generator = generator

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.randperm(self.length, generator=self.generator).tolist()
        draws = torch.randint(2**31, (self.length,), generator=self.generator).tolist()
        return iter(zip(order, draws, strict=True))


class Pictures(Dataset[Any]):
    """Decoded pictures as a model takes them.

    Args:
        rows: Each picture's source, place and label.
        processor: transformers' image processor.
        augmentation: How they are varied, where an index comes with a draw.
    """

    def __init__(self, rows: list[dict[str, Any]], processor: Any, augmentation: str) -> None:
        self.rows = rows
        self.processor = processor
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int | tuple[int, int]) -> Any:
        index, draw = item if isinstance(item, tuple) else (item, 0)
        row = self.rows[index]
        try:
            name = row["image"] if isinstance(row["image"], str) else row["where"]
            known = {"where": row["where"], "image": name, "labels": row["labels"]}
            return {**known, "pixel_values": self._pixels(row, draw)}
        except DataFileError as error:
            return _told(error)

    def _pixels(self, row: dict[str, Any], draw: int) -> torch.Tensor:
        image = augmented(decoded(row["image"], row["where"]), self.augmentation, draw)
        pixels: torch.Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


@dataclass(frozen=True)
class PictureCollator:
    """Puts pictures into a batch.

    Args:
        labels: Whether all have labels.
        names: Whether the batch has the pictures' names.
    """

    labels: bool
    names: bool

    def __call__(self, rows: list[Any]) -> Any:
        """Returns the batch, or what is wrong with a picture of it."""
        broken = next((row for row in rows if isinstance(row, DataFileError)), None)
        if broken is not None:
            return broken
        first = rows[0]["pixel_values"].shape
        other = next((row for row in rows if row["pixel_values"].shape != first), None)
        if other is not None:
            reason = (
                f"the image processor makes {tuple(other['pixel_values'].shape)} of it and {tuple(first)} of another "
                "one; let it resize to one size (`do_resize`, `size` and `do_center_crop` in preprocessor_config.json)"
            )
            return _told(DataFileError(other["where"], reason))
        batch: dict[str, Any] = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        if self.labels:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        if self.names:
            batch["image"] = [row["image"] for row in rows]
        return batch


def _told(error: DataFileError) -> DataFileError:
    """Raises an error, but in a worker returns it: it would come out of torch as another one, with a traceback."""
    if get_worker_info() is None:
        raise error
    return error


def _is_of_folder(record: Record) -> bool:
    return os.path.isdir(record.where.rpartition(":")[0])
