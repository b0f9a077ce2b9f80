"""Pruning sets the lowest scores of each row to 0, from the inputs that each matrix has behind the pruned ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from genlora_lightning import LoRAConfig, inject_adapters
from genlora_lightning.backbone.pruning import prune_model
from tests.models import tiny_gpt2, tiny_llama


class Stack(nn.Module):
    """Two linears with an activation between them, the second as transformers' Conv1D; and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 12), Conv1D(6, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.head(self.second(torch.tanh(self.first(x))))


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack()


def batch(**more: Any) -> dict[str, Any]:
    # Inputs of very different sizes, so that the weights' sizes alone would choose others.
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1)) * torch.logspace(-2, 2, 8)
    return {"x": x, **more}


def reference(W: Tensor, x: Tensor, number: int) -> Tensor:
    """Which weights go, row by row, in the words of the paper."""
    scores = W.abs() * x.reshape(-1, x.shape[-1]).norm(dim=0)
    gone = torch.zeros_like(W, dtype=torch.bool)
    for row, order in zip(gone, scores.argsort(dim=1), strict=True):
        row[order[:number]] = True
    return gone


def pruned_by_hand(model: Stack, x: Tensor, sparsity: float) -> Stack:
    with torch.no_grad():
        model.first.weight[reference(model.first.weight, x, int(8 * sparsity))] = 0
        hidden = torch.tanh(model.first(x))
        model.second.weight.T[reference(model.second.weight.T, hidden, int(12 * sparsity))] = 0
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in model.named_parameters()}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_each_matrix_is_pruned_by_what_the_pruned_ones_before_it_give(sparsity):
    model, wanted = stack(), pruned_by_hand(stack(), batch()["x"], sparsity)
    report = prune_model(model, batch(), sparsity, exclude_modules=["head"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted.get_parameter(name)), name
    assert [row.zeros for row in report.rows] == [12 * int(8 * sparsity), 6 * int(12 * sparsity)]
    text = str(report)
    assert "(6, 12)" in text
    assert "left alone: head (in `exclude_modules`)" in text
    assert f"{sum(row.zeros for row in report.rows)} of 168 values in 2 matrices are 0" in text


def test_scores_are_not_the_sizes_of_weights_alone():
    model, other = stack(), stack()
    prune_model(model, batch(), 0.5)
    prune_model(other, {"x": torch.ones_like(batch()["x"])}, 0.5)
    assert not torch.equal(model.first.weight == 0, other.first.weight == 0)


def test_tokens_that_are_masked_do_not_count():
    whole = batch()["x"]
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1:, 3:] = 0
    noisy = whole.masked_fill((mask == 0)[..., None], 1e4)
    masked, cut = stack(), stack()
    prune_model(masked, {"x": noisy, "attention_mask": mask}, 0.5)
    prune_model(cut, {"x": whole[mask.bool()]}, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), cut.parameters(), strict=True))


def test_pattern_leaves_n_of_each_m_neighbours():
    model = stack()
    report = prune_model(model, batch(), pattern=(1, 4), exclude_modules=["head"])
    assert report.sparsity == 0.75
    for W in (model.first.weight, model.second.weight.T):
        assert torch.equal((W != 0).unflatten(-1, (-1, 4)).sum(-1).unique(), torch.tensor([1]))


def test_more_can_be_pruned_later_and_zeros_stay():
    model = stack()
    prune_model(model, batch(), 0.25)
    before = zeros(model)
    prune_model(model, batch(), 0.5)
    once = stack()
    prune_model(once, batch(), 0.5)
    assert (model.first.weight == 0).sum() == (once.first.weight == 0).sum()
    assert bool(((model.first.weight == 0) | ~before["first.weight"]).all())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_heads_and_embeddings_are_left_alone_and_the_model_is_as_it_was_otherwise(make):
    model = make().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = torch.randint(0, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    report = prune_model(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, 0.5)
    pruned = {f"{row.module}.weight" for row in report.rows}
    assert len(pruned) == {"llama": 14, "gpt2": 8}[model.config.model_type]
    for name, parameter in model.named_parameters():
        kept = parameter != 0
        assert torch.equal(parameter[kept], before[name][kept]), name
        assert (name in pruned) == bool((parameter == 0).sum() > (before[name] == 0).sum()), name
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert report.total_parameters == sum(p.numel() for p in model.parameters())


class Unvisited(Stack):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.first(x)


def test_errors_leave_the_model_as_it_was():
    model = Unvisited()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"did not come to 2 of 3 linears \(second\)"):
        prune_model(model, batch())
    with pytest.raises(ValueError, match="inputs of first in the calibration batch are not finite"):
        prune_model(model, {"x": batch()["x"] * float("inf")})
    broken = stack()
    broken.load_state_dict(before)
    broken.first.weight.data[:, 0] = 0  # as it was before, too
    first = broken.first.weight.clone()

    def fail(*_: Any) -> None:
        raise RuntimeError("stopped behind the first matrix")

    broken.second.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(RuntimeError, match="stopped behind"):
        prune_model(broken, batch())
    assert torch.equal(broken.first.weight, first)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not model.first._forward_pre_hooks


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparsity": 1.0}, "`sparsity` must be finite and at least 0 and less than 1, got 1.0"),
        ({"pattern": (4, 4)}, "less than 4 of 4 weights must stay"),
        ({"pattern": (2, 5)}, "first has 8 inputs, no multiple of 5"),
        ({"target_modules": ["secnd"]}, "'secnd', which no linear matches. Near matches: second"),
    ],
)
def test_bad_arguments_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        prune_model(stack(), batch(), **changes)


def test_what_cannot_be_pruned_is_refused():
    tied = tiny_llama()
    with pytest.raises(ValueError, match=r"lm_head cannot be pruned: model\.embed_tokens has the same weight"):
        prune_model(tied, {"input_ids": torch.ones(1, 3, dtype=torch.long)}, target_modules=["lm_head"])
    adapted = stack()
    inject_adapters(adapted, dataclasses.replace(LoRAConfig(), rank=2))
    with pytest.raises(ValueError, match="has adapters: prune the base first"):
        prune_model(adapted, batch())
    computed = stack()
    nn.utils.parametrizations.weight_norm(computed.first)
    with pytest.raises(ValueError, match="first cannot be pruned: its weight is quantized, sharded, or computed"):
        prune_model(computed, batch())
    with pytest.raises(ValueError, match="its weight has no memory"):
        prune_model(stack().to("meta"), batch())
    with pytest.raises(ValueError, match=r"no nn\.Linear or Conv1D to prune"):
        prune_model(nn.Sequential(nn.ReLU()), {})
