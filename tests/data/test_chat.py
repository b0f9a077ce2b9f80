from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from genlora_lightning.data import DataFileError
from genlora_lightning.data._chat import IGNORE_INDEX, ChatEncoder
from genlora_lightning.data._formats import Record
from genlora_lightning.data._forms import Conversation, parse_conversation
from tests.data.conftest import CHAT_TEMPLATE

MakeTokenizer = Callable[..., Any]
DIALOGUE = [
    {"role": "user", "content": "What colour is the sky?"},
    {"role": "assistant", "content": "The sky is blue."},
    {"role": "user", "content": "Is this film good?"},
    {"role": "assistant", "content": "It is good.\nSix of ten."},
]
WITH_GENERATION_MARKS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'A:\n' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ 'Q: ' + m['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:\n{% endif %}"
)


def encoder(tokenizer: Any, template: str | None = None, max_length: int = 1000, **options: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer, template, max_length, options.pop("truncation", "left"), **options)


def spans(labels: list[int]) -> list[tuple[int, int]]:
    """The runs of labelled positions."""
    edges = [i for i in range(len(labels) + 1) if _labelled(labels, i) != _labelled(labels, i - 1)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _labelled(labels: list[int], index: int) -> bool:
    return 0 <= index < len(labels) and labels[index] != IGNORE_INDEX


def learned(tokenizer: Any, row: dict[str, Any]) -> list[str]:
    return [tokenizer.decode(row["labels"][start:end]) for start, end in spans(row["labels"])]


def test_labels_are_exactly_the_answers_with_their_end_of_turn(tokenizer: Any) -> None:
    row = encoder(tokenizer).encode(DIALOGUE, "f:1")
    assert learned(tokenizer, row) == ["The sky is blue.<|im_end|>", "It is good.\nSix of ten.<|im_end|>"]
    rendered = tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == rendered.rstrip("\n")
    assert "Be helpful." in rendered, "the template's default system message must be there for this test"
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (token, IGNORE_INDEX)


def test_mask_equals_the_one_that_generation_marks_give(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(WITH_GENERATION_MARKS, bos_token="<s>", eos_token="<|endoftext|>")
    expected = tokenizer.apply_chat_template(
        DIALOGUE, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    row = encoder(tokenizer).encode(DIALOGUE, "f:1")
    length = len(row["input_ids"])
    assert row["input_ids"] == expected["input_ids"][:length]
    assert [int(label != IGNORE_INDEX) for label in row["labels"]] == expected["assistant_masks"][:length]
    assert not any(expected["assistant_masks"][length:])


def test_prompt_of_generation_is_what_training_shows_before_the_answer(tokenizer: Any) -> None:
    chat = encoder(tokenizer)
    row, prompt = chat.encode(DIALOGUE, "f:1"), chat.encode_prompt(DIALOGUE[:-1], "f:1")
    start = spans(row["labels"])[-1][0]
    assert prompt["input_ids"] == row["input_ids"][:start]


def test_only_the_last_answer_is_learned_on_request(tokenizer: Any) -> None:
    row = encoder(tokenizer, train_on="last").encode(DIALOGUE, "f:1")
    assert learned(tokenizer, row) == ["It is good.\nSix of ten.<|im_end|>"]


def test_what_follows_the_last_answer_is_left_out(tokenizer: Any) -> None:
    chat = encoder(tokenizer)
    longer = [*DIALOGUE, {"role": "user", "content": "And now?"}]
    assert chat.encode(longer, "f:1") == chat.encode(DIALOGUE, "f:1")


def test_white_space_inside_an_answer_stays(tokenizer: Any) -> None:
    messages = [DIALOGUE[0], {"role": "assistant", "content": "  blue \n\n"}]
    assert learned(tokenizer, encoder(tokenizer).encode(messages, "f:1")) == ["  blue \n\n<|im_end|>"]


def test_without_an_end_token_the_template_s_own_end_of_turn_is_learned(make_tokenizer: MakeTokenizer) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = make_tokenizer(template)
    # This template ignores add_generation_prompt, so the model has to write the header too, in training as after it.
    assert learned(tokenizer, encoder(tokenizer).encode(DIALOGUE[:2], "f:1")) == ["assistant: The sky is blue.\n"]


def test_beginning_of_sequence_is_never_doubled(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(WITH_GENERATION_MARKS, bos_token="<s>", eos_token="<|endoftext|>")
    with_automatic_bos(tokenizer)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    row = encoder(tokenizer).encode(DIALOGUE, "f:1")
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    plain = encoder(tokenizer, "none").encode(DIALOGUE[:2], "f:1")
    assert plain["input_ids"].count(tokenizer.bos_token_id) == 1
    assert plain["input_ids"][0] == tokenizer.bos_token_id
    assert learned(tokenizer, plain) == ["The sky is blue.<|endoftext|>"]


def with_automatic_bos(tokenizer: Any) -> None:
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )


def test_plain_text_is_prompt_completion_and_end_token(tokenizer: Any) -> None:
    chat = encoder(tokenizer, "none")
    messages = [{"role": "user", "content": "Q: sky? A:"}, {"role": "assistant", "content": " blue"}]
    row = chat.encode(messages, "f:1")
    assert tokenizer.decode(row["input_ids"]) == "Q: sky? A: blue<|im_end|>"
    assert learned(tokenizer, row) == [" blue<|im_end|>"]
    assert chat.encode_prompt(messages[:1], "f:1")["input_ids"] == tokenizer("Q: sky? A:")["input_ids"]


def test_prompt_keeps_its_tokens_where_the_answer_would_join_them(tokenizer: Any) -> None:
    prompt, completion = "The sk", "y is blue."
    assert tokenizer(prompt + completion)["input_ids"][:2] == tokenizer("The sky")["input_ids"]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    row = encoder(tokenizer, "none").encode(messages, "f:1")
    assert row["input_ids"][: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]
    assert learned(tokenizer, row) == ["y is blue.<|im_end|>"]


def test_words_that_cannot_be_separated_are_an_error() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "sun": 1, "flower": 2, "sunflower": 3, "</s>": 4}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")
    messages = [{"role": "user", "content": "sun"}, {"role": "assistant", "content": "flower"}]
    with pytest.raises(DataFileError, match=r"f:7: the tokenizer joins the end of the prompt and the start"):
        encoder(tokenizer, "none").encode(messages, "f:7")


# Templates


def test_missing_template_says_what_to_set(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match=r"no chat template; set chat_template to .*'none' for plain concatenation"):
        encoder(make_tokenizer(None))


def test_template_can_be_text_or_file(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    bare = make_tokenizer(None)
    for given in (template, str(tmp_path / "chat.jinja")):
        row = encoder(bare, given).encode(DIALOGUE[:2], "f:1")
        assert bare.decode(row["input_ids"]) == "[What colour is the sky?][The sky is blue.]"
    own = encoder(make_tokenizer(), template).encode(DIALOGUE[:2], "f:1")
    assert own["input_ids"] == row["input_ids"]


def test_template_that_is_neither_file_nor_jinja_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"chat_template='no/such\.jinja' is neither an existing file nor a Jinja"):
        encoder(tokenizer, "no/such.jinja")
    with pytest.raises(ValueError, match=r"not valid Jinja: .* \(line 2\)"):
        encoder(tokenizer, "{{ messages }}\n{% for m in messages %}")


def test_plain_text_needs_an_end_token(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match="eos_token, but it has none"):
        encoder(make_tokenizer(eos_token=None), "none")


def test_template_that_refuses_a_conversation_is_reported_with_its_line(tokenizer: Any) -> None:
    template = (
        "{% if messages|length > 2 %}{{ raise_exception('One turn only!') }}{% endif %}" + tokenizer.chat_template
    )
    with pytest.raises(DataFileError, match=r"f:3: the chat template does not accept .* One turn only!.*user, assist"):
        encoder(tokenizer, template).encode(DIALOGUE, "f:3")


def test_template_may_demand_more_than_a_single_question(tokenizer: Any) -> None:
    demand = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('Needs a system message') }}{% endif %}"
    messages = [{"role": "system", "content": "Be helpful."}, *DIALOGUE]
    row = encoder(tokenizer, demand + tokenizer.chat_template).encode(messages, "f:3")
    assert row == encoder(tokenizer).encode(messages, "f:3")


