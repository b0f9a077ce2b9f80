"""Rows of chosen tokens are trained in full, in the embedding and what is tied to it, and nothing else of them is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F

from genlora_lightning import (
    AdapterSet,
    GenLoRAFinetuning,
    LoRAConfig,
    adapters_disabled,
    convert_checkpoint,
    describe_adapter,
    export_lora,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    save_merged,
    unmerge_adapters,
    verify_adapter,
)
from genlora_lightning.adapters.token_rows import TokenRowsConfig
from genlora_lightning.injection.elastic import set_active_rank
from genlora_lightning.injection.inject import adapter_config, adapter_layers, adapter_parameters
from genlora_lightning.planning.plan import make_plan
from genlora_lightning.planning.traffic import Setup
from genlora_lightning.training.optim import OptimizerConfig, parameter_groups
from tests.conftest import perturb, small_config
from tests.distributed.runs import PlainLlama, SaveAt, fit, llama_loader
from tests.models import tiny_gpt2, tiny_llama, tiny_t5

IDS = torch.tensor([[1, 2, 5, 7, 3, 60]])
TOKENS = [60, 5]
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def config(**changes: object) -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "target_modules": ["q_proj"], "tokens_to_train": TOKENS, **changes})


def adapted(model: nn.Module, **changes: object) -> nn.Module:
    inject_adapters(model, config(**changes))
    perturb(model)
    return model


def with_rows(model: nn.Module, rows: torch.Tensor) -> nn.Module:
    """The model with other rows in its table, as training in full would leave it."""
    model.get_input_embeddings().weight.data[sorted(TOKENS)] = rows.to(model.dtype)
    return model


def rows_of(model: nn.Module) -> torch.Tensor:
    return adapter_layers(model)[EMBEDDING].table.rows.detach()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_new_rows_change_nothing_and_only_they_are_trained():
    model = tiny_llama()
    before = logits(model)
    report = inject_adapters(model, config())
    assert torch.equal(logits(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "q_proj" not in n} == {f"{EMBEDDING}.update.table.rows"}
    assert report.trainable_parameters == 2 * 2 * (16 + 16) + 2 * 16
    assert f"2 of 64 rows of {EMBEDDING}" in report.summary()
    assert report.adapter_parameters == 2 * 2 * (16 + 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_computes_as_if_its_table_had_the_rows(dtype):
    model = tiny_llama().to(dtype)
    other = copy.deepcopy(model)
    adapted(model, target_modules=["q_proj"])
    for name, parameter in adapter_parameters(model).items():
        if "q_proj" in name:
            parameter.data.zero_()
    with_rows(other, rows_of(model))
    assert other.lm_head.weight is other.get_input_embeddings().weight
    found, wanted = logits(model), logits(other)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-5 if dtype is torch.float32 else 0.02)
    others = [token for token in range(64) if token not in TOKENS]
    assert torch.equal(found[..., others], wanted[..., others])


def test_gradients_are_those_of_the_rows_in_embedding_and_tied_head():
    model = tiny_llama()
    other = copy.deepcopy(model)
    inject_adapters(model, config())
    labels = IDS.roll(-1)
    for one in (model, other):
        F.cross_entropy(one(input_ids=IDS).logits.flatten(0, 1), labels.flatten()).backward()
    whole = other.get_input_embeddings().weight.grad
    found = adapter_layers(model)[EMBEDDING].table.rows.grad
    assert torch.allclose(found, whole[sorted(TOKENS)], atol=1e-6)
    assert model.get_input_embeddings().base_layer.weight.grad is None


class Scaled(nn.Embedding):
    """As Gemma's: rows times a number; and as OPT's positions: ids that are shifted."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids + 2) * torch.tensor(3.7).to(self.weight.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_with_a_forward_of_its_own_scales_and_shifts_the_rows(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(12, 4), nn.Linear(4, 3)).to(dtype)
    other = copy.deepcopy(model)
    inject_adapters(model, LoRAConfig(rank=1, target_modules=["1"], tokens_to_train=[4, 9]))
    table = adapter_layers(model)["0"].table
    with torch.no_grad():
        table.rows.add_(torch.randn_like(table.rows))
        other[0].weight[[4, 9]] = table.rows.to(dtype)
    ids = torch.arange(10)
    assert torch.equal(model(ids), other(ids))


