from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from genlora_lightning.layers.fused import adapted_linear, fusable
from genlora_lightning.layers.linear import AdaptedLinear
from tests.conftest import perturb, small_config
from tests.layers.test_linear import KINDS, base


class Operators(TorchDispatchMode):
    """Names of the operators that compute something: no views, nothing that only makes an object."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        if not func.is_view and name not in ("_unsafe_view", "detach", "empty.memory_format", "_reshape_alias"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def inputs(dtype=torch.float64, transposed=False, rank=3):
    weight = torch.randn((6, 5) if transposed else (5, 6), dtype=dtype)
    x, A, B = (torch.randn(*s, dtype=dtype).requires_grad_() for s in ((2, 4, 6), (rank, 6), (rank, 5)))
    return x, weight, torch.randn(5, dtype=dtype), A, B


def plain(x, weight, bias, A, B, transposed=False):
    return F.linear(x, weight.T if transposed else weight, bias) + F.linear(F.linear(x, A), B.T)


def layer_of(kind: str = "linear", dtype: torch.dtype = torch.float32, **changes) -> AdaptedLinear:
    layer = AdaptedLinear(base(kind, dtype), small_config(**changes))
    perturb(layer)
    return layer


def gradients(layer: AdaptedLinear, x: Tensor, output: Tensor) -> dict[str, Tensor]:
    """Of a fixed function of the output, by the input and the adapter's parameters."""
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape).to(output.dtype)
    wanted = {"x": x, **{n: p for n, p in layer.adapter_parameters().items() if p.requires_grad}}
    return dict(zip(wanted, torch.autograd.grad((output * weights).sum(), [*wanted.values()]), strict=True))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
def test_output_may_be_written_to_in_place(shape):
    layer = layer_of()
    x = torch.randn(*shape[:-1], layer.in_features)
    expected = gradients(layer, x.requires_grad_(), (layer(x) + 1) * layer(x))
    output = layer(x)
    assert not output._is_view()
    output += 1
    for name, gradient in gradients(layer, x, output * layer(x)).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_own_backward_passes_gradcheck_and_gives_the_formula(transposed, with_bias):
    for x, weight, bias, A, B in (inputs(), widening(torch.float64)):
        b, W = bias if with_bias else None, weight.T.contiguous() if transposed else weight
        function = lambda x, A, B, W=W, b=b: adapted_linear(x, W, b, A, B, transposed=transposed)  # noqa: E731
        torch.testing.assert_close(function(x, A, B), plain(x, W, b, A, B, transposed), rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(function, (x, A, B))


def test_dropout_drops_of_the_updates_input_alone_in_forward_and_backward():
    x, weight, bias, A, B = inputs()
    torch.manual_seed(5)
    output = adapted_linear(x, weight, bias, A, B, dropout=0.4)
    torch.manual_seed(5)
    _, mask = torch.native_dropout(x.detach().view(-1, 6), 0.4, True)
    assert 0 < mask.sum() < mask.numel()
    dropped = x * (mask.double() / 0.6).view_as(x)
    expected = F.linear(x, weight, bias) + F.linear(F.linear(dropped, A), B.T)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(output)
    ours = torch.autograd.grad((output * weights).sum(), (x, A, B))
    theirs = torch.autograd.grad((expected * weights).sum(), (x, A, B))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 5, 12), (0, 12)])
def test_fused_layer_equals_the_plain_one_in_output_and_gradients(kind, shape):
    layer = layer_of(kind, num_centers=2)
    x = torch.randn(*shape, requires_grad=True)
    output = layer(x)
    ours = gradients(layer, x, output)
    layer.fused = False
    expected = layer(x)
    theirs = gradients(layer, x, expected)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_fused_layer_equals_the_plain_one_under_autocast(kind, input_dtype):
    layer = layer_of(kind)
    x = torch.randn(9, 12).to(input_dtype).requires_grad_()
    results = []
    for layer.fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(x)
        assert output.dtype == torch.bfloat16
        results.append((output, gradients(layer, x, output)))
    (output, ours), (expected, theirs) = results
    torch.testing.assert_close(output, expected, rtol=3e-2, atol=3e-2)
    for name, gradient in theirs.items():
        assert ours[name].dtype == gradient.dtype
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < 2e-2, (name, error)


def test_backward_that_is_called_inside_of_autocast_computes_as_the_forward_did():
    layer = layer_of()
    x = torch.randn(9, 12, requires_grad=True)
    expected = gradients(layer, x, layer(x))
    output = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(layer, x, output)
    for name, gradient in expected.items():
        assert torch.equal(ours[name], gradient), name


