from __future__ import annotations

import itertools
import math

import pytest
import torch

from genlora_lightning import RBFGenerator
from genlora_lightning.analysis import effective_rank
from genlora_lightning.generator import anchored_rbf, generate, slope_at_zero

KERNELS = ["gaussian", "inverse_multiquadric", "inverse_quadratic"]


def phi(u: float, kernel: str) -> float:
    if kernel == "gaussian":
        return math.exp(-(u**2) / 2)
    return (1 + u**2) ** (-0.5 if kernel == "inverse_multiquadric" else -1.0)


def oracle(latent, weight, centers, log_widths, kernel):
    """The formula, entry by entry, in Python's float64."""
    groups, rank, num_latents, num_centers = weight.shape
    n = latent.shape[0]
    rows = []
    for r in range(rank):
        row = []
        for j in range(n):
            total = 0.0
            for q, k in itertools.product(range(num_latents), range(num_centers)):
                c, h = float(centers[r, q, k]), math.exp(float(log_widths[r, q, k]))
                psi = phi(float(latent[j, q]) / h - c, kernel) - phi(-c, kernel)
                total += float(weight[j * groups // n, r, q, k]) * psi
            row.append(total)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def random_inputs(n, rank, latents, groups, centers, dtype=torch.float64):
    return (
        torch.randn(n, latents, dtype=dtype),
        torch.randn(groups, rank, latents, centers, dtype=dtype),
        torch.randn(rank, latents, centers, dtype=dtype),
        0.3 * torch.randn(rank, latents, centers, dtype=dtype),
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("n", "rank", "latents", "groups", "centers"),
    [(12, 3, 1, 4, 1), (13, 3, 1, 4, 2), (7, 5, 2, 7, 3), (5, 1, 1, 1, 1), (11, 2, 3, 3, 1), (12, 4, 2, 3, 2)],
)
def test_generated_matrix_equals_float64_loop_over_the_formula(kernel, n, rank, latents, groups, centers):
    inputs = random_inputs(n, rank, latents, groups, centers)
    expected = oracle(*inputs, kernel)
    torch.testing.assert_close(generate(*inputs, kernel), expected, rtol=1e-12, atol=1e-14)
    in_float32 = generate(*(t.float() for t in inputs), kernel)
    torch.testing.assert_close(in_float32.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [8, 9])
def test_gradients_pass_gradcheck(kernel, n):
    inputs = tuple(t.requires_grad_() for t in random_inputs(n, 3, 2, 4, 2))
    assert torch.autograd.gradcheck(lambda *t: generate(*t, kernel), inputs)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_at_a_zero_latent_pass_gradcheck(kernel):
    latent, *rest = random_inputs(8, 3, 2, 4, 2)
    inputs = (torch.zeros_like(latent).requires_grad_(), *(t.requires_grad_() for t in rest))
    assert torch.autograd.gradcheck(lambda *t: generate(*t, kernel), inputs)
    (gradient,) = torch.autograd.grad(generate(*inputs, kernel).sum(), inputs[0])
    assert (gradient != 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_basis_functions_are_exactly_zero_at_zero(kernel):
    centers = torch.linspace(-20, 20, 1001)
    assert torch.equal(anchored_rbf(torch.zeros(1001), centers, kernel), torch.zeros(1001))


@pytest.mark.parametrize("kernel", KERNELS)
def test_basis_functions_are_accurate_near_zero(kernel):
    t = torch.tensor([1e-7, -1e-5, 1e-3])
    centers = torch.tensor([0.7, -1.3, 2.0])
    exact = anchored_rbf(t.double(), centers.double(), kernel)
    torch.testing.assert_close(anchored_rbf(t, centers, kernel).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_basis_functions_and_slopes_are_bounded_and_finite_far_out(kernel):
    t = torch.tensor([0.0, 1.0, -5.0, 1e3, -1e6, 1e18], requires_grad=True)
    for center in (0.0, 0.5, -3.0, 14.0, 1e4):
        value = anchored_rbf(t, torch.tensor(center), kernel)
        (slope,) = torch.autograd.grad(value.sum(), t)
        assert value.isfinite().all()
        assert slope.isfinite().all()
        assert (value.abs() <= 1).all()
        assert (slope.abs() <= 1).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_slope_at_zero_is_the_derivative(kernel):
    centers = torch.linspace(-3, 3, 13, dtype=torch.float64)
    t = torch.zeros(13, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(anchored_rbf(t, centers, kernel).sum(), t)
    torch.testing.assert_close(slope_at_zero(centers, kernel), slope)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", [0.3, 1.0, 4.0])
def test_initial_slopes_have_root_mean_square_one_in_each_group(kernel, width):
    module = RBFGenerator(30, rank=16, num_groups=4, width=width, kernel=kernel)
    latent = torch.zeros(30, 1, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: generate(z, module.weight, module.centers, module.log_widths, kernel), latent
    )
    slopes = jacobian[..., 0].diagonal(dim1=1, dim2=2)  # (R, n)
    torch.testing.assert_close(slopes.square().mean(0).sqrt(), torch.ones(30), rtol=1e-4, atol=1e-4)


def test_initial_slopes_of_several_centers_have_mean_square_one_in_expectation_and_weights_stay_moderate():
    squares, largest = [], 0.0
    for _ in range(200):
        module = RBFGenerator(4, rank=1, num_centers=3)
        slopes = (module.weight * slope_at_zero(module.centers, module.kernel)).sum(3)
        squares.append(slopes.square().mean().item())
        largest = max(largest, module.weight.abs().max().item())
    assert sum(squares) / len(squares) == pytest.approx(1.0, abs=0.3)
    assert largest < 30


@pytest.mark.parametrize("zero_start", ["zero_latent", "zero_weight"])
def test_zero_start_gives_exactly_zero_and_a_gradient_to_leave_it(zero_start):
    module = RBFGenerator(24, rank=5, num_latents=2, num_groups=3, num_centers=2, zero_start=zero_start)
    matrix = module()
    assert torch.equal(matrix, torch.zeros(5, 24))
    (matrix * torch.randn_like(matrix)).sum().backward()
    moved = module.latent if zero_start == "zero_latent" else module.weight
    assert (moved.grad != 0).all()


@pytest.mark.parametrize("groups", [1, 8, 16])
def test_rank_is_that_of_the_groups_near_zero_and_grows_beyond_it_where_the_functions_bend(groups):
    module = RBFGenerator(576, rank=64, num_groups=groups)
    with torch.no_grad():
        near_zero = effective_rank(generate_at(module, 0.01), torch.eye(64))
        bent = effective_rank(generate_at(module, 1.0), torch.eye(64))
    assert near_zero == pytest.approx(groups, rel=0.1)
    assert bent > 2 * groups


def generate_at(module, scale):
    """The module's matrix for a random latent of a given size."""
    latent = scale * torch.randn_like(module.latent)
    return generate(latent, module.weight, module.centers, module.log_widths, module.kernel)


def test_one_group_of_one_shared_shape_collapses_to_rank_one():
    module = RBFGenerator(64, rank=8)
    with torch.no_grad():
        module.latent.normal_()
        module.centers.fill_(1.0)
    assert effective_rank(module(), torch.eye(8)) == pytest.approx(1.0, abs=1e-3)


def test_entries_of_groups_are_consecutive_and_differ_in_number_by_at_most_one():
    weight = torch.arange(4.0).view(4, 1, 1, 1)
    row = generate(torch.ones(10, 1), weight, torch.ones(1, 1, 1), torch.zeros(1, 1, 1), "gaussian")[0]
    groups = (row / row[-1] * 3).round().int().tolist()
    assert groups == sorted(groups)
    sizes = [groups.count(g) for g in range(4)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == 10


def test_more_groups_than_entries_is_an_error():
    with pytest.raises(ValueError, match=r"`num_groups` is 9, but the latent has only 8 entries"):
        RBFGenerator(8, rank=2, num_groups=9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_keep_every_bit_when_the_module_is_cast_down(dtype):
    module = RBFGenerator(24, rank=4)
    before = {name: p.clone() for name, p in module.named_parameters()}
    torch.nn.Sequential(module).to(dtype)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


def test_cast_to_float64_is_obeyed():
    assert RBFGenerator(24, rank=4).double()().dtype == torch.float64


def test_parameters_are_float32_under_a_default_dtype_of_bfloat16():
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = RBFGenerator(24, rank=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_generation_stays_float32_under_autocast():
    module = RBFGenerator(24, rank=4, num_centers=2)
    outside = module()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(), outside)


def test_same_random_generator_gives_the_same_values():
    make = lambda seed: RBFGenerator(24, rank=4, generator=torch.Generator().manual_seed(seed))()  # noqa: E731
    assert torch.equal(make(1), make(1))
    assert not torch.equal(make(1), make(2))
