"""The texts for a model's last blocks: what they compute is what the whole model does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.quality import data, tail, texts
from benchmarks.quality.language import LanguageModel, TextTask
from tests.models import tiny_llama


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model of three blocks of which the last is trained, and texts of few of its tokens."""
    windows = torch.randint(3, 50, (12, 7), generator=torch.Generator().manual_seed(0)).mul(2).remainder(64).tolist()
    made = {"train": windows[:6], "val": windows[6:8], "test": windows[8:]}
    monkeypatch.setattr(texts, "stored", lambda name: made)
    monkeypatch.setattr(data, "DATA_DIR", tmp_path / "kept")
    monkeypatch.setattr(tail, "BLOCKS", 1)
    monkeypatch.setattr(tail, "_decoder", lambda: tiny_llama(num_hidden_layers=3).model.eval().requires_grad_(False))
    return LanguageModel(tail._decoder())


@torch.no_grad()
def test_last_blocks_on_what_is_kept_give_the_whole_models_logits_of_the_texts_tokens(model):
    task = tail.TailTask("french-tail")
    last = task.build(0)
    assert len(last.base.layers) == 1
    kept = task._kept
    ids = torch.tensor(texts.stored("french")["test"])
    whole = F.linear(model.base(input_ids=ids, use_cache=False).last_hidden_state, model.base.embed_tokens.weight)
    logits = last(kept["inputs"]["test"].float())
    torch.testing.assert_close(logits, whole[:, :-1, kept["vocabulary"]], atol=2e-3, rtol=2e-3)  # kept in float16
    assert torch.equal(kept["vocabulary"][kept["targets"]["test"].long()], ids[:, 1:])


def test_batches_are_those_of_the_whole_models_task(model):
    task, whole = tail.TailTask("french-tail"), TextTask("french")
    vocabulary = task._kept["vocabulary"]
    for batch, expected in zip(task.batches(3, 4), whole.batches(3, 4), strict=True):
        assert torch.equal(vocabulary[batch["targets"]], expected["input_ids"][:, 1:])
    assert torch.isfinite(task.loss(task.build(0), batch))
    assert task.general_loss(task.build(0)) == pytest.approx(task.evaluate(task.build(0), "test")["loss"])
