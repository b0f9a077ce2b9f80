"""The benchmark's own kinds: what specifications are read as, counts, and the same numbers however computed."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benchmarks.quality.adapters import SineConfig, StiefelConfig
from benchmarks.quality.experiments import EXPERIMENTS
from benchmarks.quality.methods import METHODS
from benchmarks.quality.rows import RESULTS, read_rows
from benchmarks.quality.variants import (
    READERS,
    FactorForm,
    inject_variant,
    mean_gradients,
    start_at,
    variant_config,
)
from genlora_lightning import inject_adapters
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.layers.sharing import set_fused
from tests.models import tiny_bert

SIGNED = {"R": 8, "G": 1, "kernel": "linear", "signs": "shifted", "equal": True, "b": {"G": 4, "plain_rows": 2}}
CORE = {"R": 4, "a": {"dense": "frozen"}, "b": {"dense": "frozen"}, "core": True, "start": "weight"}
MIXED = {"R": 4, "a": {"dense": "train", "a_scale": 0.5}, "grouping": "strided", "K": 2, "freeze": ["centers"]}
SHORTER = {"R": 4, "alpha": 4.0, "shorter": True}
BLOCKS = {"R": 6, "G": 3, "q": 2, "kernel": "linear", "blocks": True, "freeze": ["centers", "log_widths"]}
SPECS = {"signed": SIGNED, "core": CORE, "mixed": MIXED, "shorter": SHORTER, "blocks": BLOCKS}
CONFIGS = {
    "stiefel": StiefelConfig(rank=3),
    "sine": SineConfig(rank=3),
    **{name: variant_config(spec) for name, spec in SPECS.items()},
}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_each_variant_that_is_planned_or_has_rows_is_read():
    planned = [arm.fixed for one in EXPERIMENTS.values() for arm in one.arms if arm.method == "variant"]
    rows = [json.loads(row["settings"]) for row in read_rows(RESULTS).values() if row["method"] == "variant"]
    lost = [spec for spec in rows if "base" in spec or spec.get("start") == "gradient"]
    assert len(lost) == 4
    for spec in [*planned, *(spec for spec in rows if spec not in lost)]:
        config = variant_config(spec)
        assert config.a.kernel == spec.get("kernel", "gaussian")
        assert config.b.num_groups == spec.get("b", {}).get("G", spec.get("G", 8))


def test_field_of_a_specification_that_there_is_not_is_refused():
    assert variant_config({"b": {"q": 3}}).b == FactorForm(num_latents=3)
    with pytest.raises(ValueError, match=r"no fields \['groups'\].*num_groups"):
        variant_config({"a": {"groups": 3}})


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_is_the_same_out_of_json(name):
    assert read_config(json.loads(json.dumps(CONFIGS[name].to_dict()))) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_as_many_as_counted(name):
    model, config = tiny_bert().base_model, CONFIGS[name]
    inject_adapters(model, config)
    counted = sum(config.count_parameters(layer.shape) for layer in adapter_layers(model).values())
    assert sum(p.numel() for p in trained(model).values()) == counted > 0


@pytest.mark.parametrize("name", SPECS)
def test_outputs_and_gradients_are_the_same_generated_for_the_whole_model_at_once(name):
    ids = torch.arange(12).view(2, 6)
    plain = tiny_bert().base_model.eval()
    inject_variant(plain, SPECS[name], 0)
    for parameter in trained(plain).values():
        torch.nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(plain)
    set_fused(plain, False)
    of_plain = plain(input_ids=ids).last_hidden_state
    with generated_once(fused):
        of_fused = fused(input_ids=ids).last_hidden_state
        of_fused.square().mean().backward()
    of_plain.square().mean().backward()
    torch.testing.assert_close(of_fused, of_plain)
    for (key, one), other in zip(trained(fused).items(), trained(plain).values(), strict=True):
        # The centres and widths of straight functions have none.
        assert (one.grad is None) == (other.grad is None), key
        if one.grad is not None:
            assert one.grad.abs().max() > 0, key
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7, msg=key)


def test_core_starts_between_singular_vectors_of_the_weight():
    model = tiny_bert().base_model
    inject_variant(model, CORE, 0)
    for layer in adapter_layers(model).values():
        A, B = layer.pair
        assert B.core.abs().max() == 0
        # Uᵀ W V is diagonal, with the largest singular values in it.
        product = B.stored @ layer.base_weight @ (A.stored * 3**0.5).T
        expected = torch.linalg.svdvals(layer.base_weight)[:4]
        torch.testing.assert_close(product, torch.diag(expected), rtol=1e-4, atol=1e-5)


def test_latents_are_shared_by_those_that_read_the_residual_stream():
    model = tiny_bert().base_model
    model.pooler = None  # as the tasks have it
    rates = inject_variant(model, {"kernel": "linear", "share_a": True, "lr_rbf": 0.5, "lr_a": 3.0}, 0)
    assert rates == {"rbf_a": 1.5, "rbf_b": 0.5, "latents_a": 3.0}
    readers = {name: layer.update.A.latent for name, layer in adapter_layers(model).items() if name.endswith(READERS)}
    others = {id(layer.update.A.latent) for name, layer in adapter_layers(model).items() if name not in readers}
    assert len(readers) == 8
    assert len({id(latent) for latent in readers.values()}) == 1
    assert len(others) == 4
    assert id(next(iter(readers.values()))) not in others


def test_shorter_factor_of_each_linear_is_trained_from_zero_and_the_other_one_is_frozen():
    model = tiny_bert().base_model
    inject_variant(model, SHORTER, 0)
    shapes = set()
    for layer in adapter_layers(model).values():
        A, B = layer.pair
        trained, frozen = (B, A) if B.num_entries <= A.num_entries else (A, B)
        shapes.add(trained is A)
        assert trained.stored.requires_grad
        assert not frozen.stored.requires_grad
        assert trained.stored.abs().max() == 0 < frozen.stored.abs().max()
    assert shapes == {True, False}


def test_blocks_start_as_lora_and_each_block_has_weights_of_its_own():
    model = tiny_bert().base_model
    inject_variant(model, BLOCKS, 0)
    layer = next(iter(adapter_layers(model).values()))
    A, B = layer.pair
    torch.nn.init.normal_(B.latent)
    torch.testing.assert_close(layer.delta_weight(), layer.scaling * B.latent.T @ A.latent)
    before = layer.delta_weight()
    with torch.no_grad():
        B.weight[:, 1, 2 * 2 :] *= 3.0  # the second group of outputs, the third of inputs
    changed = (layer.delta_weight() != before).any(1), (layer.delta_weight() != before).any(0)
    assert torch.equal(changed[0], B.group == 1)
    assert torch.equal(changed[1], A.group == 2)


def test_mean_gradient_is_that_of_the_losses_and_what_is_frozen_starts_at_its_leading_inputs():
    model, ids = tiny_bert().base_model.eval().requires_grad_(False), torch.arange(24).view(4, 6)
    model.pooler = None
    losses = [lambda part=part: model(input_ids=part).last_hidden_state.exp().sum() for part in ids.split(2)]
    found = mean_gradients(model, losses)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    name = "encoder.layer.0.attention.self.query"
    weight = model.get_submodule(name).weight.requires_grad_(True)
    (expected,) = torch.autograd.grad(model(input_ids=ids).last_hidden_state.exp().sum(), weight)
    weight.requires_grad_(False)
    torch.testing.assert_close(found[name], expected / 2, rtol=1e-4, atol=1e-5)

    inject_variant(model, {"R": 2, "a": {"dense": "frozen"}, "b": {"dense": "train"}}, 0)
    start_at(found, adapter_layers(model))
    A, B = adapter_layers(model)[name].pair
    leading = torch.linalg.svd(expected, full_matrices=False)[2][:2]
    torch.testing.assert_close(A.stored * 3**0.5, leading)  # as long as LoRA's random rows
    assert B.stored.abs().max() == 0


def test_latent_started_at_a_gradient_is_moved_faster_than_any_other_of_its_length():
    model = tiny_bert().base_model
    METHODS["started genlora"].apply(model, {"rank": 16, "num_latents_b": 2, "start": "mean gradient"}, 0)
    layers = adapter_layers(model)
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(layer.base_weight.shape, generator=generator) for name, layer in layers.items()}
    lengths = {name: layer.pair[0].latent.norm().item() for name, layer in layers.items()}
    start_at(gradients, layers)
    name, layer = next(iter(layers.items()))
    A, B = layer.pair
    assert A.latent.norm().item() == pytest.approx(lengths[name])

    def first_step() -> float:
        (gradient,) = torch.autograd.grad((layer.delta_weight() * gradients[name]).sum(), B.latent)
        return gradient.norm().item()

    started = first_step()
    for _ in range(20):
        with torch.no_grad():
            A.latent.normal_(generator=generator)
            A.latent.mul_(lengths[name] / A.latent.norm())
        assert first_step() < started
