from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from genlora_lightning import inject_adapters
from genlora_lightning.layers.linear import AdaptedLinear
from tests.conftest import perturb, small_config


def conv1d(in_features: int, out_features: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.bias)
    return layer


def pruned(linear: nn.Module) -> nn.Module:
    return prune.l1_unstructured(linear, "weight", 0.5)


def base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = {
        "linear": lambda: nn.Linear(12, 20),
        "no_bias": lambda: nn.Linear(12, 20, bias=False),
        "conv1d": lambda: conv1d(12, 20),
    }
    return layers[kind]().to(dtype)


def weight_of(layer: AdaptedLinear) -> torch.Tensor:
    """The base weight as (out, in)."""
    return layer.weight if isinstance(layer.base_layer, nn.Linear) else layer.weight.T


KINDS = ["linear", "no_bias", "conv1d"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_known_while_the_weight_is_a_flat_piece(kind):
    layer = base(kind)
    for piece in (torch.empty(7), torch.empty(0)):  # as FSDP1 leaves it on a rank, outside of forwards
        layer.weight = nn.Parameter(piece)
        assert AdaptedLinear.matrix_shape(layer) == (20, 12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["zero_latent", "zero_weight"])
def test_new_adapter_changes_no_bit_of_the_output(kind, dtype, init):
    layer = base(kind, dtype)
    x = torch.randn(3, 5, 12, dtype=dtype)
    expected = layer(x)
    assert torch.equal(AdaptedLinear(layer, small_config(init=init))(x), expected)


def test_new_adapter_changes_no_bit_of_the_output_under_autocast():
    layer, x = base("linear"), torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        output = AdaptedLinear(layer, small_config())(x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("scaling", ["sqrt_rank", "rank"])
def test_forward_equals_a_linear_with_the_updated_weight(kind, dtype, scaling):
    layer = AdaptedLinear(base(kind, dtype), small_config(scaling=scaling, alpha=1.5, num_centers=2))
    if dtype == torch.float64:
        layer.double()
    perturb(layer)
    x = torch.randn(3, 5, 12, dtype=dtype)
    updated = weight_of(layer).to(torch.float64) + layer.delta_weight().double()
    bias = None if layer.bias is None else layer.bias.double()
    expected = F.linear(x.double(), updated, bias)
    assert not torch.allclose(layer(x).double(), layer.base_layer(x).double(), atol=0.1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_merged_layer_computes_the_same_and_unmerging_restores_every_bit(kind, dtype):
    layer = AdaptedLinear(base(kind, dtype), small_config())
    perturb(layer)
    x, before = torch.randn(7, 12, dtype=dtype), layer.weight.clone()
    expected = layer(x)
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.weight, before)
    tolerance = max(TOLERANCE[dtype], 1e-5)  # a float64 base still has a float32 adapter
    torch.testing.assert_close(layer(x), expected, rtol=tolerance, atol=tolerance)
    merged_once = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, merged_once)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    assert torch.equal(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_merging_rounds_once_from_float32():
    layer = AdaptedLinear(base("linear", torch.bfloat16), small_config())
    perturb(layer)
    expected = (layer.weight.float() + layer.delta_weight()).bfloat16()
    layer.merge()
    assert torch.equal(layer.weight, expected)


def test_merging_leaves_a_module_that_shares_the_weight_alone():
    embedding, linear = nn.Embedding(20, 12), nn.Linear(12, 20, bias=False)
    linear.weight = embedding.weight
    layer = AdaptedLinear(linear, small_config())
    perturb(layer)
    before = embedding.weight.clone()
    layer.merge()
    assert torch.equal(embedding.weight, before)
    layer.unmerge()
    assert linear.weight is embedding.weight


def test_unmerge_after_a_cast_restores_the_cast_weight():
    layer = AdaptedLinear(base("linear"), small_config())
    perturb(layer)
    before = layer.weight.clone()
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert torch.equal(layer.weight, before.bfloat16())


def test_merging_into_a_quantized_weight_is_an_error_that_says_so():
    layer = AdaptedLinear(base("linear"), small_config())
    layer.base_layer.weight = nn.Parameter(torch.zeros(120, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight is stored as \(120, 1\) torch.uint8.*quantized or sharded"):
        layer.merge()
    assert not layer.merged


def test_factors_give_the_same_update_as_a_lora_layer_bit_for_bit():
    layer = AdaptedLinear(base("linear"), small_config())
    perturb(layer)
    A, B = layer.factors()
    assert A.shape == (4, 12)
    assert B.shape == (20, 4)
    assert torch.equal(layer.scaling * (B @ A), layer.delta_weight())


def test_every_parameter_has_a_gradient_after_two_steps():
    for init in ("zero_latent", "zero_weight"):
        layer = AdaptedLinear(base("linear"), small_config(init=init, num_centers=2))
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        x, target = torch.randn(16, 12), torch.randn(16, 20)
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
        for name, parameter in layer.adapter_parameters().items():
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).all(), name
        assert layer.base_layer.weight.grad is None


def test_fixed_centers_and_widths_are_not_trained_but_are_the_adapters():
    layer = AdaptedLinear(base("linear"), small_config(learn_centers=False, learn_widths=False))
    trained = {name for name, p in layer.adapter_parameters().items() if p.requires_grad}
    assert trained == {"update.A.latent", "update.A.weight", "update.B.latent", "update.B.weight"}
    assert "update.A.centers" in layer.adapter_parameters()


def test_backward_does_not_keep_a_float32_copy_of_a_bfloat16_input():
    layer = AdaptedLinear(base("linear", torch.bfloat16), small_config())
    x = torch.randn(64, 12, dtype=torch.bfloat16)
    large = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: large.append((t.dtype, t.shape)) or t, lambda t: t):
        layer(x)
    assert (torch.float32, x.shape) not in large


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    layer = AdaptedLinear(base("linear"), small_config(dropout=0.5))
    x = torch.randn(4, 12)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    perturb(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_adapter_is_in_the_mode_of_the_layer_it_is_put_on():
    assert not AdaptedLinear(base("linear").eval(), small_config(dropout=0.5)).dropout.training
    assert AdaptedLinear(base("linear").train(), small_config(dropout=0.5)).dropout.training


def test_disabled_layer_is_its_base():
    layer = AdaptedLinear(base("linear"), small_config())
    perturb(layer)
    layer.enabled = False
    x = torch.randn(4, 12)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_layer_is_active_exactly_where_it_adds_to_what_its_base_gives(enabled, merged):
    layer = AdaptedLinear(base("linear"), small_config())
    perturb(layer)
    layer.merge()
    if not merged:
        layer.unmerge()
    layer.enabled = enabled
    x = torch.randn(4, 12)
    assert layer.is_active == (enabled and not merged)
    assert layer.is_active != torch.equal(layer(x), layer.base_layer(x))
    assert (layer.wanted_dtype() is not None) == layer.is_active


class ScaledLinear(nn.Linear):
    """A linear that takes more than its input, as those of some models do."""

    def forward(self, x: torch.Tensor, scale: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
        return super().forward(x) * scale + shift


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("state", ["active", "disabled", "merged"])
def test_further_arguments_are_the_base_layers_alone(fused, state):
    layer = AdaptedLinear(ScaledLinear(12, 20), small_config())
    perturb(layer)
    layer.fused = fused
    x = torch.randn(3, 12)
    delta = layer.delta_weight().detach()
    weight = layer.weight.clone()
    if state == "disabled":
        layer.enabled = False
    if state == "merged":
        layer.merge()
    update = F.linear(x, delta)
    expected = F.linear(x, weight, layer.bias) * 3 + 5
    # A merged update is in the weight, which the base layer does with what it does.
    expected += {"active": 1, "disabled": 0, "merged": 3}[state] * update
    torch.testing.assert_close(layer(x, 3.0, shift=5.0), expected)


def test_argument_that_the_base_layer_does_not_take_is_an_error_as_without_an_adapter():
    layer = AdaptedLinear(nn.Linear(12, 20), small_config())
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        layer(torch.randn(3, 12), scale=2.0)


def test_cast_of_the_model_leaves_the_adapter_in_float32():
    layer = AdaptedLinear(base("linear"), small_config()).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in layer.adapter_parameters().values()} == {torch.float32}
    assert layer(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layer_can_be_copied_and_put_on_the_meta_device():
    layer = AdaptedLinear(base("linear"), small_config())
    perturb(layer)
    x = torch.randn(4, 12)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with torch.device("meta"):
        on_meta = AdaptedLinear(nn.Linear(12, 20), small_config())
    assert all(p.is_meta for p in on_meta.parameters())
    assert on_meta(torch.empty(4, 12, device="meta")).shape == (4, 20)


def test_other_modules_are_refused():
    with pytest.raises(TypeError, match=r"AdaptedLinear cannot adapt a Embedding"):
        AdaptedLinear(nn.Embedding(3, 4), small_config())


def test_transforms_of_torch_func_give_the_gradients_of_autograd():
    from torch.func import functional_call, grad, vmap

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    inject_adapters(model, small_config())
    perturb(model)
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(3, 8)

    def loss(parameters: dict, row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, parameters, (row[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(each[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [weight_norm, spectral_norm, old_weight_norm, pruned], ids=lambda make: make.__name__)
def test_linear_with_a_computed_weight_is_adapted_beside_it_and_takes_its_base_by_name(make):
    layer = AdaptedLinear(make(nn.Linear(12, 20)).eval(), small_config())
    perturb(layer)
    x = torch.randn(3, 12)
    wanted = layer.base_layer(x) + F.linear(x, layer.delta_weight())
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    other = make(nn.Linear(12, 20)).eval()
    state = {f"layer.{name}": tensor for name, tensor in other.state_dict().items()}
    found = nn.ModuleDict({"layer": layer}).load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(".update." in name for name in found.missing_keys)
    torch.testing.assert_close(layer.base_layer(x), other(x))
