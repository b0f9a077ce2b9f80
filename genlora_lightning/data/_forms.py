"""Recognise the form of a record by its fields, and read it: a conversation, or a text to go on learning.

All forms become one: messages, and which of them are learned.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any, NamedTuple

from genlora_lightning.data._files import checked_text, is_blank, listed, structured_field, text_field
from genlora_lightning.data._formats import Record, from_table
from genlora_lightning.errors import DataFileError
from genlora_lightning.fields import shown

ROLES = ("system", "developer", "user", "assistant", "tool")
#: The role of a text that is learned as a whole, and is no conversation.
DOCUMENT = "document"

Message = dict[str, str]


class Conversation(NamedTuple):
    """What a record holds: its messages, the places of the answers that carry the loss, and the tools offered."""

    messages: list[Message]
    learned: list[int]
    tools: list[Any] | None = None


class Form(NamedTuple):
    """A form of records: the field that tells it, the one that is needed for an answer, and its usual name."""

    field: str
    answer: str | None = None
    name: str = ""

    def __str__(self) -> str:
        return " and ".join(repr(field) for field in self.fields) + (f" ({self.name})" if self.name else "")

    @property
    def fields(self) -> list[str]:
        """What a record of this form has."""
        return [self.field] if self.answer is None else [self.field, self.answer]


FORMS = (
    Form("messages"),
    Form("prompt", "completion"),
    Form("instruction", "output", name="Alpaca"),
    Form("conversations", name="ShareGPT"),
    Form("text"),
)
_MEANT = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": ("question", "query", "input", "user", "human", "problem"),
    "completion": ("answer", "response", "output", "reply", "assistant", "solution", "target"),
    "instruction": ("task",),
    "output": ("response", "answer", "completion", "target"),
    "text": ("content", "document", "article", "body"),
}


class _Turns(NamedTuple):
    """How a form writes a conversation: its field, the keys of a turn, and the names of the roles."""

    field: str
    role: str
    content: str
    roles: dict[str, str]


_MESSAGES = _Turns("messages", "role", "content", {role: role for role in ROLES})
_SHAREGPT = _Turns(
    "conversations", "from", "value", {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
)


def find_form(record: Record, *, needs_answer: bool = True) -> Form:
    """Returns the one form that a record has. Of several it is the one that is complete; a text comes last.

    Args:
        record: One record of a data file.
        needs_answer: A text to learn is a form, too (training and evaluation), or is none (prediction).

    Raises:
        DataFileError: It has none or several; the message lists all, and what was probably meant.
    """
    where, fields = record
    known = [form for form in FORMS if needs_answer or form.field != "text"]
    found = [form for form in known if form.field in fields]
    if len(found) > 1 and from_table(record):  # where a row has each column, a blank one says nothing
        found = [form for form in found if not is_blank(fields[form.field])] or found
    if len(found) > 1:  # a lone question, and a text beside what it was rendered from, are copies
        whole = [form for form in found if all(field in fields for field in form.fields)]
        found = [form for form in whole if form.field != "text"] or whole or found
    if len(found) == 1:
        return found[0]
    if found:
        raise DataFileError(where, f"has both {listed([repr(form.field) for form in found], 'and')}; keep one of them")
    reason = f"needs a field {', or '.join(map(str, known))}; fields found: {_names(fields)}"
    raise DataFileError(where, reason + _renaming(fields, known, needs_answer))


def parse_conversation(record: Record, *, plain: bool, system_prompt: str | None, needs_answer: bool) -> Conversation:
    """Reads a record of any form.

    Args:
        record: One record of a data file. In a table, `messages`, `conversations` and `tools` may be JSON text.
        plain: No chat template is used, so only forms of a single prompt, and texts, have a meaning.
        system_prompt: Put first when the conversation has no system message of its own.
        needs_answer: An assistant message must be there (training and evaluation), or may be missing (prediction).

    Returns:
        The conversation; every answer is learned but those of weight 0. A text is one message of the role `DOCUMENT`.

    Raises:
        DataFileError: The record has no form that is known or several, a field is missing, empty or of a wrong type, a
            role is unknown, or nothing is to be learned.
    """
    where, fields = record
    form = find_form(record, needs_answer=needs_answer)
    if form.field == "text":
        if not is_blank(fields.get("label")):
            reason = "has 'text' and 'label', which is for a classifier (TextClassificationDataModule)"
            raise DataFileError(where, f"{reason}; to learn the text itself leave 'label' out")
        return Conversation([{"role": DOCUMENT, "content": text_field(record, "text")}], [0])
    tools = _parse_tools(record, plain)
    silent: set[int] = set()
    if form.answer is None:
        if plain:
            raise DataFileError(where, f"{form.field!r} need a chat template, but chat_template='none' was set")
        turns = _SHAREGPT if form.field == "conversations" else _MESSAGES
        messages, silent = _parse_turns(structured_field(record, turns.field), where, turns)
    else:
        messages = [{"role": "user", "content": _prompt(record, form)}]
        if needs_answer and form.answer not in fields:
            hint = _renaming(fields, [form], needs_answer)
            raise DataFileError(where, f"field {form.answer!r} is missing; fields found: {_names(fields)}{hint}")
        if needs_answer or not is_blank(fields.get(form.answer)):
            messages.append({"role": "assistant", "content": text_field(record, form.answer)})
    if form.name and not is_blank(fields.get("system")):
        if plain:
            raise DataFileError(where, "'system' needs a chat template, but chat_template='none' was set")
        system_prompt = text_field(record, "system")

    roles = [message["role"] for message in messages]
    if needs_answer and "assistant" not in roles:
        raise DataFileError(where, f"no assistant message, so there is nothing to learn; roles found: {roles}")
    if "user" not in roles[: roles.index("assistant") if "assistant" in roles else None]:
        raise DataFileError(where, f"no user message before the first answer; roles found: {roles}")
    learned = [index for index, role in enumerate(roles) if role == "assistant" and index not in silent]
    if needs_answer and not learned:
        raise DataFileError(where, "every answer has weight 0, so there is nothing to learn")
    if system_prompt is not None and not {"system", "developer"} & set(roles):
        messages.insert(0, {"role": "system", "content": system_prompt})
        learned = [index + 1 for index in learned]
    return Conversation(messages, learned, tools)


def _prompt(record: Record, form: Form) -> str:
    """Returns the question; Alpaca's `input` follows its `instruction` after a blank line."""
    prompt = text_field(record, form.field)
    if form.name != "Alpaca":
        return prompt
    if not is_blank(record.fields.get("history")) and record.fields["history"] not in ([], "[]"):
        raise DataFileError(record.where, "has 'history', which is not read; write all turns as 'messages'")
    has_input = not is_blank(record.fields.get("input"))
    return f"{prompt}\n\n{text_field(record, 'input')}" if has_input else prompt


