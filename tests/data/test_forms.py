from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import pytest
import torch

from genlora_lightning.data import DataFileError, InstructionDataModule
from genlora_lightning.data._documents import encode_document
from genlora_lightning.data._formats import Record
from genlora_lightning.data._forms import DOCUMENT, Conversation, parse_conversation

Write = Callable[..., str]
MakeTokenizer = Callable[..., Any]
IGNORED = -100


def parse(fields: dict[str, Any], where: str = "f.jsonl:4", **options: Any) -> Conversation:
    options = {"plain": False, "system_prompt": None, "needs_answer": True} | options
    return parse_conversation(Record(where, fields), **options)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(name: Any, value: Any = "x") -> dict[str, Any]:
    return {"from": name, "value": value}


def test_alpaca_is_a_conversation_of_two() -> None:
    expected = ([turn("user", "Add.\n\n1 and 2"), turn("assistant", "3")], [1], None)
    assert parse({"instruction": "Add.", "input": "1 and 2", "output": "3", "id": 7}) == expected
    for blank in ({}, {"input": ""}, {"input": None, "history": []}):
        assert parse({"instruction": "Add.", "output": "3", **blank}).messages[0] == turn("user", "Add.")
    asked = parse({"instruction": "Add.", "output": ""}, needs_answer=False)
    assert asked == ([turn("user", "Add.")], [], None)


def test_sharegpt_is_the_same_conversation_as_messages() -> None:
    tools = [{"type": "function"}]
    turns = [said("system", "s"), said("human", "q"), said("gpt", "a") | {"weight": 0}, said("tool", "t")]
    turns.append(said("gpt", "b"))
    names = ("system", "user", "assistant", "tool", "assistant")
    messages = [turn(role, one["value"]) for role, one in zip(names, turns, strict=True)]
    assert parse({"conversations": turns, "tools": tools}) == (messages, [4], tools)


@pytest.mark.parametrize(
    "fields", [{"instruction": "q", "output": "a"}, {"conversations": [said("human"), said("gpt")]}]
)
def test_a_system_field_is_the_system_message(fields: dict[str, Any]) -> None:
    messages, learned, _ = parse({**fields, "system": "own"}, system_prompt="general")
    assert (messages[0], learned) == (turn("system", "own"), [2])


def test_a_text_is_a_document_in_training_only() -> None:
    assert parse({"text": "x y", "label": None}) == ([turn(DOCUMENT, "x y")], [0], None)
    assert parse({"text": "x y"}, plain=True, system_prompt="s").messages == [turn(DOCUMENT, "x y")]
    with pytest.raises(DataFileError, match=r"f\.jsonl:4: needs a field 'messages', .*; fields found: 'text'"):
        parse({"text": "x"}, needs_answer=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": "q", "completion": "a", "instruction": "q", "output": "a"},
            r"has both 'prompt' and 'instruction'; keep one of them",
        ),
        (
            {"messages": [], "conversations": [], "text": ""},
            r"has both 'messages' and 'conversations'; keep",
        ),
        ({"text": "x", "label": "y"}, r"has 'text' and 'label', which is for a classifier \(TextClassif"),
        ({"text": 3}, r"field 'text' must be a string, got int: 3"),
        ({"text": " "}, r"field 'text' is empty"),
        ({"instruction": 3, "output": "a"}, r"field 'instruction' must be a string, got int"),
        ({"instruction": "q", "output": ["a"]}, r"field 'output' must be a string, got list"),
        ({"instruction": "q", "input": {}, "output": "a"}, r"field 'input' must be a string, got dict"),
        ({"instruction": "q", "output": "a", "system": 1}, r"field 'system' must be a string, got int"),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, r"has 'history', which is not read"),
        ({"conversations": "x"}, r"field 'conversations' must be a list of messages, got str"),
        ({"conversations": []}, r"field 'conversations' is an empty list"),
        ({"conversations": ["x"]}, r"conversations\[0\] must be an object with 'from' and 'value', got 'x'"),
        ({"conversations": [turn("user", "q")]}, r"turns with 'role' and 'content' belong in 'messages'"),
        ({"messages": [said("human")]}, r"turns with 'from' and 'value' belong in 'conversations'"),
        ({"conversations": [said("me")]}, r"\[0\] has the unknown role 'me'; allowed are human, gpt, system, tool"),
        ({"conversations": [said(["x"])]}, r"conversations\[0\] has the unknown role \['x'\]"),
        ({"conversations": [said("human", 3)]}, r"conversations\[0\]\.value \(human\) must be a string, got int"),
        ({"conversations": [said("human"), said("gpt", "")]}, r"conversations\[1\]\.value \(gpt\) is empty"),
        ({"conversations": [said("human")]}, r"no assistant message, so there is nothing to learn"),
        (
            {"prompt": "q", "completion": "a", "tools": [{"a": datetime.date.min}]},
            r"'tools' holds what JSON does no",
        ),
    ],
)
def test_unusable_records_are_refused_with_their_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFileError, match=r"f\.jsonl:4: .*" + message):
        parse(fields)


