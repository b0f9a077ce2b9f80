"""Tiny tokenizers, chat templates and data files for the tests of the data modules."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

# The form that SmolLM2 and many others use, with a default system message and a line break after the end-of-turn token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "What colour is the sky? The sky is blue. Is this film good or bad? It is good.",
    "system user assistant Be helpful. one two three four five six seven eight nine ten",
]


def _byte_level_tokenizer(chat_template: str | None = CHAT_TEMPLATE, **special: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """Makes a byte-level BPE tokenizer; its chat template and special tokens can be replaced."""
    return _byte_level_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return _byte_level_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_table(path: Path, table: pyarrow.Table) -> str:
    """Writes a table as Parquet, or as a stream of Arrow, and returns the file's path."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes records to a file by its ending, or a text as it is, and returns the file's path."""

    def write(name: str, content: str | list[dict[str, Any]]) -> str:
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, fieldnames=list(content[0]))
                table.writeheader()
                for record in content:
                    table.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()})
        elif path.suffix == ".json":
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        elif path.suffix in (".parquet", ".arrow"):
            write_table(path, pyarrow.Table.from_pylist(content))
        else:
            lines = "".join(json.dumps(record) + "\n" for record in content).encode()
            path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
        return str(path)

    return write
