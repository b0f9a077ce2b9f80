from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

from genlora_lightning import GenLoRAConfig, LoRAConfig, inject_adapters, remove_adapters
from genlora_lightning.adapters.base import MatrixShape, StackShape
from genlora_lightning.adapters.stacked import StackedFactor
from genlora_lightning.backbone.architectures import enable_gradient_checkpointing
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.layers.accumulation import generated_once
from genlora_lightning.layers.experts import AdaptedExperts
from genlora_lightning.layers.linear import AdaptedLinear
from genlora_lightning.layers.sharing import set_fused
from genlora_lightning.layers.stacked_weight import StackedWeight
from tests.mixtures import KINDS, PARAMETERS, mixture, perturb
from tests.test_kinds_and_sites import OuterConfig

CONFIGS = {
    "genlora": GenLoRAConfig(rank=3, num_groups_b=2, target_parameters=PARAMETERS),
    "lora": LoRAConfig(rank=3, target_parameters=PARAMETERS),
    "genlora, one generator": GenLoRAConfig(
        rank=3,
        num_groups_b=2,
        num_centers=2,
        learn_centers=True,
        learn_widths=True,
        target_parameters=PARAMETERS,
        share_over_experts="generator",
    ),
    "genlora, one A": GenLoRAConfig(rank=3, num_groups_b=2, target_parameters=PARAMETERS, share_over_experts="a"),
    "lora, one A": LoRAConfig(rank=3, target_parameters=PARAMETERS, share_over_experts="a"),
    "outer": OuterConfig(target_parameters=PARAMETERS),  # without factors
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


def experts_of(model: nn.Module) -> AdaptedExperts:
    return [module for module in model.modules() if isinstance(module, AdaptedExperts)][-1]


def routed(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(9, 16, generator=generator, dtype=dtype).requires_grad_()
    # Of two experts at most, one of them twice: others get no token.
    index = torch.tensor([[0, 2], [2, 0], [2, 3]] * 3)
    return x, index, torch.rand(9, 2, generator=generator, dtype=dtype)


def linears(experts: AdaptedExperts, name: str) -> list[AdaptedLinear]:
    """An ordinary adapted linear for each matrix of a stack, with the values of its slice."""
    stack = experts.stacks[name]
    found = []
    for number, matrix in enumerate(stack.weight):
        matrix = matrix.T if experts.base_layer.is_transposed else matrix
        linear = nn.Linear(*reversed(matrix.shape), bias=False).to(matrix.dtype)
        linear.weight.data.copy_(matrix)
        layer = AdaptedLinear(linear, stack.config).to(matrix.dtype)
        for own, parameter in layer.adapter_parameters().items():
            if own in stack.adapter_parameters():
                stacked = stack.adapter_parameters()[own]
                parameter.data.copy_(stacked[number if len(stacked) > 1 else 0])
            else:  # of a kind without factors
                parameter.data.copy_(stack.adapter_parameters()[own.replace("update.", f"update.each.{number}.")])
        found.append(layer)
    return found


def by_loop(
    experts: AdaptedExperts, x: Tensor, index: Tensor, weights: Tensor
) -> tuple[Tensor, list[list[AdaptedLinear]]]:
    base = experts.base_layer
    up, down = linears(experts, "gate_up_proj"), linears(experts, "down_proj")
    rows = []
    for token, chosen, own in zip(x, index, weights, strict=True):
        row = torch.zeros_like(token)
        for expert, weight in zip(chosen.tolist(), own, strict=True):
            h = up[expert](token)
            h = base._apply_gate(h + base.gate_up_proj_bias[expert] if base.has_bias else h)
            h = down[expert](h)
            row = row + weight * (h + base.down_proj_bias[expert] if base.has_bias else h)
        rows.append(row)
    return torch.stack(rows), [up, down]


@each
@pytest.mark.parametrize("kind", KINDS)
def test_each_way_to_compute_experts_is_exactly_a_loop_of_adapted_linears(config, kind):
    for ways, dtype, tolerance in (
        (("eager", "batched_mm"), torch.float64, 1e-12),
        (("grouped_mm",), torch.float32, 1e-4),
    ):
        model = mixture(kind, dtype=dtype)
        base = copy.deepcopy(model)(IDS).logits
        inject_adapters(model, config)
        model.to(dtype)
        assert torch.equal(model(IDS).logits, base)
        experts = experts_of(perturb(model))
        x, index, weights = routed(model, dtype)
        wanted, layers = by_loop(experts, x, index, weights)
        (of_x,) = torch.autograd.grad(wanted.square().sum(), x, retain_graph=True)
        wanted.square().sum().backward()
        for way in ways:
            model.set_experts_implementation(way)
            experts.zero_grad()
            given = experts(x, index, weights)
            torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance)
            x.grad = None
            given.square().sum().backward()
            torch.testing.assert_close(x.grad, of_x, rtol=tolerance, atol=tolerance)
            for name, of_matrices in zip(("gate_up_proj", "down_proj"), layers, strict=True):
                for own, parameter in experts.stacks[name].adapter_parameters().items():
                    parts = own.split(".")
                    numbers = [int(parts[2])] if parts[1] == "each" else range(len(of_matrices))
                    linears_own = [of_matrices[n].adapter_parameters()[own.replace(f".each.{n}", "")] for n in numbers]
                    expected = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in linears_own])
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    gradient = gradient[None] if parts[1] == "each" else gradient
                    if len(gradient) < len(expected):  # shared
                        expected = expected.sum(0, keepdim=True)
                    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


