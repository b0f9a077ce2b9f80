from __future__ import annotations

import pytest
import torch

from genlora_lightning.backbone.architectures import build_on_meta, read_config, repeated_blocks, task_of
from genlora_lightning.backbone.catalog import SHAPES
from tests.models import tiny_bert, tiny_gpt2, tiny_llama


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248), ("llama-70b", 70_553_706_496)],
)
def test_shapes_have_the_published_numbers_of_parameters(shape, parameters):
    model = build_on_meta(read_config(shape), "causal-lm")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_configuration_file_alone_is_enough(tmp_path):
    original = tiny_llama()
    (tmp_path / "config.json").write_text(original.config.to_json_string())
    for source in (tmp_path, tmp_path / "config.json"):
        config = read_config(str(source))
        assert [p.shape for p in build_on_meta(config, "causal-lm").parameters()] == [
            p.shape for p in original.parameters()
        ]


def test_missing_model_is_an_error_that_names_the_built_in_shapes(tmp_path):
    for source in (str(tmp_path / "nothing"), "./nothing"):
        with pytest.raises(FileNotFoundError, match=f"no model folder .*nothing.*{', '.join(SHAPES)}"):
            read_config(source)
    with pytest.raises(OSError, match=r"has no configuration that can be read .*llama-1b"):
        read_config(str(tmp_path))


def test_task_is_that_of_the_class_in_the_configuration():
    assert task_of(read_config("llama-8b"), "llama-8b") == "causal-lm"
    config = tiny_bert().config
    config.architectures = ["BertForSequenceClassification"]
    assert task_of(config, "bert") == "sequence-classification"
    config.architectures = None
    with pytest.raises(ValueError, match=r"here does not say what it is for .*--task causal-lm or --task sequence"):
        task_of(config, "here")


def test_repeated_blocks_are_the_layers():
    llama, gpt2, bert = tiny_llama(), tiny_gpt2(), tiny_bert()
    assert repeated_blocks(llama) is llama.model.layers
    assert repeated_blocks(gpt2) is gpt2.transformer.h
    assert repeated_blocks(bert) is bert.bert.encoder.layer
    assert repeated_blocks(torch.nn.Linear(2, 2)) is None
