"""Tokenize records, and group them into batches; what both data modules need of other libraries."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

from genlora_lightning.data._chat import IGNORE_INDEX
from genlora_lightning.data._hub import bars_on_terminals_only, import_datasets

#: Batches that are sorted by length together: more waste less padding, fewer mix better.
POOL_BATCHES = 50


def load_tokenizer(source: Any, **options: Any) -> Any:
    """Returns a tokenizer from a Hugging Face id, a local folder, or a tokenizer object.

    Args:
        source: What the tokenizer is made from.
        options: For `from_pretrained`.

    Raises:
        TypeError: It is something else.
        ValueError: The folder is missing or holds no tokenizer, or the id cannot be fetched.
    """
    if not isinstance(source, str):
        if not callable(source) or not hasattr(source, "pad_token_id"):
            raise TypeError(f"tokenizer must be an id, a folder or a tokenizer, got {type(source).__name__}")
        return source
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise ValueError(f"tokenizer: there is no folder {source!r} (looked in {Path.cwd()})")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "trust_remote_code" in str(error) and not options.get("trust_remote_code"):
            raise ValueError(f"tokenizer {source!r}: {reason} Set trust_remote_code to run it.") from error
        raise ValueError(
            f"tokenizer {source!r} is neither a folder with a tokenizer nor an id that can be fetched (no network, "
            f"no such id, or no access): {reason}"
        ) from error


def padding_id(tokenizer: Any) -> int:
    """Returns the token that fills batches; any will do, because the attention mask hides it."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def map_examples(
    examples: list[dict[str, Any]],
    encode: Callable[[dict[str, Any]], list[dict[str, Any]]],
    columns: dict[str, Any],
    outputs: dict[str, Any],
    *,
    description: str,
    cache_dir: str | None,
    identity: Callable[[], str],
) -> Any:
    """Applies `encode` to each example, with a progress bar on a terminal.

    Everything stays in memory, and nothing is ever taken from a cache, unless `cache_dir` is given. Then the result is
    kept there under the digest of the examples themselves and of `identity()`, not of names and times of files: what
    was made from other contents can never be taken for it.

    Args:
        examples: The examples, as checked rows.
        encode: Makes the output rows of an example.
        columns: The `datasets` features of the examples.
        outputs: The `datasets` features of the output rows.
        description: The label of the progress bar.
        cache_dir: A folder for tokenized data, or None.
        identity: Returns a text that differs whenever `encode` would give another result.

    Returns:
        The `datasets.Dataset` of the output rows.
    """
    datasets = import_datasets()
    options: dict[str, Any] = {"keep_in_memory": True, "new_fingerprint": uuid.uuid4().hex}
    if cache_dir is not None:
        digest = hashlib.sha256(identity().encode())
        digest.update(json.dumps(examples, sort_keys=True).encode())
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        file = Path(cache_dir) / f"{digest.hexdigest()[:40]}.arrow"
        options = {"cache_file_name": str(file), "load_from_cache_file": True, "new_fingerprint": file.stem}
    rows = datasets.Dataset.from_list(examples, features=datasets.Features(columns))

    def encode_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        batched = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        encoded = [row for example in batched for row in encode(example)]
        return {name: [row[name] for row in encoded] for name in outputs}

    with bars_on_terminals_only(datasets):
        return rows.map(
            encode_batch,
            batched=True,
            batch_size=100,  # the bar moves, and a table of a batch is soon made
            remove_columns=rows.column_names,
            features=datasets.Features(outputs),
            desc=description,
            **options,
        )


def largest_number(rows: Any, column: str) -> int:
    """Returns the largest number in a column of lists of numbers; 0 if there is none."""
    from pyarrow import compute

    table = rows.with_format("arrow")[:]  # as they are: a Python list of a million rows takes seconds
    found = compute.max(compute.list_flatten(table[column])).as_py()
    return 0 if found is None else int(found)


def tokenizer_identity(tokenizer: Any) -> str:
    """Returns a text that differs between tokenizers that tokenize differently."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return f"{type(tokenizer).__name__} {tokenizer.special_tokens_map} {state}"


@dataclass(frozen=True)
class PadCollator:
    """Pads rows to the longest of their batch, rounded up to a multiple.

    Args:
        keys: The fields that go into a batch.
        pad_token_id: Fills `input_ids`; `attention_mask` is 0 there and token labels are -100.
        multiple: Lengths are rounded up to a multiple of it.
        side: "right" for training, "left" where the model is to go on writing at the end.
    """

    keys: tuple[str, ...]
    pad_token_id: int
    multiple: int
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns a batch: tensors (batch, length) for tokens, (batch, n) for n numbers, lists for texts."""
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple) * self.multiple
        batch: dict[str, Any] = {}
        for key in self.keys:
            values = [row[key] for row in rows]
            if isinstance(values[0], list) and not (values[0] and isinstance(values[0][0], float)):
                batch[key] = self._pad(values, length, self.pad_token_id if key == "input_ids" else IGNORE_INDEX)
            elif isinstance(values[0], str):
                batch[key] = values
            else:
                batch[key] = torch.tensor(values)
        batch["attention_mask"] = self._pad([[1] * len(row["input_ids"]) for row in rows], length, 0)
        return batch

    def _pad(self, rows: list[list[int]], length: int, fill: int) -> Tensor:
        padded = torch.full((len(rows), length), fill)
        for target, row in zip(padded, rows, strict=True):
            target[slice(0, len(row)) if self.side == "right" else slice(length - len(row), length)] = torch.tensor(row)
        return padded


class LengthGroupedSampler(Sampler[int]):
    """A shuffled order in which the members of a batch have similar lengths, so that little is padded.

    Args:
        lengths: The length of each example.
        batch_size: Consecutive indices that form a batch.
        generator: The source of randomness; every epoch draws a new order from it.
    """

    def __init__(self, lengths: list[int], batch_size: int, generator: torch.Generator) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.generator = generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        # Only the last batch may be smaller, so what does not fill a batch is set aside before batches are shuffled.
        whole = len(order) - len(order) % self.batch_size
        pool_size = POOL_BATCHES * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, whole, pool_size):
            pool = sorted(order[start : min(start + pool_size, whole)], key=self.lengths.__getitem__)
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        for index in torch.randperm(len(batches), generator=self.generator).tolist():
            yield from batches[index]
        yield from order[whole:]
