"""Feed tokenized records: how a data module's records become rows of tokens, and these become batches."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from genlora_lightning.data._loading import (
    LengthGroupedSampler,
    PadCollator,
    largest_number,
    load_tokenizer,
    map_examples,
    padding_id,
    tokenizer_identity,
)
from genlora_lightning.data._mixture import Sources
from genlora_lightning.data._records import SPLITS, RecordDataModule, check_at_least_one
from genlora_lightning.training.resumable import ResumableDataLoader


class FileDataModule(RecordDataModule):
    """Reads, checks, splits and tokenizes files; a subclass says what a record is.

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
        for name, value in {"max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}.items():
            check_at_least_one(name, value)
        super().__init__(
            files=files,
            val_fraction=val_fraction,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
        )
        self.max_length = max_length
        self.pad_to_multiple_of = pad_to_multiple_of
        self.group_by_length = group_by_length
        self.cache_dir = cache_dir
        self._tokenizer_source = tokenizer
        # Said, because transformers asks on the terminal where it is left open.
        self._tokenizer_options = {"trust_remote_code": bool(trust_remote_code), "revision": revision}
        self._tokenizer: Any = None
        self._largest_token: dict[str, int] = {}

    # What a subclass says.

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

    def _batch_keys(self, split: str, rows: Any) -> tuple[str, ...]:
        """Returns the columns that go into a batch."""
        raise NotImplementedError

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
        super().prepare_data()
        _ = self.tokenizer

    @override
    def train_dataloader(self) -> Any:
        """Returns shuffled batches; the order depends on `seed` only and is a new one in each epoch."""
        rows = self.rows("train")
        generator = torch.Generator().manual_seed(self.seed)
        if self.group_by_length:
            sampler = LengthGroupedSampler(list(rows["length"]), self.batch_size, generator)
            return self._loader("train", sampler=sampler, generator=generator)
        return self._loader("train", shuffle=True, generator=generator)

    # What reports, and the model, want to know.

    @property
    def largest_token(self) -> int:
        """The largest token number of all splits that were set up; 0 for none."""
        return max(self._largest_token.values(), default=0)

    @property
    def longest(self) -> int:
        """The length that the longest sequence of all splits that were set up has in a batch; 0 for none."""
        longest = max((counts["longest"] for counts in self.counts.values()), default=0)
        return -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

    # How it is done.

    @override
    def _make_rows(self, split: str, examples: list[dict[str, Any]]) -> Any:
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
        self.counts[split] = counts
        self._largest_token[split] = largest_number(rows, "input_ids")
        rows = rows if len(kept) == len(lengths) else rows.select(kept)
        self._finished(split, examples)
        return rows

    @override
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
