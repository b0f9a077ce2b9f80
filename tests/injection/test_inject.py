from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from genlora_lightning import (
    GenLoRAConfig,
    adapters_disabled,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.injection.inject import adapter_config, adapter_layers, adapter_parameters
from genlora_lightning.layers.linear import AdaptedLinear
from tests.conftest import perturb, small_config
from tests.models import tiny_bert, tiny_gpt2, tiny_llama


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


IDS = torch.arange(10).view(2, 5)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_trainable_names_are_exactly_the_adapters_and_modules_to_train():
    model = Net()
    inject_adapters(model, small_config(modules_to_train=["head"]))
    parts = [f"{g}.{p}" for g in ("update.A", "update.B") for p in ("latent", "weight", "centers", "log_widths")]
    adapters = {f"blocks.{i}.{j}.{part}" for i in range(2) for j in (0, 2) for part in parts}
    assert trainable(model) == adapters | {"head.weight", "head.bias"}
    assert set(adapter_parameters(model)) == adapters


def test_injected_model_gives_the_same_bits_and_reports_what_it_did():
    model = Net()
    expected = model(IDS)
    total = sum(p.numel() for p in model.parameters())
    config = small_config(exclude_modules=["head"])
    report = inject_adapters(model, config)
    assert torch.equal(model(IDS), expected)
    assert [row.module for row in report.adapted] == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]
    assert report.skipped == {"head": "in `exclude_modules`"}
    assert report.adapter_parameters == report.trainable_parameters == 4 * config.count_parameters(MatrixShape(16, 8))
    assert report.total_parameters == total + report.trainable_parameters
    assert report.lora_parameters == 4 * 4 * (8 + 16)
    assert "blocks.*.*" in str(report)
    assert "(16, 8)" in str(report)
    assert "left alone: head (in `exclude_modules`)" in str(report)
    assert "blocks.1.2" in report.table(collapse=False)


def test_second_injection_changes_nothing_and_another_configuration_is_an_error():
    model = Net()
    first = inject_adapters(model, small_config())
    layers = list(adapter_layers(model).values())
    perturb(model)
    expected = model(IDS)
    again = inject_adapters(model, small_config())
    assert again.adapted == first.adapted
    assert list(adapter_layers(model).values()) == layers
    assert torch.equal(model(IDS), expected)
    with pytest.raises(ValueError, match=r"another configuration \(rank: 4 there, 5 asked for\)"):
        inject_adapters(model, small_config(rank=5))


def test_parts_with_configurations_of_their_own_are_refused_where_one_is_asked_for():
    model = Net()
    inject_adapters(model.blocks[0], small_config())
    inject_adapters(model.blocks[1], small_config(rank=5))
    with pytest.raises(ValueError, match=r"\(rank: 5 there, 4 asked for; at blocks.1.0: not all linears have the same"):
        inject_adapters(model, small_config())


def test_whole_of_which_a_part_was_adapted_before_says_what_is_left_alone():
    model = Net()
    inject_adapters(model.blocks[0], small_config())
    report = inject_adapters(model, small_config())
    assert [row.module for row in report.adapted] == ["blocks.0.0", "blocks.0.2"]
    assert "Left alone: blocks.1.0, blocks.1.2, head (adapters were put into a part of the model before" in str(report)