@pytest.mark.parametrize("narrows", [True, False])
@pytest.mark.parametrize(("kind", "dtype"), [("linear", torch.float32), ("no_bias", torch.bfloat16)])
def test_forward_takes_three_operators_and_backward_five_or_six(kind, dtype, narrows):
    x, weight, bias, A, B = inputs(dtype) if narrows else widening(dtype)
    with Operators() as forward:
        output = adapted_linear(x, weight, bias if kind == "linear" else None, A, B)
    assert len(forward.names) == 3, forward.names
    gradient = torch.randn_like(output)
    with Operators() as backward:
        torch.autograd.grad(output, (x, A, B), gradient)
    assert len(backward.names) == 6 - narrows, backward.names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_adds_two_operators_to_those_of_the_base(kind, input_dtype):
    layer = layer_of(kind)
    x = torch.randn(9, 12).to(input_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        A, B = layer.store.matrices(layer.update.A, layer.update.B, torch.bfloat16)
        with Operators() as of_base:
            layer.base_layer(x)
        with Operators() as of_both:
            adapted_linear(x, layer.weight, layer.bias, A, B, transposed=kind == "conv1d")
    assert len(of_both.names) <= len(of_base.names) + 2, (of_base.names, of_both.names)


def widening(dtype=torch.float32):
    """Inputs of a linear with more outputs than inputs: those of the other one, the two sides exchanged."""
    _, weight, _, A, B = inputs(dtype)
    outputs, entries = weight.T.shape
    x = torch.randn(9, entries, dtype=dtype, requires_grad=True)
    bias = torch.randn(outputs, dtype=dtype)
    return x, weight.detach().T.contiguous(), bias, *(t.detach().clone().requires_grad_() for t in (B, A))


@pytest.mark.parametrize("narrows", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_is_kept_but_what_is_given_and_a_few_numbers_per_token_where_the_input_is_wide(autocast, narrows):
    x, weight, bias, A, B = inputs(torch.float32) if narrows else widening()
    if autocast:
        A, B = A.detach().bfloat16().requires_grad_(), B.detach().bfloat16().requires_grad_()
    given = {t.untyped_storage().data_ptr() for t in (x, weight, A, B)}
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        adapted_linear(x, weight, bias, A, B)
    further = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    assert given <= {t.untyped_storage().data_ptr() for t in kept}
    assert [t.numel() for t in further] == ([x.numel() // x.shape[-1] * A.shape[0]] if narrows else [])


def test_input_without_a_gradient_gets_none():
    x, weight, bias, A, B = inputs()
    with Operators() as operators:
        torch.autograd.grad(adapted_linear(x.detach(), weight, bias, A, B).sum(), (A, B))
    with Operators() as with_x:
        torch.autograd.grad(adapted_linear(x, weight, bias, A, B).sum(), (x, A, B))
    assert len(with_x.names) == len(operators.names) + 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_a_graph_break(backend, autocast, dropout):
    torch._dynamo.reset()
    layer = layer_of(dropout=dropout)
    x = torch.randn(9, 12, requires_grad=True)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, expected = compiled(x), layer(x)
    ours, theirs = gradients(layer, x, output), gradients(layer, x, expected)
    if not dropout:
        torch.testing.assert_close(output, expected, rtol=3e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)
        for name, gradient in theirs.items():
            assert (ours[name] - gradient).norm() <= (2e-2 if autocast else 1e-5) * gradient.norm(), name
    assert all((gradient != 0).any() for gradient in ours.values())


def test_second_derivative_is_an_error_that_names_the_way_out():
    x, weight, bias, A, B = inputs()
    output = adapted_linear(x, weight, bias, A, B)
    with pytest.raises(
        RuntimeError, match=r"adapted linear .*again .*set_fused\(model, False\)` of `genlora_lightning\.layers\.sh"
    ):
        torch.autograd.grad(output.sum(), x, create_graph=True)


def test_plain_layer_can_be_differentiated_twice():
    layer = layer_of().double()
    layer.fused = False
    latent = layer.update.A.latent
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)

    def squared_slope():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return first.square().sum()

    (second,) = torch.autograd.grad(squared_slope(), latent)
    direction, step = torch.randn_like(latent), 1e-5
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            latent.add_(sign * step * direction)
        sides.append(squared_slope().item())
        with torch.no_grad():
            latent.sub_(sign * step * direction)
    expected = (sides[0] - sides[1]) / (2 * step)
    assert abs(expected) > 1e-3
    assert (second * direction).sum().item() == pytest.approx(expected, rel=1e-5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked() -> nn.Linear:
    linear = nn.Linear(12, 20)
    linear.register_forward_hook(lambda module, args, output: 3 * output)
    return linear


def replaced() -> nn.Linear:
    linear = nn.Linear(12, 20)
    linear.forward = lambda x: x.new_ones(*x.shape[:-1], 20)
    return linear


@pytest.mark.parametrize("make", [lambda: Doubled(12, 20), hooked, replaced])
def test_linear_that_computes_something_else_is_called(make):
    linear = make()
    x = torch.randn(5, 12, requires_grad=True)
    expected = linear(x)
    layer = AdaptedLinear(linear, small_config())
    assert torch.equal(layer(x), expected)
    perturb(layer)
    output = layer(x)
    ours = gradients(layer, x, output)
    layer.fused = False
    torch.testing.assert_close(output, layer(x), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(layer, x, layer(x)).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


def test_linear_that_is_trained_gets_its_gradient():
    layer = layer_of()
    layer.base_layer.requires_grad_(True)
    x = torch.randn(5, 12)
    assert fusable(layer.base_layer, x) is None
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None


def test_input_of_another_dtype_is_the_same_error_as_without_an_adapter():
    layer = layer_of()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(3, 12, dtype=torch.float64))
