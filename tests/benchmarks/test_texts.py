"""Texts for the language model: windows that share no document, and rows in PEFT's form."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.quality import peft_form, texts
from benchmarks.quality.language import LanguageModel, TextTask, _windows_loss
from benchmarks.quality.repeats import repeated
from benchmarks.quality.rows import read_rows
from tests.models import tiny_llama


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_no_document_stands_in_two_splits(monkeypatch):
    documents = [chr(65 + n) * (texts.WINDOW * (1 + n % 3) + 5) for n in range(40)]
    monkeypatch.setattr(texts, "_documents", lambda name: iter(documents * 2))
    monkeypatch.setitem(texts.SIZES, "lisp", (6, 4))
    parts = texts.windows("lisp", Letters())
    assert (len(parts["test"]), len(parts["val"])) == (6, 4)
    owners = {name: {window[0] for window in part} for name, part in parts.items()}
    assert not owners["train"] & (owners["test"] | owners["val"])
    assert not owners["test"] & owners["val"]
    assert all(len(window) == texts.WINDOW for part in parts.values() for window in part)
    total = sum(len(document) // texts.WINDOW for document in documents)  # each document once
    assert len(parts["train"]) <= total - 10


def test_new_windows_are_chosen_from_three_times_as_many_that_do_not_repeat_training(monkeypatch):
    page = "".join(chr(200 + n) for n in range(texts.WINDOW))  # stands in every third document, of which each has two
    own = ["".join(chr(500 * (1 + n) + k) for k in range(texts.WINDOW)) for n in range(90)]
    documents = [own[2 * n] + (page if n % 3 == 0 else own[2 * n + 1]) for n in range(45)]
    monkeypatch.setattr(texts, "_documents", lambda name: iter(documents))
    monkeypatch.setitem(texts.SIZES, "new-lisp", (6, 4))
    parts = texts.windows("new-lisp", Letters())
    assert (len(parts["test"]), len(parts["val"])) == (6, 4)
    assert [ord(letter) for letter in page] in parts["train"]
    assert not any(any(again) for again in repeated(parts).values())
    pooled = 3 * 6 + 3 * 4
    assert len(parts["train"]) == 2 * len(documents) - pooled


@torch.no_grad()
def test_loss_is_also_given_for_repeated_and_for_new_windows():
    task = object.__new__(TextTask)
    model = LanguageModel(tiny_llama().model.eval())
    windows = torch.arange(80).view(4, 20).remainder(60).tolist()
    windows[2] = windows[2][::-1]
    task.splits = {"train": windows[:1], "test": windows[::2] + windows[:1]}
    found = task.evaluate(model, "test")
    for name, part in (("repeated_loss", windows[:1]), ("fresh_loss", windows[2:3])):
        assert found[name] == pytest.approx(_windows_loss(model, part)["loss"], rel=1e-6)
    assert found["loss"] == pytest.approx((2 * found["repeated_loss"] + found["fresh_loss"]) / 3, rel=1e-6)


def test_manual_pages_lose_their_markup():
    page = '.\\" comment\n.TH ls 1\n.SH NOM\nls \\- lister \\fBdes\\fP fichiers\n'
    page += '.SH "DEUX MOTS"\n.PP\nAvec\\ un espace\\&.'
    assert texts._plain(page) == "NOM\nls - lister des fichiers\nDEUX MOTS\nAvec un espace."


@torch.no_grad()
def test_loss_of_a_text_is_that_of_transformers():
    whole = tiny_llama().eval()
    task = object.__new__(TextTask)
    ids = torch.arange(24).view(2, 12) % 60
    task.splits = {"train": [], "val": ids.tolist()}
    expected = whole(input_ids=ids, labels=ids).loss.item()
    model = LanguageModel(whole.model)
    model.base.embed_tokens.weight.copy_(whole.lm_head.weight)  # which the task takes as output layer
    expected = whole(input_ids=ids, labels=ids).loss.item()
    assert task.loss(model, {"input_ids": ids}).item() == pytest.approx(expected, rel=1e-5)
    assert task.evaluate(model, "val")["loss"] == pytest.approx(expected, rel=1e-5)


def test_final_runs_are_written_as_peft_has_them(tmp_path):
    rows = [row for row in read_rows().values() if row["task"] == "siqa"]
    number = peft_form.write(rows, tmp_path)
    assert 0 < number < len(rows)
    content = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert set(content) == {"run_info", "train_info", "meta_info"}
    row = next(row for row in rows if (tmp_path / f"{row['key']}.json").is_file())
    content = json.loads((tmp_path / f"{row['key']}.json").read_text())
    assert content["train_info"]["metrics"][0]["test loss"] == float(row["test_loss"])
    assert content["meta_info"]["package_info"]["torch"].startswith("2.")