def test_gradients_are_the_same_kept_for_a_step_and_by_plain_autograd():
    def gradients(fused: bool, once: bool) -> list[Tensor]:
        model = mixture()
        inject_adapters(model, CONFIGS["genlora"])
        perturb(model)
        set_fused(model, fused)
        if once:
            with generated_once(model):
                for row in IDS:
                    model(row[None]).logits.square().mean().backward()
        else:
            for row in IDS:
                model(row[None]).logits.square().mean().backward()
        return [p.grad for p in adapter_parameters(model).values() if p.requires_grad]

    wanted = gradients(True, False)
    assert all(bool(gradient.any()) for gradient in wanted)
    for others in (gradients(False, False), gradients(True, True)):
        for given, expected in zip(others, wanted, strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at them
def test_compiled_experts_have_the_outputs_and_gradients_of_plain_ones():
    torch.compiler.reset()
    model = mixture()
    inject_adapters(model, CONFIGS["genlora"])
    experts = experts_of(perturb(model))
    x, index, weights = routed(model, torch.float32)

    def run(runner: nn.Module) -> list[Tensor]:
        given = x.detach().clone().requires_grad_()
        experts.zero_grad()
        output = runner(given, index, weights)
        output.square().sum().backward()
        return [output.detach(), given.grad, *(p.grad for p in experts.parameters() if p.requires_grad)]

    plain = [found.clone() for found in run(experts)]
    assert all(bool(found.any()) for found in plain)
    for given, expected in zip(run(torch.compile(experts, backend="eager")), plain, strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers_have_the_same_gradients_and_inference_keeps_what_it_made(monkeypatch):
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = mixture().train()
        inject_adapters(model, CONFIGS["genlora"])
        perturb(model)
        if checkpointing:
            enable_gradient_checkpointing(model)
        model(IDS).logits.square().mean().backward()
        return [p.grad for p in adapter_parameters(model).values() if p.requires_grad]

    for given, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7)
    model = mixture()
    inject_adapters(model, CONFIGS["genlora"])
    with torch.no_grad():
        wanted = perturb(model)(IDS).logits
        monkeypatch.setattr(StackedFactor, "make_many", None)  # nothing is made again
        assert torch.equal(model(IDS).logits, wanted)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_dropout_acts_on_the_input_of_the_update_alone(experts):
    config = LoRAConfig(rank=3, target_modules=[], target_parameters=["experts.down_proj"], dropout=0.999999)
    model = mixture(experts=experts).train()
    base = model(IDS).logits
    inject_adapters(model, config)
    perturb(model)
    torch.testing.assert_close(model(IDS).logits, base)  # all of it is dropped
    assert not torch.allclose(model.eval()(IDS).logits, base)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="transformers 4 has no grouped product")
