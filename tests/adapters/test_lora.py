from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from genlora_lightning import (
    LoRAConfig,
    OptimizerConfig,
    effective_ranks,
    inject_adapters,
    merge_adapters,
    unmerge_adapters,
)
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.layers.sharing import set_fused
from genlora_lightning.training.optim import build_optimizer, parameter_groups
from tests.conftest import perturb
from tests.models import tiny_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]


def pair_of_models(rank: int, alpha: float, *, use_rslora: bool = False) -> tuple[nn.Module, nn.Module]:
    """The same LoRA on the same model: ours and PEFT's."""
    torch.manual_seed(1)
    ours = tiny_llama()
    theirs = copy.deepcopy(ours)
    scaling = "sqrt_rank" if use_rslora else "rank"
    inject_adapters(ours, LoRAConfig(rank=rank, alpha=alpha, scaling=scaling, target_modules=TARGETS))
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=use_rslora, target_modules=TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, layer in adapter_layers(ours).items():
            other = theirs.base_model.model.get_submodule(name)
            layer.update.A.matrix.copy_(other.lora_A["default"].weight)
    return ours, theirs


def tensors(ours: nn.Module, theirs: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for name, layer in adapter_layers(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        found.append((layer.update.A.matrix, other.lora_A["default"].weight))
        found.append((layer.update.B.matrix.T, other.lora_B["default"].weight))
    return found


@pytest.mark.parametrize("make_optimizer", [lambda p: torch.optim.SGD(p, 0.2, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize(("rank", "alpha", "use_rslora"), [(4, 8.0, False), (3, 5.0, True)])
def test_twenty_steps_equal_those_of_pefts_lora(make_optimizer, rank, alpha, use_rslora):
    ours, theirs = pair_of_models(rank, alpha, use_rslora=use_rslora)
    optimizers = [make_optimizer([p for p in model.parameters() if p.requires_grad]) for model in (ours, theirs)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        ids = torch.randint(3, 60, (2, 7), generator=generator)
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for mine, other in tensors(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)
    assert all(mine.abs().max() > 1e-4 for mine, _ in tensors(ours, theirs))


def test_new_adapter_changes_nothing_and_has_the_parameters_said():
    model = tiny_llama().eval()
    ids = torch.tensor([[3, 5, 7]])
    before = model(input_ids=ids).logits
    report = inject_adapters(model, LoRAConfig(rank=3))
    assert torch.equal(model(input_ids=ids).logits, before)
    wanted = sum(3 * (layer.in_features + layer.out_features) for layer in adapter_layers(model).values())
    assert report.adapter_parameters == report.lora_parameters == wanted
    assert report.summary().startswith("LoRA adapts 14 linears")


def test_fused_and_plain_agree():
    ours, _ = pair_of_models(4, 8.0)
    perturb(ours)
    ids = torch.randint(3, 60, (2, 7))
    gradients = []
    for fused in (True, False):
        set_fused(ours, fused)
        ours.zero_grad()
        ours(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in adapter_parameters(ours).values()])
    for mine, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)


def test_gradients_of_one_generation_per_step_are_those_of_one_per_micro_batch():
    ours, _ = pair_of_models(4, 8.0)
    perturb(ours)
    batches = torch.randint(3, 60, (3, 2, 7))
    for ids in batches:
        ours(input_ids=ids, labels=ids).loss.backward()
    wanted = [p.grad.clone() for p in adapter_parameters(ours).values()]
    ours.zero_grad()
    with generated_once(ours):
        for ids in batches:
            ours(input_ids=ids, labels=ids).loss.backward()
    for parameter, gradient in zip(adapter_parameters(ours).values(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


def test_merged_model_gives_the_same_and_unmerging_is_exact():
    ours, _ = pair_of_models(4, 8.0)
    perturb(ours)
    ids = torch.randint(3, 60, (2, 7))
    before = ours.eval()(input_ids=ids).logits
    weights = [layer.weight for layer in adapter_layers(ours).values()]
    merge_adapters(ours)
    torch.testing.assert_close(ours(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)
    unmerge_adapters(ours)
    assert all(layer.weight is weight for layer, weight in zip(adapter_layers(ours).values(), weights, strict=True))
    assert all(value > 1.5 for value in effective_ranks(ours).values())


def test_lora_plus_is_a_factor_on_the_rate_of_b():
    ours, _ = pair_of_models(4, 8.0)
    groups = parameter_groups(ours, OptimizerConfig(lr=1e-3, lr_factors={"lora_b": 16}))
    assert {group["name"]: group["lr"] for group in groups} == {"lora_a": 1e-3, "lora_b": pytest.approx(16e-3)}
    assert {tuple(p.shape) for p in groups[0]["params"]} == {(4, 16), (4, 24)}
    build_optimizer(ours, OptimizerConfig(lr_factors={"lora_b": 16}))


def test_factor_for_a_group_that_there_is_not_is_an_error():
    ours, _ = pair_of_models(4, 8.0)
    with pytest.raises(ValueError, match=r"names \['latents'\], but the groups .* are \['lora_a', 'lora_b'\]"):
        parameter_groups(ours, OptimizerConfig(lr_factors={"latents": 2}))
