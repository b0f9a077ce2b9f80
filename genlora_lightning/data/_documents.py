"""Cut texts that are learned as a whole into windows of tokens, so that each token is learned once."""

from __future__ import annotations

from typing import Any

from genlora_lightning.data._chat import IGNORE_INDEX, adds_bos
from genlora_lightning.errors import DataFileError


def encode_document(tokenizer: Any, text: str, max_length: int, where: str) -> list[dict[str, Any]]:
    """Tokenizes a text and the end-of-text token after it.

    A window begins with the last token of the one before, which is not learned again: it is what the next one follows.
    So every token is learned exactly once, but the first of the text, which nothing predicts.

    Args:
        tokenizer: A Hugging Face tokenizer; its beginning-of-sequence token comes first if it puts one.
        text: The text.
        max_length: The longest window, in tokens.
        where: Its place, for messages.

    Returns:
        The windows: `input_ids` and `labels` of equal length, and nothing that was cut or lost.

    Raises:
        DataFileError: The tokenizer has no end-of-sequence token, or `max_length` leaves nothing to learn.
    """
    if tokenizer.eos_token_id is None:
        raise DataFileError(where, "a 'text' is learned with the tokenizer's eos_token at its end, but it has none")
    if max_length < 2:
        raise DataFileError(where, f"max_length={max_length} leaves nothing of a text to learn; it must be at least 2")
    bos = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    ids = [*bos, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    rows = []
    for start in range(0, max(len(ids) - 1, 1), max_length - 1):
        window = ids[start : start + max_length]
        rows.append({"input_ids": window, "labels": [IGNORE_INDEX, *window[1:]], "cut_tokens": 0, "lost_answers": 0})
    return rows
