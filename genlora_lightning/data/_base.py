"""Feed the splits of a data module: which file goes where, when it is read, and how batches come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.data._files import check_file, held_out_indices, iterate_records, read_records
from genlora_lightning.data._formats import Record
from genlora_lightning.data._hub import import_datasets
from genlora_lightning.data._loading import (
    LengthGroupedSampler,
    PadCollator,
    largest_number,
    load_tokenizer,
    map_examples,
    padding_id,
    tokenizer_identity,
)
from genlora_lightning.data._mixture import Share, Sources, mixed, weights_of
from genlora_lightning.text import text_table
from genlora_lightning.training.resumable import ResumableDataLoader

_log = rank_zero_logger(__name__)

SPLITS = {"train": "training", "val": "validation", "test": "test", "predict": "prediction"}
OPTIONS = {"val": "val_file or val_fraction", "test": "test_file", "predict": "predict_file or test_file"}
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class NoValidationData(list[Any]):
    """No batches; Lightning names this class when it asks whether it was meant to have nothing to validate on."""


class FileDataModule(LightningDataModule):
    """Reads, checks, splits and tokenizes files; a subclass says what a record is.

    Hyperparameters are deliberately not saved into checkpoints: on the command line a checkpoint's values override what
    the user says, so a run resumed elsewhere would look for the files of the machine it came from. The run's config has
    them all.

    The arguments are explained where users see them, in the subclasses.
    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        files: dict[str, Sources | None],
        val_fraction: float,
        batch_size: int,
        eval_batch_size: int | None,
        max_length: int,
        seed: int,
        num_workers: int,
        pad_to_multiple_of: int,
        group_by_length: bool,
        cache_dir: str | None,
        trust_remote_code: bool | None,
        revision: str | None,
    ) -> None:
        super().__init__()
        at_least_one = {"batch_size": batch_size, "max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}
        if eval_batch_size is not None:
            at_least_one["eval_batch_size"] = eval_batch_size
        for name, value in at_least_one.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
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
        self.max_length = max_length
        self.seed = seed
        self.num_workers = num_workers
        self.pad_to_multiple_of = pad_to_multiple_of
        self.group_by_length = group_by_length
        self.cache_dir = cache_dir
        self._tokenizer_source = tokenizer
        # Said, because transformers asks on the terminal where it is left open.
        self._tokenizer_options = {"trust_remote_code": bool(trust_remote_code), "revision": revision}
        self._tokenizer: Any = None
        self._datasets: dict[str, Any] = {}
        self._summary: dict[str, dict[str, int]] = {}
        self._keys: dict[str, Counter[str]] = {}
        self._stage: str | None = None
        self._mixture: list[Share] = []
        self._largest_token: dict[str, int] = {}

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

    def _encoder(self, split: str) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
        """Returns the function that turns an example into rows: `input_ids` (empty: dropped) and what else one has."""
        raise NotImplementedError

    def _features(self, split: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the `datasets` features of examples and of encoded rows."""
        raise NotImplementedError

    def _identity(self) -> str:
        """Returns a text that differs between settings that encode differently, the tokenizer apart."""
        raise NotImplementedError

    def _finished(self, split: str, examples: list[dict[str, Any]]) -> None:
        """May look at the examples of a split once, when all could be encoded."""

    # What Lightning calls.

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; loaded when it is first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._tokenizer_source, **self._tokenizer_options)
        return self._tokenizer

    @override
    def prepare_data(self) -> None:
        """Checks on one process that the files are there, and fetches the tokenizer."""
        import_datasets()
        for split, paths in self.files.items():
            for path in paths:
                check_file(path, f"{split}_file")
        _ = self.tokenizer

    @override
    def setup(self, stage: str | None = None) -> None:
        """Reads, checks and tokenizes what a stage needs and was not read before.

        Args:
            stage: "fit", "validate", "test" or "predict"; None for all that there are files for.

        Raises:
            ValueError: A split is empty, or a record cannot be used (`DataFileError`).
        """
        self._stage = stage
        parsed: dict[str, list[dict[str, Any]]] = {}
        before = set(self._summary)
        for split in SPLITS if stage is None else STAGES[stage]:
            if split in self._datasets:
                continue
            if self._source(split) is None:
                continue  # Lightning also asks where another loader was given; whoever asks for this one is told
            examples = self._select(split, parsed)
            keys = self._keys[split] = Counter(map(self._duplicate_key, examples))
            if split == "train":
                examples, self._mixture = mixed(examples, self.files["train"], self.seed)
            self._datasets[split] = self._encode(split, examples)
            if split != "train" and "train" in self._keys:
                also = sum(count for key, count in keys.items() if key in self._keys["train"])
                self._summary[split]["also_in_train"] = also
        new = [split for split in self._summary if split not in before]
        if new:
            # With their files: those of a configuration that another one is laid over may have been forgotten.
            sources = {SPLITS[split]: self.files[self._source(split) or split] for split in new}
            files = ", ".join(f"{words} {' + '.join(paths)}" for words, paths in sources.items())
            _log.info(f"Data of this run ({files}):\n{self.summary_table(new)}")

    @override
    def train_dataloader(self) -> Any:
        """Returns shuffled batches; the order depends on `seed` only and is a new one in each epoch."""
        rows = self.rows("train")
        generator = torch.Generator().manual_seed(self.seed)
        if self.group_by_length:
            sampler = LengthGroupedSampler(list(rows["length"]), self.batch_size, generator)
            return self._loader("train", sampler=sampler, generator=generator)
        return self._loader("train", shuffle=True, generator=generator)

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

    # What reports, and the model, want to know.

    @property
    def largest_token(self) -> int:
        """The largest token number of all splits that were set up; 0 for none."""
        return max(self._largest_token.values(), default=0)

    @property
    def longest(self) -> int:
        """The length that the longest sequence of all splits that were set up has in a batch; 0 for none."""
        longest = max((counts["longest"] for counts in self._summary.values()), default=0)
        return -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

    def summary(self) -> dict[str, dict[str, int]]:
        """Returns the numbers of examples and tokens, and of what was left out, of each split that was set up.

        `also_in_train` counts inputs that training shows too, as far as the training data were set up before: a result
        on those tells nothing about new ones.
        """
        return {split: dict(counts) for split, counts in self._summary.items()}

    def summary_table(self, splits: list[str] | None = None) -> str:
        """Returns `summary` as a table to print, without what is zero everywhere; the files of a mixture in another.

        Args:
            splits: The splits to show; all that were set up if None.
        """
        shown = [split for split in self._summary if splits is None or split in splits]
        names = list(dict.fromkeys(name for split in shown for name, count in self._summary[split].items() if count))
        rows = [[SPLITS[split], *(f"{self._summary[split].get(name, 0):,}" for name in names)] for split in shown]
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
                yield from islice(iterate_records(path, f"{split}_file"), 1)

    def records(self, name: str) -> list[Record]:
        """Returns all records of the files of a split, which `name` says."""
        return [record for path in self.files[name] for record in read_records(path, f"{name}_file")]

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

    def _encode(self, split: str, examples: list[dict[str, Any]]) -> Any:
        columns, outputs = self._features(split)
        rows = map_examples(
            examples,
            self._encoder(split),
            columns,
            outputs,
            description=f"Tokenizing {SPLITS[split]} data",
            cache_dir=self.cache_dir,
            identity=lambda: (
                f"{version('genlora-lightning')} {split} {self._identity()} {tokenizer_identity(self.tokenizer)}"
            ),
        )
        tallies = [name for name in outputs if name.endswith(("_tokens", "_answers"))]
        numbers = rows.select_columns(["length", *tallies])[:]  # all at once: row by row is far slower
        lengths = numbers["length"]
        kept = [index for index, length in enumerate(lengths) if length]
        if not kept:
            raise ValueError(
                f"the {SPLITS[split]} split is empty: each of its {len(lengths)} example(s) has more tokens than "
                f"max_length={self.max_length}, and truncation='drop' leaves them out"
            )
        counts = {"examples": len(kept), "tokens": sum(lengths), "longest": max(lengths)}
        counts |= {name: sum(numbers[name]) for name in tallies}
        counts["cut_examples"] = sum(1 for cut in numbers["cut_tokens"] if cut)
        counts["dropped_examples"] = len(lengths) - len(kept)
        self._summary[split] = counts
        self._largest_token[split] = largest_number(rows, "input_ids")
        rows = rows if len(kept) == len(lengths) else rows.select(kept)
        self._finished(split, examples)
        return rows

    def rows(self, split: str) -> Any:
        """Returns the encoded rows of a split that was set up."""
        if self._source(split) is None:
            raise ValueError(f"there are no {SPLITS[split]} data; set {OPTIONS[split]}")
        if split not in self._datasets:
            raise RuntimeError(f"the {SPLITS[split]} data were not set up; call setup() first")
        return self._datasets[split]

    def _loader(self, split: str, **options: Any) -> DataLoader[Any]:
        rows = self.rows(split)
        if self.group_by_length and split in ("val", "test"):
            # The rows and not a sampler, which Lightning would replace on several devices.
            generator = torch.Generator().manual_seed(self.seed)
            rows = rows.select(list(LengthGroupedSampler(list(rows["length"]), self.eval_batch_size, generator)))
        collate = PadCollator(
            keys=self._batch_keys(split, rows),
            pad_token_id=padding_id(self.tokenizer),
            multiple=self.pad_to_multiple_of,
            side="left" if split == "predict" else "right",
        )
        kind: type[DataLoader[Any]] = ResumableDataLoader if split == "train" else DataLoader
        return kind(
            rows,
            batch_size=self.batch_size if split == "train" else self.eval_batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _batch_keys(self, split: str, rows: Any) -> tuple[str, ...]:
        """Returns the columns that go into a batch."""
        raise NotImplementedError