@pytest.mark.parametrize(
    ("fields", "renaming"),
    [
        ({"question": "q", "answer": "a"}, "'question' → 'prompt', 'answer' → 'completion'"),
        ({"Prompt": "q", "Completion": "a"}, "'Prompt' → 'prompt', 'Completion' → 'completion'"),
        ({"input": "q", "output": "a"}, "'input' → 'prompt', 'output' → 'completion'"),
        ({"instruction": "q", "response": "a", "context": ""}, "'response' → 'output'"),
        ({"promt": "q", "completion": "a"}, "'promt' → 'prompt'"),
        ({"mesages": []}, "'mesages' → 'messages'"),
        ({"dialog": [turn("user", "q")]}, "'dialog' → 'messages'"),
        ({"dialog": [said("human")]}, "'dialog' → 'conversations'"),
        ({"content": "x"}, "'content' → 'text'"),
    ],
)
def test_the_nearest_form_is_named_with_what_to_rename(fields: dict[str, Any], renaming: str) -> None:
    with pytest.raises(DataFileError, match=f"; fields found: .*; rename {renaming}$"):
        parse(fields)


def test_all_forms_are_listed_where_none_is_near() -> None:
    forms = r"'messages', or 'prompt' and 'completion', or 'instruction' and 'output' \(Alpaca\), or 'conversations' "
    with pytest.raises(DataFileError, match=forms + r"\(ShareGPT\), or 'text'; fields found: 'a', 'b'$"):
        parse({"a": 1, "b": 2})
    with pytest.raises(DataFileError, match=r"fields found: .*'f19', \.\.\.$"):
        parse({f"f{number}": 1 for number in range(5000)})


