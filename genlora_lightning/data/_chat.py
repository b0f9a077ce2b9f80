"""Turn conversations into token ids and a loss mask on the answers.

The chat template decides what text the model sees. The mask is found by rendering: what the template adds after "the
conversation so far + generation prompt" is the answer and its end-of-turn token. This needs no `{% generation %}` marks
in the template, and it is verified for every example: the prompt that training shows is the prompt of generation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from genlora_lightning.data._files import Record, checked_text, text_field
from genlora_lightning.errors import DataFileError

IGNORE_INDEX = -100
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, str]
Truncation = Literal["error", "drop", "left"]


def parse_conversation(
    record: Record, *, plain: bool, system_prompt: str | None, needs_answer: bool
) -> tuple[list[Message], bool]:
    """Reads a record of `messages`, or of `prompt` and `completion`.

    Args:
        record: One record of a data file. In CSV, `messages` is JSON text.
        plain: No chat template is used, so only `prompt` and `completion` have a meaning.
        system_prompt: Put first when the conversation has no system message of its own.
        needs_answer: An assistant message must be there (training and evaluation), or may be missing (prediction).

    Returns:
        The conversation; and whether its last message is the assistant's.

    Raises:
        DataFileError: A field is missing, empty or of a wrong type, a role is unknown, or nothing is to be learned.
    """
    where, fields = record
    if "messages" in fields:
        if "prompt" in fields or "completion" in fields:
            raise DataFileError(where, "has both 'messages' and 'prompt'/'completion'; keep one of them")
        if plain:
            raise DataFileError(where, "'messages' need a chat template, but chat_template='none' was set")
        messages = _parse_messages(fields["messages"], where)
    elif "prompt" in fields:
        messages = [{"role": "user", "content": text_field(record, "prompt")}]
        if needs_answer or fields.get("completion") not in (None, ""):
            messages.append({"role": "assistant", "content": text_field(record, "completion")})
    else:
        found = ", ".join(repr(name) for name in fields) or "none"
        raise DataFileError(where, f"needs a field 'messages', or 'prompt' and 'completion'; fields found: {found}")

    roles = [message["role"] for message in messages]
    if needs_answer and "assistant" not in roles:
        raise DataFileError(where, f"no assistant message, so there is nothing to learn; roles found: {roles}")
    if "user" not in roles[: roles.index("assistant") if "assistant" in roles else None]:
        raise DataFileError(where, f"no user message before the first answer; roles found: {roles}")
    if system_prompt is not None and not {"system", "developer"} & set(roles):
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages, messages[-1]["role"] == "assistant"


def _parse_messages(value: Any, where: str) -> list[Message]:
    if isinstance(value, str) and where.rpartition(":")[0].lower().endswith(".csv"):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataFileError(where, f"column 'messages' is not valid JSON: {error}") from error
    if not isinstance(value, list):
        raise DataFileError(where, f"field 'messages' must be a list of messages, got {type(value).__name__}")
    if not value:
        raise DataFileError(where, "field 'messages' is an empty list")
    messages = []
    for index, message in enumerate(value):
        what = f"messages[{index}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataFileError(where, f"{what} must be an object with 'role' and 'content', got {message!r:.80}")
        if message.get("tool_calls"):
            raise DataFileError(where, f"{what} has tool calls, which cannot be trained on yet")
        role = message["role"]
        if role not in ROLES:
            raise DataFileError(where, f"{what} has the unknown role {role!r:.40}; allowed are {', '.join(ROLES)}")
        content = checked_text(
            message["content"], where, f"{what}.content ({role})", may_be_blank=role not in ("user", "assistant")
        )
        messages.append({"role": role, "content": content})
    return messages


class ChatEncoder:
    """Tokenizes conversations with a loss mask on the answers, within a maximum length.

    Args:
        tokenizer: A Hugging Face tokenizer.
        chat_template: None for the tokenizer's own, "none" for plain concatenation, a file, or the template's text.
        max_length: The longest sequence in tokens.
        truncation: What to do with longer ones; see `InstructionDataModule`.
        train_on: Which answers carry the loss: "all", or only the "last" of a conversation.

    Raises:
        ValueError: There is no chat template, or it is neither a file nor a template, or a plain text has no end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None,
        max_length: int,
        truncation: Truncation,
        train_on: Literal["all", "last"] = "all",
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self.train_on = train_on
        self.plain = chat_template == "none"
        self.template = None if self.plain else _resolve_template(tokenizer, chat_template)
        if self.plain and tokenizer.eos_token_id is None:
            raise ValueError("chat_template='none' ends each answer with the tokenizer's eos_token, but it has none")
        added = tokenizer.added_tokens_decoder.items()
        #: Tokens that are no plain text; an answer that ends in one of them ends there.
        self.control_ids = {*tokenizer.all_special_ids, *(number for number, token in added if token.content.strip())}
        self._bos = [tokenizer.bos_token_id] if self.plain and _adds_bos(tokenizer) else []

    def encode(self, messages: list[Message], where: str) -> dict[str, Any]:
        """Tokenizes a conversation up to its last answer.

        Returns:
            `input_ids` and `labels` of equal length (both empty if the example is dropped), `cut_tokens` left out at
            the start, and `lost_answers`: earlier answers that lost their label because the cut went through them.

        Raises:
            DataFileError: The template alters what it rendered before, or the example is too long.
        """
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        targets = [index for index in range(last + 1) if messages[index]["role"] == "assistant"]
        if self.train_on == "last":
            targets = [last]
        text = self._render(messages[: last + 1], where)
        cuts = []
        for index in targets:
            start = self._prefix_end(text, self._render(messages[:index], where, ask=True), index, where)
            end = len(text)
            if index != last:
                end = self._prefix_end(text, self._render(messages[: index + 1], where), index, where)
            if _squeezed(messages[index]["content"]) not in _squeezed(text[start:end]):
                reason = f"the chat template changes the text of messages[{index}]; it must render answers as they are"
                raise DataFileError(where, reason)
            cuts += [start, end]
        ids, positions = self._tokenize_at(text, cuts, where)

        labels = [IGNORE_INDEX] * len(ids)
        spans = []
        for start, end in zip(positions[::2], positions[1::2], strict=True):
            end = self._end_of_turn(ids, start, end)
            labels[start:end] = ids[start:end]
            spans.append((start, end))
        ids, labels = ids[: spans[-1][1]], labels[: spans[-1][1]]  # nothing is learned from what follows
        if self.plain:
            offset, eos = len(self._bos), self.tokenizer.eos_token_id
            ids = [*self._bos, *ids, eos]
            labels = [IGNORE_INDEX] * offset + [*labels, eos]
            spans = [(start + offset, end + offset) for start, end in spans]
        cut = self._tokens_to_cut(ids, spans[-1][0], text[: cuts[-2]], messages[last - 1], where)
        if cut is None:
            return {"input_ids": [], "labels": [], "cut_tokens": 0, "lost_answers": 0}
        lost = 0
        if cut:
            first, stop = self._cut_range(ids, cut)
            for start, end in spans[:-1]:
                if start <= stop:  # the cut took a part of it, or all that it answers
                    labels[start:end] = [IGNORE_INDEX] * (end - start)
                    lost += 1
            del ids[first:stop], labels[first:stop]
        return {"input_ids": ids, "labels": labels, "cut_tokens": cut, "lost_answers": lost}

    def encode_prompt(self, messages: list[Message], where: str) -> dict[str, Any]:
        """Tokenizes a conversation that the model is to continue; `input_ids` is empty if the example is dropped."""
        text = self._render(messages, where, ask=True)
        ids = self._bos + self._ids(text)
        cut = self._tokens_to_cut(ids, len(ids), text, messages[-1], where)
        if cut is None:
            return {"input_ids": [], "cut_tokens": 0}
        if cut:
            first, stop = self._cut_range(ids, cut)
            del ids[first:stop]
        return {"input_ids": ids, "cut_tokens": cut}

    def _render(self, messages: list[Message], where: str, ask: bool = False) -> str:
        if self.plain:
            return "".join(message["content"] for message in messages)
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, chat_template=self.template, tokenize=False, add_generation_prompt=ask
                )
            )
        except (TemplateError, TypeError) as error:
            reason = f"the chat template does not accept this conversation: {error} (roles: {_roles(messages)})"
            raise DataFileError(where, reason) from error

    def _prefix_end(self, text: str, prefix: str, index: int, where: str) -> int:
        if text.startswith(prefix):
            return len(prefix)
        remedy = "another chat_template" + (", or train_on='last'" if self.train_on == "all" else "")
        reason = f"the chat template rewrites the conversation around messages[{index}] once it goes on, so that answer"
        raise DataFileError(where, f"{reason} cannot be trained on as it would be generated; use {remedy}")

    def _ids(self, text: str) -> list[int]:
        # The template writes the special tokens itself: adding them again would double the beginning of the sequence.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tokenize_at(self, text: str, cuts: list[int], where: str) -> tuple[list[int], list[int]]:
        """Tokenizes `text` so that each cut (a character position) lies between two tokens."""
        ids = self._ids(text)
        prefixes = [ids if cut == len(text) else self._ids(text[:cut]) for cut in cuts]
        if all(ids[: len(prefix)] == prefix for prefix in prefixes):
            return ids, [len(prefix) for prefix in prefixes]
        # A token reaches over the border of prompt and answer. When generating, the prompt's tokens end at the border,
        # so the pieces are tokenized one by one; this is right if they still spell the same text.
        pieced: list[int] = []
        positions: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            pieced += self._ids(text[start:end]) if end > start else []
            positions.append(len(pieced))
        if self._decode(pieced) != self._decode(ids):
            raise DataFileError(
                where,
                "the tokenizer joins the end of the prompt and the start of the answer into one token; separate them "
                "with a space or a line break in the chat template or in the data",
            )
        return pieced, positions[:-1]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _end_of_turn(self, ids: list[int], start: int, end: int) -> int:
        """Leaves out white space that the template puts after the end-of-turn token: it is never generated."""
        for position in range(end - 1, start - 1, -1):
            if ids[position] in self.control_ids:
                return end if self._decode(ids[position + 1 : end]).strip() else position + 1
        return end

    def _tokens_to_cut(
        self, ids: list[int], answer_start: int, prompt: str, question: Message, where: str
    ) -> int | None:
        """Returns how many tokens to cut from the start, or None to drop the example; otherwise raises."""
        excess = len(ids) - self.max_length
        if excess <= 0:
            return 0
        if self.truncation == "drop":
            return None
        if self.truncation == "error":
            reason = f"{len(ids)} tokens are more than max_length={self.max_length}; raise max_length or set truncation"
            raise DataFileError(where, f"{reason} to 'left' or 'drop'")
        # At least one token of the question itself must stay, not only what the template puts behind it.
        content = question["content"].strip()
        found = prompt.rfind(content)
        closing = len(self._ids(prompt[found + len(content) :])) if found >= 0 else 0
        if self._cut_range(ids, excess)[1] >= answer_start - closing:
            reason = (
                f"nothing of the prompt would be left within max_length={self.max_length}: of {len(ids)} tokens the "
                f"answer has {len(ids) - answer_start} and what leads over to it {closing}"
            )
            raise DataFileError(where, f"{reason}; raise max_length, or set truncation='drop'")
        return excess

    def _cut_range(self, ids: list[int], cut: int) -> tuple[int, int]:
        """Returns what to remove to lose `cut` tokens at the start; a beginning-of-sequence token stays."""
        bos = self.tokenizer.bos_token_id
        first = 1 if bos is not None and ids[0] == bos and ids.count(bos) == 1 else 0
        return first, first + cut


def _resolve_template(tokenizer: Any, chat_template: str | None) -> str:
    """Returns the template's text, once it is known to be one."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    if chat_template is None:
        try:
            template = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise ValueError(
                "the tokenizer has no chat template; set chat_template to a template file (.jinja) or a template's "
                "text, or, for files of 'prompt' and 'completion', to 'none' for plain concatenation"
            ) from error
    elif "{" in chat_template:  # may be too long to ask the file system about it
        template = chat_template
    elif Path(chat_template).is_file():
        template = Path(chat_template).read_text(encoding="utf-8")
    else:
        raise ValueError(f"chat_template={chat_template!r} is neither an existing file nor a Jinja template nor 'none'")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from error
    except TemplateError:
        pass  # this template wants another conversation than our probe
    return template


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _roles(messages: list[Message]) -> str:
    return ", ".join(message["role"] for message in messages)


def _squeezed(text: str) -> str:
    return "".join(text.split())
