from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genlora_lightning.adapters.compacter import CompacterConfig
from genlora_lightning.backbone.identity import base_identity, compare_bases
from genlora_lightning.backbone.low_memory import build_without_weights, check_none_on_meta, weight_source
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.injection.inject import adapter_layers, inject_adapters
from tests.conftest import small_config
from tests.models import tiny_bert, tiny_gpt2, tiny_llama

CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"


def saved(model: nn.Module, folder: Path) -> str:
    """A model folder of several small files."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return str(folder)


def saved_as_one(folder: str, other: Path) -> str:
    ordinary(CAUSAL, folder).save_pretrained(other)
    assert len(list(other.glob("*.safetensors"))) == 1
    return str(other)


def ordinary(auto_class: str, folder: str, **options: object) -> nn.Module:
    import transformers

    return getattr(transformers, auto_class).from_pretrained(folder, **options)


def loaded(auto_class: str, folder: str, seed: int = 3, config=None, **options: object) -> nn.Module:
    model = build_without_weights(auto_class, folder, **options)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    torch.manual_seed(seed)
    inject_adapters(model, config or small_config())
    source = weight_source(model)
    source.start_trained()
    source.load("cpu")
    return model


def assert_same(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name
    buffers = dict(second.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in first.named_buffers())


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda: tiny_llama(tie_word_embeddings=False)])
def test_model_is_the_one_that_from_pretrained_gives_with_the_same_adapters(tmp_path, make, dtype):
    folder = saved(make(), tmp_path)
    model, reference = loaded(CAUSAL, folder, dtype=dtype), ordinary(CAUSAL, folder, dtype=dtype)
    torch.manual_seed(3)
    inject_adapters(reference, small_config())
    assert_same(model, reference)
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert model.training is reference.training is False
    assert model.config.to_dict() == reference.config.to_dict()
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert weight_source(model) is None  # nothing is left to be read


def test_what_all_layers_share_is_drawn_once_with_the_rest(tmp_path):
    model = loaded(CAUSAL, saved(tiny_llama(), tmp_path), config=CompacterConfig(rank=16, num_products=4))
    shared = {layer.update.B.matrices for layer in adapter_layers(model).values()}
    assert len(shared) == 1
    for values in (shared.pop().matrices, *(layer.update.B.vectors for layer in adapter_layers(model).values())):
        assert 0.1 < values.std() < 1.5  # memory that nobody has filled has zeros, or anything
    assert not any(layer.delta_weight().any() for layer in adapter_layers(model).values())


def test_tied_weights_stay_tied(tmp_path):
    model = loaded(CAUSAL, saved(tiny_llama(), tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_new_head_of_a_body_is_drawn_and_the_rest_is_read(tmp_path):
    body = tiny_bert().bert
    folder = saved(body, tmp_path)
    model = build_without_weights(CLASSIFIER, folder, num_labels=5)
    source = weight_source(model)
    assert source.absent == ["classifier.weight", "classifier.bias"]
    inject_adapters(model, small_config(modules_to_train=["classifier"]))
    source.start_trained()
    assert 0.01 < model.classifier.weight.std() < 0.04  # BERT's initializer_range is 0.02
    assert not model.classifier.bias.any()
    assert model.bert.embeddings.word_embeddings.weight.is_meta
    source.load("cpu")
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, body.embeddings.word_embeddings.weight)
    assert all(not p.requires_grad for p in model.bert.embeddings.parameters())
    assert all(p.requires_grad for p in model.classifier.parameters())


def test_module_trained_in_full_is_read_in_float32_and_untied(tmp_path):
    folder = saved(tiny_llama(), tmp_path)
    config = small_config(modules_to_train=["lm_head"])
    model = loaded(CAUSAL, folder, config=config, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight.bfloat16(), model.model.embed_tokens.weight)


def test_rows_of_tokens_start_as_those_in_the_files(tmp_path):
    folder = saved(tiny_llama(), tmp_path)
    model = loaded(CAUSAL, folder, config=small_config(tokens_to_train=[40, 7]), dtype=torch.bfloat16)
    layers = adapter_layers(model)
    assert layers["lm_head"].table is layers["model.embed_tokens"].table
    assert torch.equal(layers["lm_head"].table.rows, layers["lm_head"].weight[[7, 40]].float())
    assert not layers["model.embed_tokens"].acts()
    reference = ordinary(CAUSAL, folder, dtype=torch.bfloat16)
    ids = torch.tensor([[7, 3, 40]])
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_fingerprint_is_the_same_before_and_after_the_weights_are_read(tmp_path):
    folder = saved(tiny_llama(), tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = build_without_weights(CAUSAL, folder, dtype=dtype)
        before = base_identity(model)
        assert before == base_identity(ordinary(CAUSAL, folder, dtype=dtype))
        inject_adapters(model, small_config())
        weight_source(model).start_trained()
        assert base_identity(model)["fingerprint"] == before["fingerprint"]
        weight_source(model).load("cpu")
        assert base_identity(model)["fingerprint"] == before["fingerprint"]
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    changed = base_identity(build_without_weights(CAUSAL, str(tmp_path / "other")))
    assert compare_bases(before, changed)


def test_weight_that_the_checkpoint_lacks_is_named(tmp_path):
    folder = saved(tiny_llama(), tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    file = tmp_path / index["weight_map"].pop(name)
    save_file({key: tensor for key, tensor in load_file(file).items() if key != name}, file, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = build_without_weights(CAUSAL, folder)
    assert weight_source(model).absent == [name]
    inject_adapters(model, small_config())
    weight_source(model).start_trained()
    with pytest.raises(
        ValueError,
        match=rf"1 tensors .*device\), model.layers.1.mlp.up_proj.base_layer.weight .* {folder} lacks",
    ):
        weight_source(model).load("cpu")


def test_what_cannot_be_read_in_pieces_is_refused(tmp_path):
    folder = saved(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match=r"does not take \['device_map'\]"):
        build_without_weights(CAUSAL, folder, device_map="auto")
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors.index.json nor model.safetensors, and"):
        build_without_weights(CAUSAL, folder)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is quantized"):
        build_without_weights(CAUSAL, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: [], r"index\.json is damaged, .*: it must be a dictionary with text keys, got \[\]"),
        (lambda index: {}, r"index\.json is damaged, .*: it has no weight_map"),
        (lambda index: {"weight_map": {"a": 1}}, r"index\.json is damaged, .*: weight_map\.a cannot be 1"),
        (lambda index: {"weight_map": {"a": "../b.safetensors"}}, r"weight_map\.a cannot be '\.\./b\.safetensors'"),
        (lambda index: {"weight_map": {"a": "/b.safetensors"}}, r"weight_map\.a cannot be '/b\.safetensors'"),
    ],
)
def test_index_of_another_form_is_refused_with_its_place(tmp_path, change, message):
    folder = saved(tiny_llama(num_hidden_layers=1), tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(change(json.loads(index.read_text()))))
    with pytest.raises((ValueError, OSError), match=message):
        build_without_weights(CAUSAL, folder)


def test_index_that_leaves_tensors_out_or_has_them_elsewhere_is_read_all_the_same(tmp_path):
    folder = saved(tiny_llama(), tmp_path)
    one = saved_as_one(folder, tmp_path / "one")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    first, second, third, *_ = places
    places[first], places[second] = places[second], places[first]
    del places[third]
    path.write_text(json.dumps(index))
    assert_same(loaded(CAUSAL, folder), loaded(CAUSAL, one))


@pytest.mark.parametrize("text", ["{", "[" * 5000, "\x80"])
def test_damaged_index_is_named(tmp_path, text):
    folder = saved(tiny_llama(num_hidden_layers=1), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedFileError, match=r"model\.safetensors\.index\.json is damaged: .* copy the model again"):
        build_without_weights(CAUSAL, folder)


def test_damaged_file_of_a_base_is_named(tmp_path):
    folder = saved(tiny_llama(num_hidden_layers=1), tmp_path)
    shard = next(tmp_path.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=r"model-00002-of-\d+\.safetensors is no readable safetensors file"):
        build_without_weights(CAUSAL, folder)


def test_missing_file_of_the_index_is_named(tmp_path):
    folder = saved(tiny_llama(), tmp_path)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(OSError, match=r"model-00002-of-\d+.safetensors"):
        build_without_weights(CAUSAL, folder)


def test_check_names_buffers_too():
    module = nn.BatchNorm1d(2)
    check_none_on_meta(module)
    module._buffers["running_mean"] = torch.empty(2, device="meta")
    with pytest.raises(ValueError, match=r"1 tensors of this BatchNorm1d .* running_mean among"):
        check_none_on_meta(module)