def test_head_with_a_weight_of_its_own_is_trained_where_it_is_named():
    model = tiny_llama(tie_word_embeddings=False)
    report = inject_adapters(model, config())
    assert "a head with a weight of its own" in report.skipped[HEAD]
    model = tiny_llama(tie_word_embeddings=False)
    other = copy.deepcopy(model)
    report = inject_adapters(model, config(tokens_to_train={"embed_tokens": [5], "lm_head": [5, 60]}))
    assert HEAD not in report.skipped
    perturb(model)
    layers = adapter_layers(model)
    for name, parameter in adapter_parameters(model).items():
        if "q_proj" in name:
            parameter.data.zero_()
    assert layers[EMBEDDING].table is not layers[HEAD].table
    other.get_input_embeddings().weight.data[[5]] = layers[EMBEDDING].table.rows.data
    other.lm_head.weight.data[[5, 60]] = layers[HEAD].table.rows.data
    torch.testing.assert_close(logits(model), logits(other))


def test_folder_holds_the_rows_alone_and_loads_into_a_base_that_was_resized_anew(tmp_path):
    base = tiny_llama()
    again = copy.deepcopy(base)
    again.get_input_embeddings().weight.data[sorted(TOKENS)] = 0.5  # new tokens' rows are random each time
    model = adapted(base, alpha=3.0)
    folder = save_adapter(model, tmp_path / "adapter")
    verify_adapter(folder)
    assert (folder / "adapter_model.safetensors").stat().st_size < 4000
    described = describe_adapter(folder)
    assert described.trained_modules == {f"2 of 64 rows of {EMBEDDING}": 32}
    assert described.config["kind"] == "lora"
    assert described.config["tokens_to_train"] == TOKENS
    load_adapter(again, folder)
    torch.testing.assert_close(logits(again), logits(model))
    assert adapter_layers(again)[EMBEDDING].table is adapter_layers(again)[HEAD].table
    assert adapter_config(again) == config(alpha=3.0)
    load_adapter(again, folder, replace=True)


def test_merging_keeps_the_tie_and_unmerging_every_bit(tmp_path):
    model = tiny_llama()
    before = model.get_input_embeddings().weight.clone()
    adapted(model)
    expected, rows = logits(model), rows_of(model)
    merge_adapters(model)
    weight = model.get_input_embeddings().base_layer.weight
    assert model.lm_head.base_layer.weight is weight
    assert torch.equal(weight[sorted(TOKENS)], rows)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    unmerge_adapters(model)
    assert torch.equal(model.get_input_embeddings().base_layer.weight, before)
    save_merged(model, tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    with adapters_disabled(model):
        assert not torch.allclose(logits(model), expected)
    remove_adapters(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, before)


def test_other_kinds_and_models_have_rows_too():
    for model, kind, name in (
        (tiny_gpt2(), small_config(target_modules=["c_attn"], tokens_to_train=[3]), "transformer.wte"),
        (tiny_t5(), small_config(target_modules=["q"], tokens_to_train=[3]), "transformer.shared"),
    ):
        inject_adapters(model, kind)
        assert adapter_layers(model)[name].config.tokens == [3]
        assert adapter_config(model) == kind


def test_rows_have_a_group_of_their_own_without_decay():
    groups = {g["name"]: g for g in parameter_groups(adapted(tiny_llama()), OptimizerConfig(weight_decay=0.1))}
    assert groups["token_rows"]["weight_decay"] == 0
    assert [p.shape for p in groups["token_rows"]["params"]] == [(2, 16)]


def test_elastic_adapters_are_cut_beside_rows():
    model = adapted(tiny_llama(), rank=4, elastic=[1, 4], tokens_to_train=[1, 2, 3])
    set_active_rank(model, 1)
    assert adapter_layers(model)[EMBEDDING].config.rank == 3


class Tied(PlainLlama):
    def build(self) -> None:
        with torch.random.fork_rng():
            self.net = tiny_llama()


def run(folder: Path, *callbacks: Callback, **settings: object) -> dict[str, torch.Tensor]:
    adapter = GenLoRAFinetuning(config(), adapter_dir=str(folder / "adapter"))
    return fit("single", "replicate", folder, Tied("init", "adamw"), *callbacks, adapter=adapter, **settings).state


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    file = tmp_path / "half.ckpt"
    whole = run(tmp_path, SaveAt(file, 5), loader=llama_loader())
    resumed = run(tmp_path, ckpt_path=file, loader=llama_loader())
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    content = torch.load(file, weights_only=True)["state_dict"]
    (name,) = (name for name in content if "table" in name)
    assert content[name].shape == (2, 16)
    assert not torch.equal(content[name], whole[name])
    module = Tied()
    load_adapter(module, tmp_path / "adapter")
    assert torch.equal(adapter_parameters(module)[name], whole[name])
    verify_adapter(convert_checkpoint(file, Tied(), tmp_path / "converted"))


def test_plan_counts_what_is_trained():
    setup = Setup(gpus=2, strategy="ddp", batch=1, tokens=8)
    plan = make_plan(tiny_llama().config, "tiny", "causal-lm", config(), setup)
    assert plan.trainable_parameters == inject_adapters(tiny_llama(), config()).trainable_parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_to_train": ["<new>"]}, "there is no tokenizer here"),
        ({"tokens_to_train": [64]}, r"resize_token_embeddings"),
        ({"tokens_to_train": {"nothing": [1]}}, "which no module matches"),
        ({"tokens_to_train": {"norm": [1]}}, "name embeddings or linears"),
        ({"tokens_to_train": {"embed_tokens": [1], "lm_head": [2]}}, "other tokens for lm_head than"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "it is adapted, too"),
        ({"modules_to_train": ["embed_tokens"]}, "it is trained in full"),
    ],
)
def test_what_has_no_rows_is_refused_and_nothing_changed(changes, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, config(**changes))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ("a", TypeError, "must be a list of tokens"),
        ([True], TypeError, "must be an integer"),
        ([-1], ValueError, "at least 0"),
        ([1, 1], ValueError, "name a token once"),
        ({"a": []}, ValueError, "name a token once"),
        ({"a": "b"}, TypeError, "such lists by names"),
        ([""], ValueError, "ids or strings"),
    ],
)
def test_configuration_says_what_tokens_must_be(tokens, error, message):
    with pytest.raises(error, match=message):
        LoRAConfig(tokens_to_train=tokens)