def test_sum_is_formed_for_what_is_no_product_and_says_so_with_dropout():
    torch.manual_seed(0)
    weight, left, right = torch.randn(3, 4, 5), torch.randn(3, 4, 2), torch.randn(3, 2, 5)
    whole = weight + 0.5 * left @ right
    ours = StackedWeight(weight, left, right, 0.5)
    x, y, offsets = torch.randn(6, 4), torch.randn(6, 5), torch.tensor([2, 2, 6], dtype=torch.int32)
    pairs = [
        (torch.einsum("eij,tj->eti", ours, y), torch.einsum("eij,tj->eti", whole, y)),
        (ours.sum(0), whole.sum(0)),
        (torch.cat([ours, ours]), torch.cat([whole, whole])),
        (ours[1] @ y.T, whole[1] @ y.T),
        (x @ ours[1], x @ whole[1]),
        (F.linear(y, ours[torch.tensor(2)]), F.linear(y, whole[2])),
        (torch.bmm(ours[[0, 2]], y.view(2, 5, 3)), torch.bmm(whole[[0, 2]], y.view(2, 5, 3))),
        (torch.bmm(x.view(3, 2, 4), ours), torch.bmm(x.view(3, 2, 4), whole)),
        (F.linear(x, ours[0].T), F.linear(x, whole[0].T)),
        (torch.stack(list(ours[:, 1])), whole[:, 1]),
    ]
    for given, expected in pairs:
        torch.testing.assert_close(given, expected)
    grouped = torch.ops.transformers.grouped_mm_fallback
    torch.testing.assert_close(grouped(x, ours, offsets), grouped(x, whole, offsets))
    torch.testing.assert_close(grouped(y, ours.mT, offsets), grouped(y, whole.mT.contiguous(), offsets))
    assert ours._whole is not None
    assert (ours.shape, ours.dtype, len(ours)) == (whole.shape, whole.dtype, 3)
    with pytest.raises(RuntimeError, match="no product which the adapter knows"):
        StackedWeight(weight, left, right, 0.5, nn.Dropout(0.5)).sum()


def test_known_products_form_no_sum(monkeypatch):
    monkeypatch.setattr(StackedWeight, "whole", None)
    for kind in KINDS:
        for way in ("eager", "batched_mm", "grouped_mm"):
            model = mixture(kind, way)
            inject_adapters(model, CONFIGS["genlora"])
            assert bool(perturb(model)(IDS).logits.isfinite().all())


def test_copies_pickles_and_what_is_asked_of_the_module():
    model = mixture()
    state = copy.deepcopy(model.state_dict())
    inject_adapters(model, CONFIGS["genlora"])
    wanted = perturb(model)(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, wanted)
    experts = experts_of(model)
    assert experts.num_experts == 5
    assert not hasattr(experts, "of_nobody")
    for name, parameter in model.named_parameters():
        if ".update." not in name:
            parameter.data.zero_()
    model.load_state_dict(state, strict=False)  # by the base's own names
    assert torch.equal(model(IDS).logits, wanted)
    remove_adapters(model)
    assert model.state_dict().keys() == state.keys()
    assert not adapter_layers(model)
    with pytest.raises(TypeError, match="no layer that can be called"):
        experts.gate_up_proj(wanted)


def test_shapes_of_stacks_are_those_of_one_matrix_and_go_through_files():
    shape = StackShape(5, 3, 4)
    assert MatrixShape.of(shape.sizes) == shape == (3, 4)
    for other in (MatrixShape.of(shape.sizes), copy.deepcopy(shape), pickle.loads(pickle.dumps(shape))):
        assert (other.num_matrices, other.sizes) == (5, [5, 3, 4])
    assert (MatrixShape.of([3, 4]).num_matrices, MatrixShape(3, 4).sizes) == (1, [3, 4])