def test_template_that_rewrites_earlier_turns_allows_only_the_last_answer(tokenizer: Any) -> None:
    # As templates of reasoning models do: what they wrote around an answer is gone when the conversation goes on.
    template = tokenizer.chat_template.replace(
        "+ message['content'] +",
        "+ ('<think></think>' if message['role'] == 'assistant' and loop.last else '') + message['content'] +",
    )
    assert "think" in template
    with pytest.raises(DataFileError, match=r"f:3: the chat template rewrites .* messages\[1\] .*train_on='last'"):
        encoder(tokenizer, template).encode(DIALOGUE, "f:3")
    row = encoder(tokenizer, template, train_on="last").encode(DIALOGUE, "f:3")
    assert learned(tokenizer, row) == ["<think></think>It is good.\nSix of ten.<|im_end|>"]
    single = encoder(tokenizer, template).encode(DIALOGUE[:2], "f:3")
    assert learned(tokenizer, single) == ["<think></think>The sky is blue.<|im_end|>"]


def test_template_that_changes_answers_is_refused(tokenizer: Any) -> None:
    template = tokenizer.chat_template.replace("message['content']", "message['content'][:10]")
    with pytest.raises(DataFileError, match=r"f:3: the chat template changes the text of messages\[1\]"):
        encoder(tokenizer, template).encode(DIALOGUE, "f:3")


