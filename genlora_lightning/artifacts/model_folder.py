"""Write a transformers model without adapters as a folder, with its tokenizer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from genlora_lightning.storage.folders import check_replaceable, write_folder

# Files that transformers' tokenizers and processors are loaded from.
_TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tekken.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


def save_model(model: Any, folder: str | os.PathLike[str], what: str, *, tokenizer: Any = None) -> Path:
    """Write a transformers model as a folder that ``from_pretrained`` loads, whole or not at all.

    Args:
        model: The model. If it was loaded from a local folder, its tokenizer's files are copied.
        folder: Where to write: nothing lies there yet, or an empty folder.
        what: What is written, for messages: ``"pruned model"``.
        tokenizer: To save beside a model from elsewhere.

    Returns:
        The folder's path.

    Raises:
        FileExistsError: The folder holds something.
        OSError: It cannot be written; then nothing is left behind.
    """

    def write(staging: Path) -> None:
        model.save_pretrained(staging)
        if not copy_tokenizer(model, staging) and tokenizer is not None:
            tokenizer.save_pretrained(staging)

    return write_folder(folder, write, _never, what)


def check_new(folder: str | os.PathLike[str], what: str) -> None:
    """Raise what :func:`save_model` would raise if there is something already, before any work is done."""
    check_replaceable(folder, _never, what)


def copy_tokenizer(model: Any, folder: Path) -> list[str]:
    """Copy the files of the tokenizer beside which a model was loaded, from a local folder; their names."""
    source = Path(str(getattr(model, "name_or_path", "") or "-"))
    names = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def _never(folder: Path) -> bool:
    return False
