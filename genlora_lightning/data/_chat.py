"""Turn conversations into token ids and a loss mask on the answers.

The chat template decides what text the model sees. The mask is found by rendering: what the template adds after "the
conversation so far + generation prompt" is the answer and its end-of-turn token. This needs no `{% generation %}` marks
in the template, and it is verified for every example: the prompt that training shows is the prompt of generation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from genlora_lightning.data._forms import Message
from genlora_lightning.errors import DataFileError

IGNORE_INDEX = -100
_FOUND_BY_ALL = 8
Truncation = Literal["error", "drop", "left"]


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
        control = {number: token.content for number, token in added if token.content.strip()}
        #: Tokens that are no plain text; an answer that ends in one of them ends there.
        self.control_ids = {*tokenizer.all_special_ids, *control}
        # The unknown token stands for what is in no text. Longer names first: they may begin as shorter ones do.
        self._control = {text: number for number, text in control.items() if number != tokenizer.unk_token_id}
        names = sorted(self._control, key=len, reverse=True)
        self._control_names = re.compile("|".join(map(re.escape, names))) if names else None
        self._bos = [tokenizer.bos_token_id] if self.plain and adds_bos(tokenizer) else []

    def encode(
        self,
        messages: list[Message],
        where: str,
        learned: Sequence[int] | None = None,
        tools: list[Any] | None = None,
    ) -> dict[str, Any]:
        """Tokenizes a conversation up to its last answer that is learned.

        Args:
            messages: The conversation.
            where: Its place, for messages.
            learned: The places of the answers that carry the loss; all if None.
            tools: What the chat template is told of tools.

        Returns:
            `input_ids` and `labels` of equal length (both empty if the example is dropped), `cut_tokens` left out at
            the start, and `lost_answers`: earlier answers that lost their label because the cut went through them.

        Raises:
            DataFileError: The template alters what it rendered before, does not take tools, or the example is too long.
        """
        targets = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        targets = targets if learned is None else list(learned)
        last = targets[-1]
        if self.train_on == "last":
            targets = [last]
        messages, text = self._render_whole(messages[: last + 1], where, tools)
        cuts: list[int] = []
        passed = [0]  # the ends of the answers that were found
        for number, index in enumerate(targets, 1):
            start, end = None, None
            # Rendering all that precedes each answer takes quadratic time, so of many answers only every so many-th is
            # found that way: those at powers of two, whose conversations together are twice as long as the whole one.
            if number > _FOUND_BY_ALL and number & (number - 1) and index != last:
                start, end = self._answer_by_part(messages, text, index, where, tools, passed[-2:], cuts[-1])
            if start is None or end is None:
                start = self._prefix_end(text, self._render(messages[:index], where, tools, ask=True), index, where)
                end = len(text)
                if index != last:
                    end = self._prefix_end(text, self._render(messages[: index + 1], where, tools), index, where)
            passed.append(index + 1)
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

    def encode_prompt(self, messages: list[Message], where: str, tools: list[Any] | None = None) -> dict[str, Any]:
        """Tokenizes a conversation that the model is to continue; `input_ids` is empty if the example is dropped."""
        messages, text = self._render_whole(messages, where, tools, ask=True)
        ids = self._bos + self._ids(text)
        cut = self._tokens_to_cut(ids, len(ids), text, messages[-1], where)
        if cut is None:
            return {"input_ids": [], "cut_tokens": 0}
        if cut:
            first, stop = self._cut_range(ids, cut)
            del ids[first:stop]
        return {"input_ids": ids, "cut_tokens": cut}

    def _render_whole(
        self, messages: list[Message], where: str, tools: list[Any] | None, ask: bool = False
    ) -> tuple[list[Message], str]:
        """Returns a conversation and its text, in which no answer has its end token twice.

        Raises:
            DataFileError: There are tools, and the template takes none.
        """
        text = self._render(messages, where, tools, ask)
        if tools is not None and text == self._render(messages, where, None, ask):
            reason = "the chat template does not take tools: it renders the conversation with and without them alike"
            raise DataFileError(where, f"{reason}; use one that does, or leave 'tools' out")
        own = [self._without_own_end(message, text) for message in messages]
        if own == messages:
            return messages, text
        return own, self._render(own, where, tools, ask)

    def _without_own_end(self, message: Message, text: str) -> Message:
        """Returns an answer without the end token that it brings along, where another one follows in `text`."""
        content = message["content"].rstrip()
        if message["role"] != "assistant" or self._control_names is None:
            return message
        ends = [name for name in self._control if content.endswith(name)]
        if not ends:
            return message
        end = max(ends, key=len)
        twice = end == self.tokenizer.eos_token
        if not self.plain:
            twice = re.search(re.escape(content) + r"\s*" + re.escape(end), text) is not None
        return {**message, "content": content.removesuffix(end)} if twice else message

    def _render(self, messages: list[Message], where: str, tools: list[Any] | None, ask: bool = False) -> str:
        if self.plain:
            return "".join(message["content"] for message in messages)
        from jinja2.exceptions import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=self.template, tokenize=False, add_generation_prompt=ask
                )
            )
        except (TemplateError, TypeError) as error:
            reason = f"the chat template does not accept this conversation: {error} (roles: {_roles(messages)})"
            raise DataFileError(where, reason) from error

    def _answer_by_part(
        self,
        messages: list[Message],
        text: str,
        index: int,
        where: str,
        tools: list[Any] | None,
        passed: list[int],
        position: int,
    ) -> tuple[int, int] | tuple[None, None]:
        """Finds where an answer is in `text` by what the template adds to a shorter conversation.

        The shorter one is the first exchange and the one before; what follows it must stand in `text` where the answer
        before ended.

        Args:
            messages: The conversation.
            text: All of it.
            index: The answer's place.
            where: For messages.
            tools: What the chat template is told of tools.
            passed: The ends of the last two answers that were found, as places in the conversation.
            position: The end of the last one in `text`.

        Returns:
            Where the answer starts and ends, or None and None where the template does otherwise.
        """
        before, done = passed
        first = next(place for place, message in enumerate(messages) if message["role"] == "assistant") + 1
        shorter = [*messages[:first], *messages[max(before, first) : done]]
        try:
            known = self._render(shorter, where, tools)
            asked = self._render([*shorter, *messages[done:index]], where, tools, ask=True)
            answered = self._render([*shorter, *messages[done : index + 1]], where, tools)
        except DataFileError:
            return None, None
        for longer in (asked, answered):
            if not (longer.startswith(known) and text.startswith(longer[len(known) :], position)):
                return None, None
        return position + len(asked) - len(known), position + len(answered) - len(known)

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
        positions = self._positions_in(ids, text, cuts)
        if positions is not None:
            return ids, positions
        # A token reaches over the border of prompt and answer. When generating, the prompt's tokens end at the border,
        # so the pieces are tokenized one by one; this is right if they still spell the same text.
        pieced: list[int] = []
        positions = []
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

    def _positions_in(self, ids: list[int], text: str, cuts: list[int]) -> list[int] | None:
        """Returns how many of `ids` the text before each cut has, or None where a token reaches over a cut.

        That is the number of tokens of `text[:cut]`, if `ids` begins with them. To tokenize all of it for each cut
        would take quadratic time: a part of it is enough that begins at a control token, because no token reaches into
        one, or at the cut before, where one begins as well.
        """
        anchors = self._control_anchors(ids, text)
        positions: list[int] = []
        before, passed = (0, 0), 0
        for cut in cuts:
            if cut == len(text):
                positions.append(len(ids))
                continue
            while passed < len(anchors) and anchors[passed][0] < cut:
                passed += 1
            anchor = anchors[passed - 1] if passed else (0, 0)
            # All tokenizers do not begin a text as they go on with it, so the last resort is all the text.
            for start, index in (max(anchor, before), anchor, (0, 0)):
                part = self._ids(text[start:cut])
                if ids[index : index + len(part)] == part:
                    break
            else:
                return None
            before = cut, index + len(part)
            positions.append(before[1])
        return positions

    def _control_anchors(self, ids: list[int], text: str) -> list[tuple[int, int]]:
        """Returns where control tokens are, in the text and in `ids`; nothing if it cannot be told."""
        if self._control_names is None:
            return []
        numbers = set(self._control.values())
        in_text = [(match.start(), self._control[match[0]]) for match in self._control_names.finditer(text)]
        in_ids = [(index, number) for index, number in enumerate(ids) if number in numbers]
        if [number for _, number in in_text] != [number for _, number in in_ids]:
            return []
        return [(start, index) for (start, _), (index, _) in zip(in_text, in_ids, strict=True)]

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


def adds_bos(tokenizer: Any) -> bool:
    """Returns whether a tokenizer puts a beginning-of-sequence token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _roles(messages: list[Message]) -> str:
    return ", ".join(message["role"] for message in messages)


def _squeezed(text: str) -> str:
    return "".join(text.split())
