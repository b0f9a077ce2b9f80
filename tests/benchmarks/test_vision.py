"""The quality benchmark's pictures: the task trains and scores a small backbone, and finds its linears."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality import vision
from benchmarks.quality.classifier import Classifier
from benchmarks.quality.methods import linear_shapes


@pytest.fixture
def folder(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=2, image_size=56, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.fixture
def task(folder, monkeypatch):
    def converted():
        assert torch.empty(1).device.type == "cpu", "a conversion on first use needs tensors with values"
        return folder

    monkeypatch.setattr(vision, "backbone_folder", converted)
    task = object.__new__(vision.FashionTask)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % vision.NUM_CLASSES
    images = torch.randint(0, 256, (48, 28, 28), dtype=torch.uint8, generator=generator)
    task.splits = {"train": (images, labels), "val": (images[:30], labels[:30])}
    return task


def test_untrained_model_scores_as_a_guess_and_the_loss_reaches_the_head(task):
    model = task.build(0)
    assert isinstance(model, Classifier)
    scores = task.evaluate(model, "val")
    assert scores["loss"] == pytest.approx(math.log(vision.NUM_CLASSES), abs=0.5)
    assert 0 <= scores["accuracy"] <= 1
    task.loss(model, next(task.batches(0, 1))).backward()
    assert model.head.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_evaluation_is_the_mean_over_pictures_however_they_are_batched(task):
    model = task.build(0)
    images, labels = task.splits["val"]
    with torch.no_grad():
        batch = {"pixel_values": vision.as_pixels(images), "labels": labels}
        expected = task.loss(model, batch).item()
    assert task.evaluate(model, "val")["loss"] == pytest.approx(expected, rel=2e-3)


def test_skeleton_has_the_shapes_of_the_model_and_no_values(task):
    skeleton = task.skeleton()
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert linear_shapes(skeleton) == linear_shapes(task.build(0).base)
