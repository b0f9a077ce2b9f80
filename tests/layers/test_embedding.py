from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from genlora_lightning import (
    LoRAConfig,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    save_merged,
    unmerge_adapters,
)
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.embedding import AdaptedEmbedding
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import perturb, small_config
from tests.models import tiny_llama

IDS = torch.tensor([[3, 5, 1, 2, 5]])


class Scaled(nn.Embedding):
    """Scales what it takes, as Gemma's does."""

    def __init__(self, *sizes: int, padding_idx: int | None = None) -> None:
        super().__init__(*sizes, padding_idx=padding_idx)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class Shifted(nn.Embedding):
    """Takes the rows after those that it is asked for, as OPT's positions do."""

    def forward(self, ids: Tensor, offset: int = 1) -> Tensor:
        return super().forward(ids + offset)


class Normed(nn.Embedding):
    """Does something else with the rows."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(super().forward(ids), dim=-1)


CLASSES = {"plain": nn.Embedding, "scaled": Scaled, "shifted": Shifted}
KINDS = {"genlora": small_config(rank=3), "lora": LoRAConfig(rank=3)}


def adapted(base: nn.Module, config=KINDS["lora"]) -> AdaptedEmbedding:
    layer = AdaptedEmbedding(base.double(), config).double()
    perturb(layer)
    return layer


@pytest.mark.parametrize("padding", [None, 2, -3])
@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_rows_and_gradients_are_those_of_the_update_added_to_the_table(make, padding, config, fused):
    layer = adapted(make(9, 6, padding_idx=padding), config)
    set_fused(layer, fused)
    base, parameters = layer.base_layer, [p for p in layer.update.parameters() if p.requires_grad]
    direction = torch.randn(1, 5, 6).double()
    wanted = functional_call(base, {"weight": base.weight + layer.delta_weight()}, (IDS,))
    gradients = torch.autograd.grad((wanted * direction).sum(), parameters)
    given = layer(IDS)
    torch.testing.assert_close(given, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(given, base(IDS))
    for one, other in zip(torch.autograd.grad((given * direction).sum(), parameters), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        assert one.any()
    if padding is not None:  # its row stays as it was
        assert torch.equal((base.weight + layer.delta_weight())[padding], base.weight[padding])
        assert not layer.factors()[1][padding].any()


def test_update_of_the_whole_table_is_never_made(monkeypatch):
    layer = adapted(nn.Embedding(9, 6))
    monkeypatch.setattr(type(layer.update), "delta_weight", lambda self: pytest.fail("it was made"))
    layer(IDS).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_output_has_the_dtype_of_the_base(dtype, autocast):
    layer = AdaptedEmbedding(nn.Embedding(9, 6).to(dtype), KINDS["genlora"])
    perturb(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = layer(IDS)
    assert output.dtype == layer.base_layer(IDS).dtype == dtype
    wanted = F.embedding(IDS, layer.base_layer.weight.float() + layer.delta_weight())
    torch.testing.assert_close(output.float(), wanted, rtol=0.05, atol=0.05)


def test_hooks_of_the_base_act_once():
    layer, calls = adapted(Scaled(9, 6)), []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer(IDS)
    assert calls == [1]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Embedding(9, 6, max_norm=1.0), r"0 cannot be adapted: its `max_norm` \(1.0\) rescales rows"),
        (nn.Embedding(9, 6, scale_grad_by_freq=True), r"0 cannot be adapted: its `scale_grad_by_freq` scales"),
        (Normed(9, 6), r"0 cannot be adapted: the forward of Normed does more with its weight than to take"),
        (weight_norm(Scaled(9, 6)), r"0 cannot be adapted: the forward of ParametrizedScaled is its own, and its"),
    ],
    ids=["max_norm", "by_freq", "normed", "computed"],
)
def test_table_that_gives_more_than_rows_is_refused(base, message):
    model = nn.Sequential(base, nn.Linear(6, 4))
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, small_config(target_modules=["0"]))
    assert not adapter_layers(model)


def test_computed_table_is_adapted_beside_and_not_merged():
    layer = adapted(weight_norm(nn.Embedding(9, 6)))
    wanted = F.embedding(IDS, layer.base_layer.weight + layer.delta_weight())
    torch.testing.assert_close(layer(IDS), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="its weight is computed in each forward"):
        layer.merge()


def test_sparse_table_is_adapted_with_dense_gradients():
    layer = adapted(nn.Embedding(9, 6, sparse=True))
    layer(IDS).sum().backward()
    assert all(not p.grad.is_sparse for p in layer.update.parameters())


def test_code_that_asks_for_sizes_gets_them_and_marks_are_not_passed_on():
    layer = adapted(nn.Embedding(9, 6, padding_idx=1))
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (9, 6, 1)
    layer.base_layer._mark = 1
    assert not hasattr(layer, "_mark")
    with pytest.raises(AttributeError, match="nothing_of_it"):
        _ = layer.nothing_of_it


def test_all_linear_leaves_embeddings_and_convolutions_alone():
    model = nn.ModuleDict({"table": nn.Embedding(9, 6), "conv": nn.Conv2d(3, 4, 3), "head": nn.Linear(6, 4)})
    report = inject_adapters(model, small_config())
    assert list(adapter_layers(model)) == ["head"]
    assert "adapts 1 linears" in report.summary()
    model = nn.Sequential(nn.Embedding(9, 6))
    with pytest.raises(ValueError, match=r"no nn.Linear or Conv1D to adapt; name its other layers in .* \(0\)"):
        inject_adapters(model, small_config())


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=IDS).logits
    return output


def test_head_that_is_tied_to_an_adapted_embedding_stays_with_the_base(tmp_path: Path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama().eval()
    head = model.lm_head.weight
    report = inject_adapters(model, small_config(target_modules=["embed_tokens", "q_proj"]))
    assert "adapts 3 layers" in report.summary()
    assert "Left alone: lm_head (tied to an embedding that is adapted" in report.summary()
    assert model.lm_head.weight is head is model.model.embed_tokens.base_layer.weight
    perturb(model)
    model.tie_weights()  # as `from_pretrained` and `resize_token_embeddings` do
    assert model.lm_head.weight is head
    wanted, before = logits(model), head.clone()
    merge_adapters(model)
    assert model.lm_head.weight is head
    assert torch.equal(head, before)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    unmerge_adapters(model)
    assert torch.equal(logits(model), wanted)
    again = tiny_llama().eval()
    load_adapter(again, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(logits(again), wanted)
    save_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-4, atol=1e-5)
    assert math.isfinite(float(wanted.sum()))


def test_embedding_and_the_head_tied_to_it_are_adapted_each_by_itself(tmp_path: Path):
    model = tiny_llama().eval()
    inject_adapters(model, small_config(target_modules=["embed_tokens", "lm_head"]))
    perturb(model)
    wanted = logits(model)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert model.lm_head.base_layer.weight is not model.model.embed_tokens.base_layer.weight