def test_model_with_several_embeddings_wants_a_name():
    model = nn.ModuleDict({"a": nn.Embedding(4, 2), "b": nn.Embedding(4, 2), "c": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="there are a, b"):
        inject_adapters(model, LoRAConfig(rank=1, target_modules=["c"], tokens_to_train=[1]))


def test_rows_alone_are_no_kind_and_a_set_has_none(tmp_path):
    with pytest.raises(ValueError, match="no kind of adapter"):
        inject_adapters(tiny_llama(), TokenRowsConfig(tokens=[1]))
    folder = save_adapter(adapted(tiny_llama()), tmp_path / "adapter")
    adapters = AdapterSet(tiny_llama())
    for adapter in (config(), folder):
        with pytest.raises(ValueError, match="rows of tokens trained in full"):
            adapters.add("a", adapter)


# -- PEFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_peft_loads_the_export_and_computes_the_same(tmp_path: Path, tied):
    from peft import PeftModel

    model, base = tiny_llama(tie_word_embeddings=tied), tiny_llama(tie_word_embeddings=tied)
    tokens = TOKENS if tied else {"embed_tokens": TOKENS, "lm_head": [60]}
    adapted(model, tokens_to_train=tokens)
    report = export_lora(model, tmp_path / "lora")
    assert "no rows of an embedding" in report.server_hint()
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    with adapters_disabled(model):
        assert not torch.allclose(logits(loaded), logits(model), atol=1e-2)
    merged = loaded.merge_and_unload()
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)


def test_what_peft_would_compute_otherwise_is_not_exported(tmp_path):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.q_proj, self.head = nn.Embedding(64, 4), nn.Linear(4, 4), nn.Linear(4, 64)

    untied = Model()
    inject_adapters(untied, config(tokens_to_train={"head": [1]}))
    with pytest.raises(ValueError, match="leaves out the bias"):
        export_lora(untied, tmp_path / "lora")
    tied = Model()
    tied.head = nn.Linear(4, 64, bias=False)
    tied.head.weight = tied.embedding.weight
    inject_adapters(tied, config())
    with pytest.raises(ValueError, match="it is tied to embedding"):
        export_lora(tied, tmp_path / "lora")
