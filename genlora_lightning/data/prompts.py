"""Turn prompts into the token ids that a model goes on with, as for prediction, but without a dataset."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from genlora_lightning.data._chat import ChatEncoder
from genlora_lightning.data._files import read_records
from genlora_lightning.data._formats import Record, reader_of
from genlora_lightning.data._forms import Conversation, parse_conversation
from genlora_lightning.data._hub import PREFIX
from genlora_lightning.data._loading import PadCollator, padding_id

_STDIN = "-"


class Prompts:
    """Reads prompts and encodes conversations with a tokenizer's chat template, or as plain text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        chat_template: None for the tokenizer's own, "none" for plain text, a file, or the template's text.
        system_prompt: Put first where a conversation has no system message of its own.

    Raises:
        ValueError: There is no chat template, it is none, or plain text was asked for with a system prompt.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, system_prompt: str | None = None) -> None:
        if chat_template == "none" and system_prompt is not None:
            raise ValueError("a system prompt needs a chat template, but plain text was asked for")
        # Nothing is cut here: how much fits depends on how much is to be generated.
        self._chat = ChatEncoder(tokenizer, chat_template, max_length=sys.maxsize, truncation="error")
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt

    def of_texts(self, texts: Sequence[str]) -> list[Conversation]:
        """Make a conversation of each text.

        Raises:
            DataFileError: A text is blank.
        """
        return [self._parse(Record(f"prompt {number}", {"prompt": text})) for number, text in enumerate(texts, 1)]

    def of_file(self, path: str) -> list[Conversation]:
        """Read a data file, as for training, or else text with a prompt a line; ``-`` is standard input.

        Raises:
            FileNotFoundError: There is no such file.
            DataFileError: A record cannot be used; the message has file, line and reason.
        """
        if reader_of(path) is not None or path.startswith(PREFIX):
            return [self._parse(record) for record in read_records(path, "the file of prompts")]
        text = sys.stdin.read() if path == _STDIN else Path(path).read_text(encoding="utf-8")
        name = "standard input" if path == _STDIN else path
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        if not lines:
            raise ValueError(f"{name} holds no prompts")
        return [self._parse(Record(f"{name}:{number}", {"prompt": line})) for number, line in lines]

    def started(self) -> list[dict[str, str]]:
        """The messages that a conversation begins with: the system prompt, if there is one."""
        return [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]

    def of_messages(self, messages: list[dict[str, str]]) -> Conversation:
        """Make a conversation of messages with ``role`` and ``content``, as they are."""
        return Conversation(messages, [])

    def batch(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """Encode conversations that the model is to go on with.

        Args:
            conversations: Each ends with a question, or with an answer that is left out and becomes ``completion``.

        Returns:
            ``input_ids`` and ``attention_mask`` (conversations, tokens), padded on the left, ``prompt``: the last
            questions, and ``completion``: the answers that are known already, or ``None``.

        Raises:
            DataFileError: The chat template does not take a conversation.
        """
        rows = []
        for messages, _, tools in conversations:
            known = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
            asked = messages if known is None else messages[:-1]
            ids = self._chat.encode_prompt(asked, "the conversation", tools)["input_ids"]
            rows.append({"input_ids": ids, "prompt": asked[-1]["content"], "completion": known})
        batch = PadCollator(("input_ids", "prompt"), padding_id(self._tokenizer), multiple=1, side="left")(rows)
        return {**batch, "completion": [row["completion"] for row in rows]}

    def batches(self, conversations: Sequence[Conversation], size: int) -> Iterator[dict[str, Any]]:
        """Encode conversations, so many at a time; see :meth:`batch`."""
        for start in range(0, len(conversations), size):
            yield self.batch(conversations[start : start + size])

    def _parse(self, record: Record) -> Conversation:
        plain, system = self._chat.plain, self._system_prompt
        return parse_conversation(record, plain=plain, system_prompt=system, needs_answer=False)