def _parse_tools(record: Record, plain: bool) -> list[Any] | None:
    where, fields = record
    if fields.get("functions"):
        raise DataFileError(where, "has 'functions', an older form of tools; write them as 'tools'")
    if is_blank(fields.get("tools")):
        return None
    tools = structured_field(record, "tools")
    if tools == []:
        return None
    if plain:
        raise DataFileError(where, "'tools' need a chat template, but chat_template='none' was set")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise DataFileError(where, f"field 'tools' must be a list of objects, one a tool, got {shown(tools)}")
    try:
        json.dumps(tools, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataFileError(where, f"field 'tools' is not valid Unicode text: {error.reason}") from error
    except TypeError as error:  # a column of times, or of bytes
        raise DataFileError(where, f"field 'tools' holds what JSON does not know: {error}") from error
    return tools


def _parse_turns(value: Any, where: str, turns: _Turns) -> tuple[list[Message], set[int]]:
    """Returns the messages, and the places of those of weight 0."""
    field = turns.field
    if not isinstance(value, list):
        raise DataFileError(where, f"field {field!r} must be a list of messages, got {type(value).__name__}")
    if not value:
        raise DataFileError(where, f"field {field!r} is an empty list")
    messages: list[Message] = []
    silent = set()
    for index, message in enumerate(value):
        what = f"{field}[{index}]"
        if not isinstance(message, dict) or turns.role not in message or turns.content not in message:
            other = _MESSAGES if turns is _SHAREGPT else _SHAREGPT
            is_other = isinstance(message, dict) and other.role in message and other.content in message
            hint = f"; turns with {other.role!r} and {other.content!r} belong in {other.field!r}" if is_other else ""
            reason = f"must be an object with {turns.role!r} and {turns.content!r}, got {shown(message)}{hint}"
            raise DataFileError(where, f"{what} {reason}")
        if message.get("tool_calls") or message.get("function_call"):
            raise DataFileError(where, f"{what} has tool calls, which cannot be trained on yet")
        name = message[turns.role]
        role = turns.roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise DataFileError(
                where, f"{what} has the unknown role {shown(name)}; allowed are {', '.join(turns.roles)}"
            )
        content = checked_text(
            message[turns.content],
            where,
            f"{what}.{turns.content} ({name})",
            may_be_blank=role not in ("user", "assistant"),
        )
        messages.append({"role": role, "content": content})
        weight = message.get("weight")
        if weight is None:
            continue
        if isinstance(weight, bool) or weight not in (0, 1):
            raise DataFileError(where, f"{what}.weight must be 0 (not learned) or 1, got {shown(weight)}")
        if weight == 0:
            silent.add(index)
        elif role != "assistant":
            raise DataFileError(where, f"{what}.weight is 1, but only the assistant's messages can be learned")
    return messages, silent


def _names(fields: dict[str, Any]) -> str:
    return ", ".join([*map(shown, list(fields)[:20]), *(["..."] if len(fields) > 20 else [])]) or "none"


def _renaming(fields: dict[str, Any], forms: list[Form] | tuple[Form, ...], needs_answer: bool) -> str:
    """Returns how to rename fields to get the nearest form, for the end of a message; nothing if none is near."""
    lower = {name.lower(): name for name in fields}
    nearest: dict[str, str] | None = None
    for form in forms:
        renames: dict[str, str] = {}
        for wanted in form.fields if needs_answer else [form.field]:
            if wanted in fields:
                continue
            like = [name for name in (wanted, *_MEANT.get(wanted, ())) if name in lower]
            like += get_close_matches(wanted, lower, n=1, cutoff=0.75)
            like = [name for name in like if lower[name] not in renames]
            if not like:
                break
            value = fields[lower[like[0]]]
            is_sharegpt = isinstance(value, list) and value and isinstance(value[0], dict) and "from" in value[0]
            renames[lower[like[0]]] = "conversations" if wanted == "messages" and is_sharegpt else wanted
        else:
            if nearest is None or len(renames) < len(nearest):
                nearest = renames
    return f"; rename {', '.join(f'{shown(a)} → {b!r}' for a, b in nearest.items())}" if nearest else ""
