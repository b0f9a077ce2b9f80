"""Elastic adapters compute with the first rows of their matrices, on every path, and everything goes by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genlora_lightning import (
    CompacterConfig,
    GenLoRAConfig,
    LoRAConfig,
    PoLARConfig,
    effective_ranks,
    export_lora,
    inject_adapters,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.artifacts.adapter_folder import read_adapter
from genlora_lightning.backbone.architectures import enable_gradient_checkpointing
from genlora_lightning.injection.elastic import draw_ranks, set_active_rank, whole_ranks
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.layers.sharing import set_fused
from genlora_lightning.planning.budget import fit_budget
from tests.conftest import perturb, small_config
from tests.models import tiny_llama

IDS = torch.tensor([[3, 5, 7, 2, 9, 4]])
ELASTIC = {
    "lora": LoRAConfig(rank=6, alpha=9.0, elastic=[1, 4, 6]),
    "rslora": LoRAConfig(rank=6, alpha=3.0, scaling="sqrt_rank", elastic=[1, 4, 6]),
    "genlora": GenLoRAConfig(rank=6, num_groups_b=2, elastic=[1, 4, 6]),
    "genlora, all learned": small_config(rank=6, num_latents_b=2, num_centers=2, elastic=[1, 4, 6]),
}
each = pytest.mark.parametrize("config", ELASTIC.values(), ids=ELASTIC)


def llama() -> nn.Module:
    return tiny_llama(tie_word_embeddings=False).eval()


def adapted(config: AdapterConfig) -> nn.Module:
    torch.manual_seed(0)
    model = llama()
    inject_adapters(model, config)
    perturb(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=IDS).logits
    return output


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}


def active_ranks(model: nn.Module) -> list[int]:
    return [layer.active_config.rank for layer in adapter_layers(model).values()]


@each
def test_whole_adapter_is_that_of_a_model_that_is_not_elastic(config):
    model = adapted(config)
    plain = adapted(dataclasses.replace(config, elastic=None))
    assert torch.equal(logits(model), logits(plain))
    set_active_rank(model, 4)
    assert not torch.allclose(logits(model), logits(plain))
    set_active_rank(model, None)
    assert torch.equal(logits(model), logits(plain))


@each
def test_active_rows_are_added_to_the_weight_with_the_scaling_of_the_whole(config):
    model = adapted(config)
    set_active_rank(model, 4)
    plain = llama()
    for name, layer in adapter_layers(model).items():
        update: Any = layer.update
        A, B = update.A(), update.B()
        with torch.no_grad():
            plain.get_submodule(name).weight += config.scaling_factor * B[:4].T @ A[:4]
    wanted = logits(plain)
    assert all(0 < rank <= 4 for rank in effective_ranks(model).values())
    for fused in (True, False):
        set_fused(model, fused)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
        with torch.enable_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="q_proj is merged at another rank: call `unmerge_adapters"):
        set_active_rank(model, 1)
    set_active_rank(model, 4)
    unmerge_adapters(model)
    set_active_rank(model, {"q_proj": 1, r"layers\.1\..*": 4})
    assert active_ranks(model) == [1, *[6] * 6, 1, *[4] * 6]


@each
def test_export_is_of_the_active_rank_and_saving_of_the_whole(config, tmp_path):
    from peft import PeftModel

    model = adapted(config)
    set_active_rank(model, {"q_proj": 1, "down_proj": 4})
    wanted = logits(model)
    exported = export_lora(model, tmp_path / "lora")
    assert {row.rank for row in exported.rows} == {1, 4, 6}
    assert all(row.energy_kept == 1 for row in exported.rows)
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-4, atol=1e-5)
    tensors = read_adapter(save_adapter(model, tmp_path / "adapter")).tensors
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in adapter_state_dict(model).items())
    assert {tuple(tensors[name].shape) for name in tensors if "q_proj.update.A" in name} == {
        tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items() if "q_proj.update.A" in name
    }


@each
def test_rows_beyond_the_drawn_rank_have_no_gradient(config):
    model = adapted(config).train()
    seen = set()
    for step in range(6):
        draw_ranks(model, step)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        for layer in adapter_layers(model).values():
            rank, update = layer.active_config.rank, layer.update
            seen.add(rank)
            for factor in (update.A, update.B):
                for name, dim in factor.ROWS_ALONG.items():
                    gradient = getattr(factor, name).grad
                    if gradient is None:  # not learned
                        continue
                    assert gradient.narrow(dim, 0, rank).abs().max() > 0
                    assert not gradient.narrow(dim, rank, config.rank - rank).any()
    assert seen == {1, 4, 6}


@each
@pytest.mark.parametrize("way", ["checkpointing", "generated_once", "plain"])
def test_gradients_are_the_same_on_every_way(config, way):
    model = adapted(config).train()
    draw_ranks(model, 3)
    assert len(set(active_ranks(model))) > 1
    batches = torch.randint(3, 64, (3, 2, 5))
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
    wanted = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    if way == "checkpointing":
        enable_gradient_checkpointing(model)
    set_fused(model, way != "plain")
    if way == "generated_once":
        with generated_once(model):
            for ids in batches:
                model(input_ids=ids, labels=ids).loss.backward()
    else:
        for ids in batches:
            model(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)
    assert gradients(model).keys() == wanted.keys()


@each
def test_matrices_kept_in_evaluation_serve_every_rank(config):
    model = adapted(config)
    wanted = {}
    for rank in (6, 1, 4):
        fresh = adapted(config)
        set_active_rank(fresh, rank)
        wanted[rank] = logits(fresh)
    for rank in (6, 1, 4, 1, 6):
        set_active_rank(model, rank)
        assert torch.equal(logits(model), wanted[rank])


class First(nn.Module):
    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x, x, x)


IMAGE = torch.arange(4 * 5 * 5.0).view(1, 4, 5, 5).sin()
SITES = {
    "embedding": (lambda: nn.Embedding(10, 8, padding_idx=3), torch.tensor([1, 3, 3, 9])),
    "convolution": (lambda: nn.Conv2d(4, 8, 3, padding=1), IMAGE),
    "convolution in groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), IMAGE),
    "attention": (lambda: nn.Sequential(SelfAttention(8, 2), First()), torch.randn(5, 2, 8)),
}


@each
@pytest.mark.parametrize("site", SITES)
def test_every_site_computes_with_what_it_merges(config, site):
    make, x = SITES[site]
    model = nn.Sequential(make()).eval()
    inject_adapters(model, dataclasses.replace(config, target_modules=["0.0" if site == "attention" else "0"]))
    perturb(model)
    before = model(x)
    set_active_rank(model, 1)
    wanted = model(x)
    assert not torch.allclose(before, wanted)
    merge_adapters(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_draws_are_of_seed_step_and_place_and_uniform():
    model = adapted(ELASTIC["lora"])

    def drawn(step: int, seed: int | str = 0) -> list[int]:
        draw_ranks(model, step, seed)
        return active_ranks(model)

    torch.manual_seed(1)
    first = drawn(7)
    torch.manual_seed(2)
    assert drawn(7) == first == [6, 6, 4, 1, 1, 6, 4, 4, 4, 4, 4, 1, 4, 6]  # on every machine
    assert drawn(8) != first != drawn(7, seed=1)
    many = [rank for step in range(200) for rank in drawn(step)]
    assert all(abs(many.count(rank) / len(many) - 1 / 3) < 0.03 for rank in (1, 4, 6))
    whole_ranks(model)
    assert active_ranks(model) == [6] * 14


def test_ranks_by_name_have_the_elastic_ranks_below_them():
    config = dataclasses.replace(ELASTIC["lora"], rank_pattern={"down_proj": 5, "up_proj": 1})
    model = adapted(config)
    elastic = {name.rpartition(".")[2]: layer.config.elastic for name, layer in adapter_layers(model).items()}
    assert (elastic["q_proj"], elastic["down_proj"], elastic["up_proj"]) == ([1, 4, 6], [1, 4, 5], None)
    draw_ranks(model, 0)
    set_active_rank(model, 5)
    assert set(active_ranks(model)) == {5, 1}
    with pytest.raises(ValueError, match=r"up_proj is to have rank 2, and has 1 rows"):
        set_active_rank(model, {"up_proj": 2})
    assert set(active_ranks(model)) == {5, 1}


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "`rank` must be at least 1, got 0"),
        (7, "`rank` is 7, and the adapter has 6 rows at most"),
        ({"q_proj": 0}, "must be at least 1"),
        ({"nothing": 2}, "'nothing' matches no adapted layer. They are model.layers.0"),
    ],
)
def test_ranks_that_there_are_not_are_refused_and_nothing_changes(rank, message):
    model = adapted(ELASTIC["lora"])
    set_active_rank(model, 4)
    with pytest.raises(ValueError, match=message):
        set_active_rank(model, rank)
    assert active_ranks(model) == [4] * 14


def test_adapter_that_is_not_elastic_is_not_cut():
    model = adapted(LoRAConfig(rank=6))
    with pytest.raises(ValueError, match=r"q_proj was not made with `elastic`.*rows of 6 are no adapter"):
        set_active_rank(model, 4)
    set_active_rank(model, 6)
    draw_ranks(model, 0)
    assert active_ranks(model) == [6] * 14


@pytest.mark.parametrize("elastic", [[4], [6], [4, 8], [4, 4, 6], [6, 4], []])
def test_elastic_ranks_rise_to_the_rank(elastic):
    with pytest.raises(ValueError, match=r"two or more rising ranks, the last of them `rank`, which is 6; got \["):
        LoRAConfig(rank=6, elastic=elastic)


def test_elastic_ranks_of_another_type_are_refused():
    with pytest.raises(TypeError, match="`elastic` must be a list of ranks, got 4"):
        LoRAConfig(rank=6, elastic=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`elastic` must be an integer, got '4'"):
        LoRAConfig(rank=6, elastic=["4", 6])  # type: ignore[list-item]


@pytest.mark.parametrize(("kind", "title"), [(PoLARConfig, "PoLAR"), (CompacterConfig, "Compacter")])
def test_kinds_whose_first_rows_are_no_adapter_are_refused(kind, title):
    with pytest.raises(ValueError, match=rf"first rows of {title}'s matrices are no adapter .*take GenLoRA and LoRA"):
        kind(rank=16, elastic=[4, 16])


@each
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_configuration_of_the_first_rows_has_the_same_scaling(config, rank):
    first = config.of_first_rows(rank)
    assert first.rank == rank
    assert first.scaling_factor == pytest.approx(config.scaling_factor, rel=1e-15)
    assert first.elastic == {1: None, 4: [1, 4], 5: [1, 4, 5]}[rank]
    assert getattr(first, "gain", None) == getattr(config, "gain", None)
    assert config.of_first_rows(6) is config


def test_budget_refuses_elastic_ranks():
    shapes = [layer.shape for layer in adapter_layers(adapted(ELASTIC["lora"])).values()]
    with pytest.raises(ValueError, match="leave out `elastic`"):
        fit_budget(ELASTIC["lora"], shapes, 1000)