def test_configuration_may_be_a_dictionary():
    model = Net()
    inject_adapters(model, {"rank": 3, "num_groups_b": 2, "kind": "genlora"})
    assert adapter_config(model).rank == 3
    with pytest.raises(ValueError, match=r"Unknown GenLoRAConfig fields \['r'\]. PEFT's `r` is `rank` here"):
        inject_adapters(Net(), {"r": 3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["heed"]}, r"names 'heed', which no linear matches. Near matches: head"),
        ({"target_modules": ["head", "nothing_like_it"]}, r"names 'nothing_like_it', .* There are: embed, head"),
        ({"target_modules": r"blocks\.\d+\.attn"}, r"matches none of the \d layers that can be adapted"),
        ({"target_modules": ["blocks"]}, r"blocks is a ModuleList, not a linear. Name its linears: \['0', '2'\]"),
        ({"target_modules": ["blocks.0.1"]}, r"blocks.0.1 is a ReLU, not a linear"),
        ({"target_modules": ["head"], "modules_to_train": ["head"]}, r"head cannot be adapted: trained in full"),
        ({"modules_to_train": ["haed"]}, r"`modules_to_train` names 'haed', which no module matches. .* head"),
        ({"exclude_modules": ["hed"]}, r"`exclude_modules` names 'hed'"),
        (
            {"exclude_modules": ["blocks", "head"]},
            r"matches none of the \d layers that can be adapted. Left out were blocks.0.0: in `excl",
        ),
        (
            {"num_groups": 5},
            r"`num_groups_b` is 5, but head has only 3 outputs .* Lower `num_groups_b` to 3 or add 'head'",
        ),
        (
            {"num_groups_a": 9},
            r"`num_groups_a` is 9, but blocks.0.0 has only 8 inputs .* Lower `num_groups_a` to 8 or add 'blocks.0.0'",
        ),
    ],
)
def test_configuration_that_does_not_fit_is_an_error_and_changes_nothing(changes, message):
    model = Net()
    names, before = list(model.state_dict()), trainable(model)
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, small_config(**changes))
    assert list(model.state_dict()) == names
    assert trainable(model) == before


def test_lists_that_are_changed_after_the_injection_do_not_change_the_adapters_configuration():
    config = small_config(exclude_modules=["head"])
    model = Net()
    inject_adapters(model, config)
    config.exclude_modules.append("embed")
    assert adapter_config(model).exclude_modules == ["head"]


def test_configuration_out_of_a_file_is_the_one_it_was_made_from():
    model = Net()
    config = GenLoRAConfig(rank=4, num_groups_b=2)
    inject_adapters(model, config)
    report = inject_adapters(model, GenLoRAConfig.from_dict(config.to_dict()))  # its gain is a number, not None
    assert report.adapter_parameters > 0
    with pytest.raises(ValueError, match=r"made with another configuration \(.*weight_gain"):
        inject_adapters(model, GenLoRAConfig(rank=4, num_groups_b=2, weight_gain=3.0))


def test_model_without_linears_is_an_error():
    with pytest.raises(ValueError, match=r"This Sequential has no nn.Linear or Conv1D to adapt"):
        inject_adapters(nn.Sequential(nn.Conv2d(3, 4, 3)), small_config())


def test_lazy_linear_is_an_error_that_says_what_to_do():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0.weight has no shape yet, .* Run one forward of the model"):
        inject_adapters(model, small_config())
    model(torch.zeros(1, 4))
    assert len(inject_adapters(model, small_config()).adapted) == 2


def test_linear_as_the_whole_model_is_an_error():
    with pytest.raises(ValueError, match=r"itself a linear layer"):
        inject_adapters(nn.Linear(4, 4), small_config())


def test_targets_by_regular_expression_and_by_suffix():
    by_expression, by_suffix = Net(), Net()
    inject_adapters(by_expression, small_config(target_modules=r"blocks\.1\.\d"))
    assert list(adapter_layers(by_expression)) == ["blocks.1.0", "blocks.1.2"]
    inject_adapters(by_suffix, small_config(target_modules=["0.0", "head"]))
    assert list(adapter_layers(by_suffix)) == ["blocks.0.0", "head"]


def test_linear_that_stands_in_two_places_gets_one_adapter():
    model = Net()
    model.blocks[1] = model.blocks[0]
    inject_adapters(model, small_config())
    assert model.blocks[0][0] is model.blocks[1][0]
    assert isinstance(model.blocks[1][0], AdaptedLinear)
    shared = nn.Linear(8, 8)
    other = nn.Sequential(shared, nn.ReLU(), shared)
    inject_adapters(other, small_config())
    assert other[0] is other[2]
    assert len(adapter_layers(other)) == 1
    remove_adapters(other)
    assert other[0] is shared
    assert other[2] is shared