def test_template_whose_prompt_is_not_how_the_answer_starts_is_refused(tokenizer: Any) -> None:
    template = tokenizer.chat_template.replace("assistant\n", "model\n")
    with pytest.raises(DataFileError, match=r"f:3: the chat template rewrites .* use another chat_template$"):
        encoder(tokenizer, template, train_on="last").encode(DIALOGUE, "f:3")


# Length


def test_left_cuts_the_start_of_the_prompt_and_keeps_the_answer(tokenizer: Any) -> None:
    whole = encoder(tokenizer).encode(DIALOGUE[:2], "f:1")
    length = len(whole["input_ids"])
    assert encoder(tokenizer, max_length=length).encode(DIALOGUE[:2], "f:1") == whole
    row = encoder(tokenizer, max_length=length - 3).encode(DIALOGUE[:2], "f:1")
    assert (row["input_ids"], row["labels"]) == (whole["input_ids"][3:], whole["labels"][3:])
    assert (row["cut_tokens"], row["lost_answers"]) == (3, 0)


def test_left_never_leaves_an_answer_without_any_of_its_question(tokenizer: Any) -> None:
    whole = encoder(tokenizer).encode(DIALOGUE[:2], "f:1")
    answer = sum(label != IGNORE_INDEX for label in whole["labels"])
    closing = len(tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    row = encoder(tokenizer, max_length=answer + closing + 1).encode(DIALOGUE[:2], "f:1")
    assert tokenizer.decode(row["input_ids"]) == "?<|im_end|>\n<|im_start|>assistant\nThe sky is blue.<|im_end|>"
    message = (
        rf"f:9: nothing of the prompt .*max_length={answer + closing}: of {len(whole['input_ids'])} tokens the ans"
    )
    with pytest.raises(DataFileError, match=message):
        encoder(tokenizer, max_length=answer + closing).encode(DIALOGUE[:2], "f:9")
    with pytest.raises(DataFileError, match=r"nothing of the prompt .* set truncation='drop'"):
        encoder(tokenizer, max_length=answer - 1).encode(DIALOGUE[:2], "f:9")


@pytest.mark.parametrize("inside", [0, 2])
def test_earlier_answers_that_the_cut_reaches_are_not_learned(tokenizer: Any, inside: int) -> None:
    whole = encoder(tokenizer).encode(DIALOGUE, "f:1")
    start = spans(whole["labels"])[0][0]
    cut = start + inside
    row = encoder(tokenizer, max_length=len(whole["input_ids"]) - cut).encode(DIALOGUE, "f:1")
    assert row["input_ids"] == whole["input_ids"][cut:]
    assert (row["cut_tokens"], row["lost_answers"]) == (cut, 1)
    assert learned(tokenizer, row) == ["It is good.\nSix of ten.<|im_end|>"]


def test_left_keeps_a_beginning_of_sequence_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("<s>{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", bos_token="<s>")
    whole = encoder(tokenizer).encode(DIALOGUE[:2], "f:1")
    row = encoder(tokenizer, max_length=len(whole["input_ids"]) - 2).encode(DIALOGUE[:2], "f:1")
    assert row["input_ids"] == [tokenizer.bos_token_id, *whole["input_ids"][3:]]
    assert row["labels"] == [IGNORE_INDEX, *whole["labels"][3:]]


def test_drop_and_error_do_what_they_say(tokenizer: Any) -> None:
    assert encoder(tokenizer, max_length=9, truncation="drop").encode(DIALOGUE, "f:1")["input_ids"] == []
    with pytest.raises(DataFileError, match=r"f:8: \d+ tokens are more than max_length=9; raise max_length or set"):
        encoder(tokenizer, max_length=9, truncation="error").encode(DIALOGUE, "f:8")


def test_prompts_are_cut_like_examples(tokenizer: Any) -> None:
    whole = encoder(tokenizer).encode_prompt(DIALOGUE[:1], "f:1")["input_ids"]
    cut = encoder(tokenizer, max_length=len(whole) - 2).encode_prompt(DIALOGUE[:1], "f:1")
    assert cut == {"input_ids": whole[2:], "cut_tokens": 2}
    assert encoder(tokenizer, max_length=4, truncation="drop").encode_prompt(DIALOGUE[:1], "f:1")["input_ids"] == []
    with pytest.raises(DataFileError, match="nothing of the prompt"):
        encoder(tokenizer, max_length=4).encode_prompt(DIALOGUE[:1], "f:1")


# Records


def parse(fields: dict[str, Any], where: str = "f.jsonl:4", **options: Any) -> Conversation:
    options = {"plain": False, "system_prompt": None, "needs_answer": True} | options
    return parse_conversation(Record(where, fields), **options)


def user(content: Any = "q") -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any = "a") -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"body_": "x"}, r"needs a field 'messages', or 'prompt' and 'completion', or .*; fields found: 'body_'$"),
        ({"prompt": "x"}, r"field 'completion' is missing; fields found: 'prompt'"),
        ({"prompt": "x", "completion": 4}, r"field 'completion' must be a string, got int: 4"),
        ({"prompt": "x", "completion": " "}, r"field 'completion' is empty"),
        ({"prompt": "", "completion": "x"}, r"field 'prompt' is empty"),
        ({"prompt": "x", "completion": "y", "messages": []}, r"has both 'messages' and 'prompt'"),
        ({"messages": "x"}, r"'messages' must be a list of messages, got str"),
        ({"messages": []}, r"'messages' is an empty list"),
        ({"messages": [user(), "x"]}, r"messages\[1\] must be an object with 'role' and 'content', got 'x'"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"messages\[0\] must be an object with 'role'"),
        ({"messages": [user(), {"role": "gpt", "content": "x"}]}, r"messages\[1\] has the unknown role 'gpt'; allowed"),
        ({"messages": [user(), {"role": ["x"], "content": "x"}]}, r"messages\[1\] has the unknown role \['x'\]"),
        ({"messages": [user(), assistant(None)]}, r"messages\[1\]\.content \(assistant\) must be a string, got NoneTy"),
        ({"messages": [user(), assistant(" \n")]}, r"messages\[1\]\.content \(assistant\) is empty"),
        ({"messages": [user(""), assistant()]}, r"messages\[0\]\.content \(user\) is empty"),
        ({"messages": [user(), assistant() | {"tool_calls": [{}]}]}, r"messages\[1\] has tool calls"),
        ({"messages": [user(), assistant() | {"function_call": {"name": "f"}}]}, r"messages\[1\] has tool calls"),
        ({"messages": [user(), assistant() | {"weight": 0}]}, r"every answer has weight 0, so there is nothing to le"),
        ({"messages": [user(), assistant() | {"weight": 0.5}]}, r"messages\[1\]\.weight must be 0 .* or 1, got 0\.5"),
        ({"messages": [user(), assistant() | {"weight": "0"}]}, r"messages\[1\]\.weight must be 0 .* or 1, got '0'"),
        ({"messages": [user(), assistant() | {"weight": False}]}, r"messages\[1\]\.weight must be 0 .*, got False"),
        ({"messages": [user() | {"weight": 1}, assistant()]}, r"messages\[0\]\.weight is 1, but only the assistant"),
        ({"messages": [user(), assistant()], "tools": "clock"}, r"'tools' must be a list of objects.*got 'clock'"),
        ({"messages": [user(), assistant()], "tools": ["clock"]}, r"'tools' must be a list of objects"),
        ({"messages": [user(), assistant()], "tools": [{"a": "\ud800"}]}, r"'tools' is not valid Unicode text"),
        ({"messages": [user(), assistant()], "functions": [{}]}, r"has 'functions', an older form of tools"),
        ({"messages": [user()]}, r"no assistant message, so there is nothing to learn; roles found: \['user'\]"),
        ({"messages": [assistant(), user()]}, r"no user message before the first answer"),
    ],
)
def test_unusable_records_are_refused_with_their_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFileError, match=r"f\.jsonl:4: .*" + message):
        parse(fields)


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(DataFileError, match=r"'messages' need a chat template, but chat_template='none'"):
        parse({"messages": [user(), assistant()]}, plain=True)
    with pytest.raises(DataFileError, match=r"'tools' need a chat template, but chat_template='none'"):
        parse({"prompt": "q", "completion": "a", "tools": TOOLS}, plain=True)


