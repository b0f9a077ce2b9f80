"""Texts for the language model: windows that share no document, and rows in PEFT's form."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.quality import peft_form, texts
from benchmarks.quality.language import LanguageModel, TextTask
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


def test_manual_pages_lose_their_markup():
    page = '.\\" comment\n.TH ls 1\n.SH NOM\nls \\- lister \\fBdes\\fP fichiers\n'
    page += '.SH "DEUX MOTS"\n.PP\nAvec\\ un espace\\&.'
    assert texts._plain(page) == "NOM\nls - lister des fichiers\nDEUX MOTS\nAvec un espace."


@torch.no_grad()
def test_loss_of_a_text_is_that_of_transformers():
    whole = tiny_llama().eval()
    task = object.__new__(TextTask)
    ids = torch.arange(24).view(2, 12) % 60
    task.splits = {"val": ids.tolist()}
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