def test_linear_tied_to_an_embedding_is_taken_for_the_head_and_stays_tied():
    model = Net()
    model.head = nn.Linear(8, 10, bias=False)
    model.head.weight = model.embed.weight
    report = inject_adapters(model, small_config())
    assert report.skipped == {"head": "output head, tied to an embedding"}
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    ("make", "adapted", "left_alone"),
    [
        (tiny_llama, 14, {"lm_head"}),
        (tiny_gpt2, 8, {"lm_head"}),
        (tiny_bert, 13, {"classifier"}),
    ],
)
def test_all_linear_adapts_the_body_of_a_transformers_model_and_not_its_head(make, adapted, left_alone):
    model = make()
    report = inject_adapters(model, small_config())
    assert len(report.adapted) == adapted
    assert set(report.skipped) == left_alone
    nested = nn.ModuleDict({"backbone": make()})
    assert set(inject_adapters(nested, small_config()).skipped) == {f"backbone.{name}" for name in left_alone}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_transformers_model_merges_unmerges_and_loses_its_adapters_again(make):
    model = make().eval()
    ids = torch.randint(0, 60, (2, 7))
    base = model(ids).logits
    inject_adapters(model, small_config())
    assert torch.equal(model(ids).logits, base)
    perturb(model)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, base, atol=1e-3)
    with adapters_disabled(model):
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, adapted)
    merge_adapters(model)
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
    with adapters_disabled(model):
        assert torch.equal(model(ids).logits, base)
    assert all(layer.merged for layer in adapter_layers(model).values())
    unmerge_adapters(model)
    assert torch.equal(model(ids).logits, adapted)
    remove_adapters(model)
    assert not adapter_layers(model)
    assert torch.equal(model(ids).logits, base)


def test_merged_weights_can_be_kept_without_a_trace_of_the_adapters():
    model = tiny_llama().eval()
    names, ids = list(model.state_dict()), torch.randint(0, 60, (2, 7))
    inject_adapters(model, small_config())
    perturb(model)
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"`keep_merged` needs merged adapters, but 14 are not"):
        remove_adapters(model, keep_merged=True)
    merge_adapters(model)
    remove_adapters(model, keep_merged=True)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_merge_that_fails_half_way_merges_nothing():
    model = Net()
    inject_adapters(model, small_config())
    perturb(model)
    model.head.base_layer.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized"):
        merge_adapters(model)
    assert not any(layer.merged for layer in adapter_layers(model).values())


@pytest.mark.parametrize("function", [merge_adapters, unmerge_adapters, remove_adapters])
def test_model_without_adapters_is_an_error(function):
    with pytest.raises(ValueError, match=r"This Net has no adapters. Call `inject_adapters"):
        function(Net())
    with pytest.raises(ValueError, match="no adapters"), adapters_disabled(Net()):
        pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_torch_transformer_layers_do_not_bypass_their_adapters_in_evaluation():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    report = inject_adapters(model, small_config())
    assert set(report.skipped.values()) == {"nn.MultiheadAttention reads its weight without calling it"}
    perturb(model)
    expected = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[0], expected[0], rtol=1e-4, atol=1e-5)
    remove_adapters(model)
    assert model.layers[0].activation_relu_or_gelu == 1
    assert model.use_nested_tensor


def test_adapting_the_projection_of_torch_attention_by_name_is_an_error():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(ValueError, match=r"out_proj cannot be adapted: nn.MultiheadAttention reads its weight"):
        inject_adapters(model, small_config(target_modules=["out_proj"]))


def test_second_injection_sets_the_trainable_flags_again_and_takes_another_dropout():
    model = Net()
    config = small_config(exclude_modules=["blocks.0"], modules_to_train=["head"], learn_widths=False)
    first = inject_adapters(model, config)
    before = trainable(model)
    for flag in (True, False):
        model.requires_grad_(flag)
        again = inject_adapters(model, config)
        assert trainable(model) == before
        assert again == first
    inject_adapters(model, dataclasses.replace(config, dropout=0.5))
    assert {layer.dropout.p for layer in adapter_layers(model).values()} == {0.5}
    assert {layer.config.dropout for layer in adapter_layers(model).values()} == {0.5}