def test_messages_in_csv_are_json_text() -> None:
    text = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    assert parse({"messages": text}, where="f.csv:2") == parse({"messages": [user(), assistant()]})
    with pytest.raises(DataFileError, match=r"f\.csv:2: column 'messages' is not valid JSON: "):
        parse({"messages": "[{"}, where="f.csv:2")


def test_prompt_and_completion_are_a_conversation_of_two() -> None:
    assert parse({"prompt": "q", "completion": "a", "id": 3}) == ([user(), assistant()], [1], None)
    assert parse({"prompt": "q"}, needs_answer=False) == ([user()], [], None)
    for blank in ("", " \n", None):
        assert parse({"prompt": "q", "completion": blank}, needs_answer=False) == ([user()], [], None)


def test_system_prompt_is_for_conversations_without_one() -> None:
    system = {"role": "system", "content": "own"}
    assert parse({"prompt": "q", "completion": "a"}, system_prompt="S")[0][0] == {"role": "system", "content": "S"}
    assert parse({"messages": [system, user(), assistant()]}, system_prompt="S")[0] == [system, user(), assistant()]


def test_answers_of_weight_0_are_not_learned(tokenizer: Any) -> None:
    silent = [user(), assistant("one") | {"weight": 0}, user(), assistant("two") | {"weight": 1}, user(), assistant()]
    for options, places in (({}, [3, 5]), ({"system_prompt": "S"}, [4, 6])):
        found = parse({"messages": silent}, **options)
        assert found.learned == places
        row = encoder(tokenizer).encode(found.messages, "f:1", found.learned)
        assert learned(tokenizer, row) == ["two<|im_end|>", "a<|im_end|>"]
        assert "one<|im_end|>" in tokenizer.decode(row["input_ids"])
    found = parse({"messages": [*silent[:4], user(), assistant("six") | {"weight": 0}]})
    for train_on in ("all", "last"):
        row = encoder(tokenizer, train_on=train_on).encode(found.messages, "f:1", found.learned)
        assert learned(tokenizer, row) == ["two<|im_end|>"]
        assert "six" not in tokenizer.decode(row["input_ids"])


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_go_to_the_chat_template(tokenizer: Any) -> None:
    told = "{% if tools %}{{ '<|im_start|>tools\n' + tools[0]['function']['name'] + '<|im_end|>\n' }}{% endif %}"
    chat = encoder(tokenizer, told + tokenizer.chat_template)
    for where, tools in (("f.jsonl:4", TOOLS), ("f.csv:4", json.dumps(TOOLS))):
        fields = {"messages": json.dumps(DIALOGUE) if ".csv" in where else DIALOGUE, "tools": tools}
        messages, places, parsed = parse(fields, where=where)
        row = chat.encode(messages, where, places, parsed)
        assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>tools\nclock<|im_end|>\n")
        assert learned(tokenizer, row) == ["The sky is blue.<|im_end|>", "It is good.\nSix of ten.<|im_end|>"]
        prompt = chat.encode_prompt(messages[:-1], where, parsed)["input_ids"]
        assert prompt == row["input_ids"][: spans(row["labels"])[-1][0]]


