"""The texts and questions for a model's last blocks: what they compute is what the whole model does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.quality import data, questions, tail, texts
from benchmarks.quality.language import LanguageModel, QuestionTask, TextTask, decoder_arguments
from benchmarks.quality.questions import Encoded
from benchmarks.quality.runs import _of_shares
from tests.models import tiny_llama


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of three blocks of which the last is trained, and texts of few of its tokens."""
    windows = torch.randint(3, 50, (12, 7), generator=torch.Generator().manual_seed(0)).mul(2).remainder(64).tolist()
    asked = [Encoded(row[: 3 + n % 3], [row[5:6], row[5:7]], n % 2) for n, row in enumerate(windows)]
    monkeypatch.setattr(questions, "stored", lambda name: {"train": asked[:6], "val": asked[6:8], "test": asked[8:]})
    made = {"train": windows[:6], "val": windows[6:8], "test": windows[8:]}
    monkeypatch.setattr(texts, "stored", lambda name: made)
    monkeypatch.setattr(data, "DATA_DIR", tmp_path / "kept")
    monkeypatch.setattr(tail, "BLOCKS", 1)
    monkeypatch.setattr(tail, "_decoder", lambda: tiny_llama(num_hidden_layers=3).model.eval().requires_grad_(False))
    return LanguageModel(tail._decoder())


@torch.no_grad()
def test_last_blocks_on_what_is_kept_give_the_whole_models_logits_of_the_texts_tokens(model):
    task = tail.TailTextTask("french-tail")
    last = task.build(0)
    assert len(last.base.layers) == 1
    kept = task._kept
    ids = torch.tensor(texts.stored("french")["test"])
    whole = F.linear(model.base(input_ids=ids, use_cache=False).last_hidden_state, model.base.embed_tokens.weight)
    logits = last(kept["inputs"]["test"].float())
    torch.testing.assert_close(logits, whole[:, :-1, kept["vocabulary"]], atol=2e-3, rtol=2e-3)  # kept in float16
    assert torch.equal(kept["vocabulary"][kept["targets"]["test"].long()], ids[:, 1:])


def test_batches_are_those_of_the_whole_models_task(model):
    task, whole = tail.TailTextTask("french-tail"), TextTask("french")
    vocabulary = task._kept["vocabulary"]
    for batch, expected in zip(task.batches(3, 4), whole.batches(3, 4), strict=True):
        assert torch.equal(vocabulary[batch["targets"]], expected["input_ids"][:, 1:])
    assert torch.isfinite(task.loss(task.build(0), batch))
    assert task.general_loss(task.build(0)) == pytest.approx(task.evaluate(task.build(0), "test")["loss"])


@torch.no_grad()
def test_questions_for_the_last_blocks_have_the_whole_models_logits_of_the_datas_tokens(model, monkeypatch):
    monkeypatch.setattr(tail.TailQuestionTask, "batch_size", 2)
    task = tail.TailQuestionTask("subjects-tail")
    whole = QuestionTask("subjects")
    whole.batch_size = 2
    last, vocabulary = task.build(0), task._kept["vocabulary"]
    assert len(last.base.layers) == 1
    pairs = [(batch, expected) for batch, expected in zip(task.batches(3, 4), whole.batches(3, 4), strict=True)]
    answers = zip(
        task._answer_batches("test", torch.float32), whole._answer_batches("test", torch.float32), strict=True
    )
    pairs += [(batch, expected) for (_, batch, _), (_, expected, _) in answers]
    assert len(pairs) == 5
    for batch, expected in pairs:
        logits = last(batch["inputs"], batch["places"], **decoder_arguments(batch))
        full = model(expected["inputs"], expected["places"], **decoder_arguments(expected))
        torch.testing.assert_close(logits, full[:, vocabulary], atol=2e-3, rtol=2e-3)  # kept in float16
        assert torch.equal(vocabulary[batch["targets"]], expected["targets"])
    assert 0 <= task.evaluate(last, "val")["accuracy"] <= 1
    news = torch.tensor(texts.stored(texts.GENERAL)["test"])
    hidden = model.base(input_ids=news, use_cache=False).last_hidden_state[:, :-1]
    logits = F.linear(hidden, model.base.embed_tokens.weight[vocabulary])
    expected = F.cross_entropy(logits.flatten(0, 1), torch.searchsorted(vocabulary, news[:, 1:].flatten()))
    assert task.general_loss(last) == pytest.approx(expected.item(), abs=2e-3)


@torch.no_grad()
def test_a_share_of_an_update_is_added_to_the_base_alone(model, monkeypatch):
    task = tail.TailTextTask("lisp-tail")
    monkeypatch.setattr(task, "shares", (0.0, 0.5))
    name = "layers.0.mlp.up_proj"
    changed = task.build(0)
    change = torch.randn_like(changed.base.get_submodule(name).weight)
    before = task.general_loss(changed)
    (nothing, half) = _of_shares(task, {name: change}, before)
    assert nothing == [0.0, pytest.approx(task.evaluate(changed, "test")["loss"], abs=1e-5), 0.0]
    changed.base.get_submodule(name).weight += 0.5 * change
    expected = [task.evaluate(changed, "test")["loss"], task.general_loss(changed) - before]
    assert half == [0.5, *(pytest.approx(value, abs=1e-5) for value in expected)]
    assert abs(half[2]) > 1e-4
