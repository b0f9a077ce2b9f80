"""The quality benchmark's questions: no leakage between splits, and a packed evaluation that equals the plain one."""

from __future__ import annotations

import gettext
import io
import struct

import pytest
import torch
from torch.nn import functional as F

from benchmarks.quality import debian, questions
from benchmarks.quality.language import LanguageModel, QuestionTask, all_answers, decoder_arguments, right_answers
from benchmarks.quality.questions import Encoded, Question, _choices, _numbers, split
from tests.models import tiny_llama

QUESTIONS = [
    Encoded([1, 2, 3, 4], [[5, 6], [7, 8, 9], [10]], 1),
    Encoded([11, 12], [[13, 14, 15], [16]], 0),
    Encoded([17, 18, 19, 20, 21, 22], [[23], [24]], 1),
]


@pytest.fixture
def model():
    return LanguageModel(tiny_llama().model.eval())


@torch.no_grad()
def test_answers_packed_behind_their_question_score_as_each_on_its_own(model):
    batch, owners = all_answers(QUESTIONS, torch.float32)
    logits = model(batch["inputs"], batch["places"], **decoder_arguments(batch))
    packed = F.cross_entropy(logits, batch["targets"], reduction="none")
    for number, question in enumerate(QUESTIONS):
        for index, answer in enumerate(question.answers):
            alone = right_answers([Encoded(question.prompt, [answer], 0)])
            plain = model(torch.tensor([question.prompt + answer]), alone["places"])
            expected = F.cross_entropy(plain, torch.tensor(answer), reduction="none")
            torch.testing.assert_close(packed[owners == 1000 * number + index], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_no_loss(model):
    task = object.__new__(QuestionTask)
    together = right_answers(QUESTIONS)
    sums = [(task.loss(model, b := right_answers([q])) * len(b["targets"])).item() for q in QUESTIONS]
    assert task.loss(model, together).item() == pytest.approx(sum(sums) / len(together["targets"]), rel=1e-5)


def test_number_is_right_exactly_if_greedy_generation_writes_it(model):
    task = object.__new__(QuestionTask)
    prompt = [3, 1, 4]
    written = []
    for _ in range(3):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + written]), torch.tensor([len(prompt + written) - 1]))
        written.append(int(logits.argmax()))
    wrong = [*written[:2], (written[2] + 1) % 64]
    task.splits = {"val": [Encoded(prompt, [written], 0), Encoded(prompt, [wrong], 0)]}
    assert task.evaluate(model, "val")["accuracy"] == 0.5


def test_likeliest_answer_counts_as_given(model):
    task = object.__new__(QuestionTask)
    task.splits = {"val": QUESTIONS}
    found = task.evaluate(model, "val")
    best = []
    for question in QUESTIONS:
        losses = [task.loss(model, right_answers([Encoded(question.prompt, [a], 0)])) for a in question.answers]
        best.append(int(torch.stack(losses).argmin()) == question.right)
    assert found["accuracy"] == pytest.approx(sum(best) / 3)


def test_no_context_stands_in_two_splits_and_the_order_depends_on_the_text_alone():
    questions = [Question(f"Context {i // 3}", f"Question {i}?", ("a", "b"), 0) for i in range(60)]
    parts = split([*questions, questions[0]], (10, 8))
    contexts = [{question.context for question in part} for part in parts.values()]
    assert len(set.union(*contexts)) == sum(map(len, contexts))
    assert split(questions[::-1], (10, 8)) == parts
    assert sum(map(len, parts.values())) > 50


def test_labels_are_read_from_the_rows():
    row = {"passage": "P.", "question": "Why?", "options": "A. x\nB. y z\nC. w", "answer": "B. y z"}
    assert list(_choices([row])) == [Question("P.", "P. Why?\nAnswer:", (" x\n", " y z\n", " w\n"), 1)]
    rows = [{"passage": "P", "question": "How many?", "answer": a} for a in ("1,200 apples", "Yes", "3:30", "0.5")]
    assert [question.answers for question in _numbers(rows)] == [(" 1200\n",), (" 0.5\n",)]


def _catalogue_of(messages: dict[str, str]) -> bytes:
    """A file in GNU gettext's MO format."""
    header, texts = 28, [[text.encode() for text in part] for part in (messages, messages.values())]
    at, tables, body = header + 16 * len(messages), b"", b""
    for text in texts[0] + texts[1]:
        tables += struct.pack("<2I", len(text), at + len(body))
        body += text + b"\0"
    count = len(messages)
    return struct.pack("<7I", 0x950412DE, 0, count, header, header + 8 * count, 0, header) + tables + body


def test_messages_are_those_of_one_line_with_their_translations(tmp_path, monkeypatch):
    known = {
        "": "Content-Type: text/plain; charset=UTF-8\n",
        "%d file\0%d files": "%d Datei\0%d Dateien",
        "cannot open the file": "Datei öffnen geht nicht",
        "menu\4 close the open file ": "offene Datei schließen\n",
        "not enough words": "zu wenige Wörter",
        "the same in both languages": "the same in both languages",
        "two\nlines of a message": "zwei\nZeilen",
    }
    content = _catalogue_of(known)
    assert gettext.GNUTranslations(io.BytesIO(content)).gettext("cannot open the file") == "Datei öffnen geht nicht"
    folder = tmp_path / "usr/share/locale/de/LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "one.mo").write_bytes(content)
    monkeypatch.setattr(debian, "unpacked", lambda package: tmp_path / ("usr" if package == "git" else "none"))
    assert questions.read("messages") == [
        Question(english, f"English: {english}\nGerman:", (f" {german}\n",), 0)
        for english, german in (
            ("cannot open the file", "Datei öffnen geht nicht"),
            ("close the open file", "offene Datei schließen"),
        )
    ]
    with pytest.raises(ValueError, match="0x950412de"):
        list(questions._catalogue(b"\x95\x04\x12\xde" + content[4:]))


def test_messages_that_repeat_training_are_not_among_those_to_test(monkeypatch):
    def tokens(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    asked = [Question(f"{n}", chr(1000 + n) * 12 + (chr(900) * 20 if n % 2 else ""), (" !",), 0) for n in range(200)]
    monkeypatch.setattr(questions, "read", lambda task: asked)
    monkeypatch.setitem(questions.SIZES, "messages", (12, 6))
    parts = questions.splits("messages", tokens)
    assert [len(parts[name]) for name in ("test", "val", "train")] == [12, 6, 200 - 3 * 18]
    assert any(900 in question.prompt for question in parts["train"])
    assert not any(900 in question.prompt for name in ("test", "val") for question in parts[name])