def test_tools_that_the_template_would_leave_out_are_refused(tokenizer: Any) -> None:
    chat = encoder(tokenizer)
    for encode in (chat.encode, chat.encode_prompt):
        with pytest.raises(DataFileError, match=r"f:3: the chat template does not take tools"):
            encode(DIALOGUE, "f:3", tools=TOOLS)
    for nothing in (None, []):
        assert parse({"messages": DIALOGUE, "tools": nothing}).tools is None
    assert parse({"messages": json.dumps(DIALOGUE), "tools": " "}, where="f.csv:2").tools is None


@pytest.mark.parametrize("template", ["chat", "none"])
@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n"])
def test_answer_that_ends_with_the_end_token_learns_it_once(tokenizer: Any, template: str, end: str) -> None:
    chat = encoder(tokenizer, None if template == "chat" else template)
    messages = DIALOGUE[: 4 if template == "chat" else 2]
    ended = [m | {"content": m["content"] + end} if m["role"] == "assistant" else m for m in messages]
    assert chat.encode(ended, "f:1") == chat.encode(messages, "f:1")
    if template == "chat":
        assert chat.encode_prompt(ended[:3], "f:1") == chat.encode_prompt(messages[:3], "f:1")


def test_end_token_that_the_template_does_not_write_stays(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [DIALOGUE[0], {"role": "assistant", "content": "blue<|im_end|>"}]
    assert learned(tokenizer, encoder(tokenizer, template).encode(messages, "f:1")) == ["blue<|im_end|>"]


# Time


class WholePrefixes(ChatEncoder):
    """Tokenizes all the text before each border, which takes quadratic time."""

    def _positions_in(self, ids: list[int], text: str, cuts: list[int]) -> list[int] | None:
        prefixes = [ids if cut == len(text) else self._ids(text[:cut]) for cut in cuts]
        return [len(prefix) for prefix in prefixes] if all(ids[: len(p)] == p for p in prefixes) else None


def _metaspace_tokenizer(scheme: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    end = AddedToken("<|im_end|>", lstrip=True, rstrip=True)
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "<|im_start|>", end], show_progress=False
    )
    backend.train_from_iterator([str(DIALOGUE)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>")


NO_CONTROL = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "marks": WITH_GENERATION_MARKS,
    "no control tokens": NO_CONTROL + "{% if add_generation_prompt %}assistant: {% endif %}",
    "no prompt": NO_CONTROL,
    "nothing between": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "rewrites": CHAT_TEMPLATE.replace("{{ '<|im_start|>' +", "{{ ('' if loop.last else '~') + '<|im_start|>' +"),
    "counts": "{{ messages|length }}" + CHAT_TEMPLATE,
}


def outcome(chat: ChatEncoder, messages: list[dict[str, str]]) -> dict[str, Any] | str:
    try:
        return chat.encode(messages, "f:1")
    except DataFileError as error:
        return str(error)


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_those_of_tokenizing_all_the_text_before_each_answer(
    make_tokenizer: MakeTokenizer, name: str
) -> None:
    odd = ["  two ", "ten<|im_start|>", "<|im_end|>", "<s>", "\n\n", "é🙂", "a" * 9, "<unk>", "<|im_sta", "rt|>"]
    generator, seen = random.Random(0), set()
    for tokenizer in (make_tokenizer(eos_token="<|endoftext|>"), *map(_metaspace_tokenizer, ("always", "first"))):
        tokenizer.chat_template = TEMPLATES[name]
        for max_length in (10**6, 60):
            new, old = (kind(tokenizer, None, max_length, "left") for kind in (ChatEncoder, WholePrefixes))
            for _ in range(20):
                messages = [m | {"content": m["content"] + generator.choice(odd)} for m in DIALOGUE]
                found = outcome(new, messages)
                assert found == outcome(old, messages), messages
                seen.add(type(found))
    assert (dict in seen) == (name not in ("rewrites", "counts")), "or the comparison would be of errors only"


# What shows in some turns only, the last of them far from the start.
LONG = TEMPLATES | {
    "numbers later questions": CHAT_TEMPLATE.replace(
        "{{ '<|im_start|>' +",
        "{{ (loop.index|string if message['role'] == 'user' and loop.index > 40 else '') + '<|im_start|>' +",
    ),
    "alternating": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHAT_TEMPLATE,
    "rewrites the one before the last": CHAT_TEMPLATE.replace(
        "{{ '<|im_start|>' +", "{{ ('~' if loop.revindex == 2 else '') + '<|im_start|>' +"
    ),
    "forgets": CHAT_TEMPLATE.replace("in messages", "in messages[-50:]"),
}


@pytest.mark.parametrize("learned", ["all", "some"])
@pytest.mark.parametrize("name", LONG)
def test_answers_of_a_long_conversation_are_those_that_rendering_all_before_each_finds(
    tokenizer: Any, name: str, learned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = LONG[name]
    messages = [{**m, "content": f"{m['content']} {turn}"} for turn in range(40) for m in DIALOGUE]
    answers = range(1, len(messages), 2)
    wanted = [index for index in answers if learned == "all" or index % 3]
    chat = encoder(tokenizer, max_length=10**6)

    def found() -> dict[str, Any] | str:
        try:
            return chat.encode(messages, "f:1", wanted)
        except DataFileError as error:
            return str(error)

    by_parts = found()
    monkeypatch.setattr("genlora_lightning.data._chat._FOUND_BY_ALL", len(messages))
    assert by_parts == found()
    bad = ("rewrites", "counts", "rewrites the one before the last", "forgets")
    assert isinstance(by_parts, str) == (name in bad), "or the comparison would be of errors only"


@pytest.mark.parametrize("name", ["chatml", "no control tokens", "alternating"])
def test_rendering_takes_time_that_grows_with_the_messages(tokenizer: Any, name: str) -> None:
    class Counting(ChatEncoder):
        messages = 0

        def _render(self, messages: list[dict[str, str]], *args: Any, **kwargs: Any) -> str:
            self.messages += len(messages)
            return super()._render(messages, *args, **kwargs)

    for turns in (5, 100):
        chat = Counting(tokenizer, LONG[name], 10**6, "left")
        assert len(spans(chat.encode(DIALOGUE * turns, "f:1")["labels"])) == 2 * turns
        assert chat.messages < 16 * len(DIALOGUE * turns)


@pytest.mark.parametrize("name", ["chatml", "no control tokens"])
def test_tokenizing_takes_time_that_grows_with_the_tokens(tokenizer: Any, name: str) -> None:
    class Counting(ChatEncoder):
        characters = 0

        def _ids(self, text: str) -> list[int]:
            self.characters += len(text)
            return super()._ids(text)

    for turns in (5, 40):
        chat = Counting(tokenizer, TEMPLATES[name], 10**6, "left")
        row = chat.encode(DIALOGUE * turns, "f:1")
        assert len(spans(row["labels"])) == 2 * turns
        assert chat.characters < 4 * len(tokenizer.decode(row["input_ids"]))
