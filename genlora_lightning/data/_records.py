"""Feed the splits of a data module: which file goes where, what is held out, and when it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.data._files import check_file, held_out_indices, iterate_records, read_records
from genlora_lightning.data._formats import Record
from genlora_lightning.data._hub import import_datasets
from genlora_lightning.data._mixture import Share, Sources, mixed, weights_of
from genlora_lightning.text import text_table

_log = rank_zero_logger(__name__)

SPLITS = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}
OPTIONS = {"val": "val_file or val_fraction", "test": "test_file", "predict": "predict_file or test_file"}
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class NoValidationData(list[Any]):
    """No batches; Lightning names this class when it asks whether it was meant to have nothing to validate on."""


class RecordDataModule(LightningDataModule):
    """Reads, checks and splits records; a subclass says what one is, and what batches are made of.

    Hyperparameters are deliberately not saved into checkpoints: on the command line a checkpoint's values override what
    the user says, so a run resumed elsewhere would look for the files of the machine it came from. The run's config has
    them all.

    The arguments are explained where users see them, in the subclasses.
    """

    def __init__(
        self,
        *,
        files: dict[str, Sources | None],
        val_fraction: float,
        batch_size: int,
        eval_batch_size: int | None,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        at_least_one = {"batch_size": batch_size}
        if eval_batch_size is not None:
            at_least_one["eval_batch_size"] = eval_batch_size
        for name, value in at_least_one.items():
            check_at_least_one(name, value)
        if not isinstance(num_workers, int) or num_workers < 0:
            raise ValueError(f"num_workers must be an integer of at least 0, got {num_workers!r}")
        if not 0.0 <= val_fraction < 1.0:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction!r}")
        if val_fraction > 0 and files["val"] is not None:
            raise ValueError(
                f"val_file={files['val']!r} and val_fraction={val_fraction} exclude each other; validation data come "
                "either from a file of their own or from train_file"
            )
        self.files = {split: weights_of(sources, f"{split}_file") for split, sources in files.items()}
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._datasets: dict[str, Any] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self._keys: dict[str, Counter[str]] = {}
        self._stage: str | None = None
        self._mixture: list[Share] = []

    # What a subclass says.

    def _parse(self, record: Record, split: str) -> dict[str, Any]:
        """Returns the checked example of a record: plain values, and its place under `where`."""
        raise NotImplementedError

    def _duplicate_key(self, example: dict[str, Any]) -> str:
        """Returns what makes two examples duplicates, which may not be on two sides of a split."""
        raise NotImplementedError

    def _stratum(self, example: dict[str, Any]) -> str:
        """Returns the class of an example that a split should hold out evenly."""
        return ""

    def _make_rows(self, split: str, examples: list[dict[str, Any]]) -> Any:
        """Returns what batches of a split are made of, and notes the numbers of its `summary`."""
        raise NotImplementedError

    def _loader(self, split: str, **options: Any) -> DataLoader[Any]:
        """Returns the loader of a split that was set up."""
        raise NotImplementedError

    # What Lightning calls.

    @override
    def prepare_data(self) -> None:
        """Checks on one process that the files are there."""
        import_datasets()
        for split, paths in self.files.items():
            for path in paths:
                self._check_source(path, f"{split}_file")

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads and checks what a stage needs and was not read before.

        Args:
            stage: "fit", "validate", "test" or "predict"; None for all that there are files for.

        Raises:
            ValueError: A split is empty, or a record cannot be used (`DataFileError`).
        """
        self._stage = stage
        parsed: dict[str, list[dict[str, Any]]] = {}
        before = set(self.counts)
        for split in SPLITS if stage is None else STAGES[stage]:
            if split in self._datasets or self._is_streamed(split):
                continue
            if self._source(split) is None:
                continue  # Lightning also asks where another loader was given; whoever asks for this one is told
            examples = self._select(split, parsed)
            keys = self._keys[split] = Counter(map(self._duplicate_key, examples))
            if split == "train":
                examples, self._mixture = mixed(examples, self.files["train"], self.seed)
            self._datasets[split] = self._make_rows(split, examples)
            if split != "train" and "train" in self._keys:
                also = sum(count for key, count in keys.items() if key in self._keys["train"])
                self.counts[split]["also_in_train"] = also
        new = [split for split in self.counts if split not in before]
        if new:
            # With their files: those of a configuration that another one is laid over may have been forgotten.
            sources = {SPLITS[split]: self.files[self._source(split) or split] for split in new}
            files = ", ".join(f"{words} {' + '.join(paths)}" for words, paths in sources.items())
            _log.info(f"Data of this run ({files}):\n{self.summary_table(new)}")

    @override
    def val_dataloader(self) -> Any:
        """Returns the batches for validation; in a fit nothing if there are no validation data."""
        nothing = self._source("val") is None and self._stage != "validate"
        return NoValidationData() if nothing else self._loader("val")

    @override
    def test_dataloader(self) -> Any:
        """Returns the batches for the test."""
        return self._loader("test")

    @override
    def predict_dataloader(self) -> Any:
        """Returns the batches for prediction."""
        return self._loader("predict")

    # What reports want to know.

    def has_data(self, split: str) -> bool:
        """Returns whether the arguments name data for a split."""
        return self._source(split) is not None

    def summary(self) -> dict[str, dict[str, int]]:
        """Returns the numbers of examples and tokens, and of what was left out, of each split that was set up.

        `also_in_train` counts inputs that training shows too, as far as the training data were set up before: a result
        on those tells nothing about new ones.
        """
        return {split: dict(counts) for split, counts in self.counts.items()}

    def summary_table(self, splits: list[str] | None = None) -> str:
        """Returns `summary` as a table to print, without what is zero everywhere; the files of a mixture in another.

        Args:
            splits: The splits to show; all that were set up if None.
        """
        shown = [split for split in self.counts if splits is None or split in splits]
        names = list(dict.fromkeys(name for split in shown for name, count in self.counts[split].items() if count))
        rows = [[SPLITS[split], *(f"{self.counts[split].get(name, 0):,}" for name in names)] for split in shown]
        table = text_table(["data", *(name.replace("_", " ") for name in names)], rows)
        if "train" not in shown or len(self._mixture) < 2:
            return table
        shares = [[part.path, f"{part.weight:g}", f"{part.records:,}", f"{part.seen:,}"] for part in self._mixture]
        return f"{table}\n\n" + text_table(["training file", "weight", "records", "seen in an epoch"], shares)

    def duplicates(self, split: str) -> list[tuple[str, int]]:
        """Returns the inputs that several examples of a split share, and how many do; the most frequent first.

        Inputs count as equal that differ at most in case and white space. Copies by a weight are not counted.
        """
        return [(key, count) for key, count in self._keys[split].most_common() if count > 1]

    def load_first(self, count: int) -> None:
        """Reads the first training records as if they were all: to look at those that are streamed.

        Args:
            count: How many records.
        """
        first = (record for path in self.files["train"] for record in self._read(path, "train_file"))
        examples = [self._parse(record, "train") for record in islice(first, count)]
        self._keys["train"] = Counter(map(self._duplicate_key, examples))
        self._datasets["train"] = self._make_rows("train", examples)

    # How it is done.

    def _source(self, split: str) -> str | None:
        """Returns the argument that a split comes from, or None."""
        if self.files[split]:
            return split
        if split == "val" and self.val_fraction > 0:
            return "train"
        if split == "predict" and self.files["test"]:
            return "test"
        return None

    def first_records(self) -> Iterator[Record]:
        """Yields the first record of each file."""
        for split, paths in self.files.items():
            for path in paths:
                yield from islice(self._read(path, f"{split}_file"), 1)

    def _is_streamed(self, split: str) -> bool:
        """Returns whether a split is not read when it is set up, but while it is used."""
        return False

    def records(self, name: str) -> list[Record]:
        """Returns all records of the files of a split, which `name` says."""
        return [record for path in self.files[name] for record in self._read_all(path, f"{name}_file")]

    def _examples(self, name: str, split: str) -> list[dict[str, Any]]:
        """Returns all examples of the files `name` as examples of `split`."""
        return [self._parse(record, split) for record in self.records(name)]

    def _select(self, split: str, parsed: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Returns the examples of a split; `parsed` keeps the training file while both of its parts are needed."""
        source = self._source(split)
        assert source is not None, "only called for splits that have a source"
        if source != "train":
            return self._examples(source, split)
        examples = parsed["train"] if "train" in parsed else self._examples("train", split)
        parsed["train"] = examples
        if self.val_fraction == 0:
            return examples
        keys = [self._duplicate_key(example) for example in examples]
        kept, held = held_out_indices(keys, self.val_fraction, self.seed, [self._stratum(e) for e in examples])
        if not held:
            files = " + ".join(map(repr, self.files["train"]))
            raise ValueError(
                f"the validation split is empty: val_fraction={self.val_fraction} of {files}, where "
                f"all {len(examples)} example(s) have the same input, and equal ones stay on one side"
            )
        return [examples[index] for index in (kept if split == "train" else held)]

    def rows(self, split: str) -> Any:
        """Returns the encoded rows of a split that was set up."""
        if self._source(split) is None:
            raise ValueError(f"there are no {SPLITS[split]} data; set {OPTIONS[split]}")
        if split not in self._datasets:
            raise RuntimeError(f"the {SPLITS[split]} data were not set up; call setup() first")
        return self._datasets[split]

    # How a source is read; a subclass may know more kinds of them.

    def _check_source(self, path: str, argument: str) -> None:
        """Checks in no time that a source can be read at all."""
        check_file(path, argument)

    def _read(self, path: str, argument: str) -> Iterator[Record]:
        """Yields the records of a source, which may be none."""
        return iterate_records(path, argument)

    def _read_all(self, path: str, argument: str) -> list[Record]:
        """Returns the records of a source, at least one."""
        return read_records(path, argument)


def check_at_least_one(name: str, value: Any) -> None:
    """Checks that an argument is an integer of at least 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