@pytest.mark.parametrize(
    ("fields", "question"),
    [
        ({"instruction": "q", "input": "", "output": "a", "text": "### q ### a"}, "q"),  # as tatsu-lab/alpaca
        (
            {"prompt": "copy", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "q",
        ),
    ],
)
def test_copies_beside_a_whole_record_are_left_out(fields, question) -> None:
    found = parse(fields)
    assert [message["content"] for message in found.messages] == [question, "a"]


def test_a_blank_column_of_a_table_is_no_form() -> None:
    row = {"messages": "", "prompt": "q", "completion": "a"}
    assert len(parse(row, where="f.csv:2").messages) == 2
    with pytest.raises(DataFileError, match="has both 'messages' and 'prompt'"):
        parse(row)


def test_forms_of_one_prompt_need_no_template() -> None:
    assert parse({"instruction": "q", "output": "a"}, plain=True).learned == [1]
    with pytest.raises(DataFileError, match="'conversations' need a chat template, but chat_template='none'"):
        parse({"conversations": [said("human"), said("gpt")]}, plain=True)
    with pytest.raises(DataFileError, match="'system' needs a chat template, but chat_template='none'"):
        parse({"instruction": "q", "output": "a", "system": "s"}, plain=True)


def batches(tokenizer: Any, file: str, **options: Any) -> list[dict[str, torch.Tensor]]:
    data = InstructionDataModule(tokenizer, file, **options)
    data.prepare_data()
    data.setup("fit")
    return list(data.train_dataloader())


def test_forms_of_the_same_conversations_give_equal_batches(write: Write, tokenizer: Any) -> None:
    pairs = [(f"one and {number}?", "It is good. " * (number + 1)) for number in range(5)]
    files = [
        [{"prompt": q, "completion": a} for q, a in pairs],
        [{"instruction": q, "output": a} for q, a in pairs],
        [{"messages": [turn("user", q), turn("assistant", a)]} for q, a in pairs],
        [{"conversations": [said("human", q), said("gpt", a)]} for q, a in pairs],
    ]
    first, *others = [batches(tokenizer, write(f"{i}.json", rows), batch_size=2) for i, rows in enumerate(files)]
    for other in others:
        for left, right in zip(first, other, strict=True):
            assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize("max_length", [2, 3, 4, 10, 100])
def test_each_token_of_a_text_is_learned_once(tokenizer: Any, length: int, max_length: int) -> None:
    text = "abcdefghijkl"[:length]
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    rows = encode_document(tokenizer, text, max_length, "f:1")
    assert all(2 <= len(row["input_ids"]) <= max_length for row in rows)
    assert [label for row in rows for label in row["labels"] if label != IGNORED] == whole[1:]
    assert [token for row in rows for token in row["input_ids"][:-1]] + whole[-1:] == whole, "each sees the one before"
    for row in rows:
        assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_a_text_begins_as_the_tokenizer_begins_it_and_needs_an_end(
    make_tokenizer: MakeTokenizer, tokenizer: Any
) -> None:
    class WithBos:
        bos_token_id, eos_token_id = 7, 9

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [7] * add_special_tokens + [1] * len(text)}

    (row,) = encode_document(WithBos(), "ab", 10, "f:1")
    assert (row["input_ids"], row["labels"]) == ([7, 1, 1, 9], [IGNORED, 1, 1, 9])
    with pytest.raises(DataFileError, match="f:1: a 'text' is learned with the tokenizer's eos_token at its end"):
        encode_document(make_tokenizer(eos_token=None), "ab", 10, "f:1")
    with pytest.raises(DataFileError, match="f:1: max_length=1 leaves nothing of a text to learn"):
        encode_document(tokenizer, "ab", 1, "f:1")


@pytest.mark.parametrize("packing", [False, True])
def test_texts_train_in_windows_without_a_template_and_loss(
    write: Write, make_tokenizer: MakeTokenizer, packing: bool
) -> None:
    tokenizer = make_tokenizer(None)
    texts = ["one two three " * 20, "The sky is blue. ", "four five " * 7]
    whole = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    data = InstructionDataModule(
        tokenizer, write("a.jsonl", [{"text": text} for text in texts]), max_length=16, batch_size=2, packing=packing
    )
    data.prepare_data()
    data.setup("fit")
    rows = list(data.train_dataloader())
    assert max(batch["input_ids"].shape[1] for batch in rows) <= 16
    learned = [label for batch in rows for label in batch["labels"].flatten().tolist() if label != IGNORED]
    assert sorted(learned) == sorted(token for ids in whole for token in ids[1:])
    counts = data.summary()["train"]
    assert counts["answer_tokens"] == len(learned)
    assert counts["cut_examples"] == counts["dropped_examples"] == 0


def test_texts_and_conversations_may_be_in_one_file(write: Write, tokenizer: Any) -> None:
    rows = [{"text": "The sky is blue."}, {"prompt": "one?", "completion": "two"}]
    (batch,) = batches(tokenizer, write("a.jsonl", rows))
    learned = {tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]}
    assert "two<|im_end|>" in learned
    assert any("sky is blue.<|im_end|>" in text for text in learned)


def test_a_text_first_does_not_excuse_a_missing_template(write: Write, make_tokenizer: MakeTokenizer) -> None:
    rows = [{"text": "The sky is blue."}, {"prompt": "one?", "completion": "two"}]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        batches(make_tokenizer(None), write("a.jsonl", rows))
