from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from genlora_lightning.backbone.identity import base_identity, base_model_name, base_parameters, compare_bases
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.injection.merging import merge_adapters, unmerge_adapters
from tests.conftest import perturb, small_config
from tests.models import tiny_gpt2, tiny_llama

MODELS = [tiny_llama, lambda: tiny_llama(tie_word_embeddings=False), tiny_gpt2]


def through_json(identity):
    return json.loads(json.dumps(identity))


@pytest.mark.parametrize("make", MODELS)
def test_identity_is_the_same_with_adapters_merged_and_unmerged(make):
    model = make()
    before = base_identity(model)
    inject_adapters(model, small_config())
    perturb(model)
    assert base_identity(model) == before
    merge_adapters(model)
    assert base_identity(model) == before
    unmerge_adapters(model)
    assert base_identity(model) == before
    assert not any("base_layer" in name for name in before["fingerprint"]["samples"])


def test_tied_head_is_the_embedding_also_while_an_adapter_on_it_is_merged():
    model = tiny_llama()
    before = base_identity(model)
    inject_adapters(model, small_config(target_modules=["lm_head", "q_proj"]))
    perturb(model)
    merge_adapters(model)
    assert base_identity(model) == before


class HeadFirst(nn.Module):
    """A head that stands before the embedding it is tied to, and an inner part of a module that is trained too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10)
        self.embed = nn.Embedding(10, 8)
        self.head.weight = self.embed.weight
        self.body = nn.Linear(8, 8)
        self.pool = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (tiny_llama, ["lm_head"]),
        (tiny_llama, ["norm", "lm_head"]),
        (HeadFirst, ["head", "pool"]),
        (HeadFirst, ["pool.1"]),
    ],
)
def test_modules_that_will_be_trained_in_full_do_not_count_before_the_injection_either(make, names):
    model = make()
    found = [name for name, _ in model.named_modules() if any(name == n or name.endswith(f".{n}") for n in names)]
    before = base_identity(model, without=[*found, "not there"])
    inject_adapters(
        model, small_config(target_modules=["q_proj" if make is tiny_llama else "body"], modules_to_train=names)
    )
    assert base_identity(model) == before
    assert before["fingerprint"]["num_values"] < base_identity(make())["fingerprint"]["num_values"] or names == [
        "lm_head"
    ]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16])
def test_same_weights_in_another_dtype_are_the_same_base(make, dtype, on_disk):
    model = make().to(on_disk).float()
    with torch.no_grad():
        for _, tensor in base_parameters(model):
            tensor.view(-1)[::3] *= 1e-4  # some in float16's subnormal range
    model = model.to(on_disk).float()
    full, low = through_json(base_identity(model)), base_identity(model.to(dtype))
    assert compare_bases(full, low) == []
    assert compare_bases(low, full) == []


def test_float16_and_bfloat16_of_the_same_float32_weights_are_the_same_base():
    a, b = base_identity(tiny_llama().half()), base_identity(tiny_llama().bfloat16())
    assert a["fingerprint"] != b["fingerprint"]
    assert compare_bases(a, b) == compare_bases(b, a) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [lambda w: w.mul_(1.01), lambda w: w.add_(1e-3), lambda w: w.neg_()])
def test_other_weights_are_another_base_in_the_same_and_in_another_dtype(dtype, change):
    stored = base_identity(tiny_llama())
    other = tiny_llama()
    with torch.no_grad():
        change(other.model.layers[0].self_attn.v_proj.weight)
    problems = compare_bases(stored, base_identity(other.to(dtype)))
    assert problems == ["1 of 20 sampled tensors have other values (model.layers.0.self_attn.v_proj.weight)"]


def test_bases_of_the_same_dtype_must_agree_to_the_last_bit():
    stored = base_identity(tiny_llama().bfloat16())
    other = tiny_llama().bfloat16()
    with torch.no_grad():
        other.model.norm.weight.mul_(1 + 2**-7)
    assert compare_bases(stored, base_identity(other))


def test_quantized_base_is_another_one():
    model, quantized = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    quantized.load_state_dict(model.state_dict())
    quantized[0].weight = nn.Parameter((quantized[0].weight * 100).to(torch.int8), requires_grad=False)
    problems = compare_bases(base_identity(model), base_identity(quantized))
    assert problems == ["1 of 2 tensors were float32 and are int8 (0.weight): one is quantized or packed"]
    packed = nn.Sequential(nn.Linear(8, 8))
    packed[0].weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    assert "0.weight is (32, 1), was (8, 8)" in compare_bases(base_identity(model), base_identity(packed))[0]
    float8 = nn.Sequential(nn.Linear(8, 8))
    float8.load_state_dict(model.state_dict())
    float8[0].weight = nn.Parameter(float8[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert "float8_e4m3fn" in compare_bases(base_identity(model), base_identity(float8))[0]


def test_configuration_that_changes_the_outputs_counts():
    stored = base_identity(tiny_llama(rope_theta=10_000.0))
    other = tiny_llama()
    other.config.hidden_act = "relu"
    assert compare_bases(stored, base_identity(other)) == ["`hidden_act` was 'silu' and is 'relu'"]


def test_names_count_and_order_does_not():
    a, b = nn.Linear(2, 2), nn.Linear(3, 3)
    first, second = nn.ModuleDict({"a": a, "b": b}), nn.ModuleDict({"b": b, "a": a})
    assert base_identity(first) == base_identity(second)
    assert "a.bias is not there" in compare_bases(base_identity(first), base_identity(nn.ModuleDict({"c": a})))[0]


def test_weights_without_memory_are_compared_by_shape():
    with torch.device("meta"):
        empty = tiny_llama()
    assert compare_bases(base_identity(tiny_llama()), base_identity(empty)) == []


def test_large_models_have_a_small_fingerprint():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(2000))
    identity = base_identity(model)
    assert identity["fingerprint"]["num_tensors"] == 4000
    assert 256 < len(identity["fingerprint"]["samples"]) <= 512


def test_base_model_name_is_that_of_the_transformers_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert base_model_name(nn.ModuleDict({"m": model})) == str(tmp_path / "base")
    assert base_model_name(nn.Linear(2, 2)) is None
    assert base_identity(model)["name"] == str(tmp_path / "base")
