from __future__ import annotations

import itertools
import math

import pytest
import torch

from genlora_lightning.adapters.genlora.generate import generate, generate_matrices, pass_gradients_on
from genlora_lightning.adapters.genlora.rbf import kernel_names

KERNELS = kernel_names()
# entries, rank, latents, groups, centres: with groups of one size and not
SIZES = [(12, 3, 1, 4, 1), (13, 3, 1, 4, 2), (7, 5, 2, 7, 3), (5, 1, 1, 1, 1), (11, 2, 3, 3, 1), (12, 4, 2, 3, 2)]


def phi(u: float, kernel: str) -> float:
    if kernel == "gaussian":
        return math.exp(-(u**2) / 2)
    return (1 + u**2) ** (-0.5 if kernel == "inverse_multiquadric" else -1.0)


def oracle(latent, weight, centers, log_widths, kernel, signs):
    """The formula, entry by entry, in Python's float64."""
    groups, rank, num_latents, num_centers = weight.shape
    n = latent.shape[0]
    rows = []
    for r in range(rank):
        row = []
        for j in range(n):
            total = 0.0
            for q, k in itertools.product(range(num_latents), range(num_centers)):
                sign = 1 if signs is None else int(signs[r, q, j])
                c, h = float(centers[r, q, k]), math.exp(float(log_widths[r, q, k]))
                psi = phi(float(latent[j, q]) / h - c, kernel) - phi(-c, kernel)
                total += sign * float(weight[j * groups // n, r, q, k]) * psi
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


def random_signs(rank, latents, n):
    return torch.randint(0, 2, (rank, latents, n), dtype=torch.int8) * 2 - 1


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n", "rank", "latents", "groups", "centers"), SIZES)
def test_generated_matrix_equals_float64_loop_over_the_formula(kernel, n, rank, latents, groups, centers, signed):
    inputs = random_inputs(n, rank, latents, groups, centers)
    signs = random_signs(rank, latents, n) if signed else None
    expected = oracle(*inputs, kernel, signs)
    torch.testing.assert_close(generate(*inputs, kernel, signs), expected, rtol=1e-12, atol=1e-14)
    in_float32 = generate(*(t.float() for t in inputs), kernel, signs)
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


def test_entries_of_groups_are_consecutive_and_differ_in_number_by_at_most_one():
    weight = torch.arange(4.0).view(4, 1, 1, 1)
    row = generate(torch.ones(10, 1), weight, torch.ones(1, 1, 1), torch.zeros(1, 1, 1), "gaussian")[0]
    groups = (row / row[-1] * 3).round().int().tolist()
    assert groups == sorted(groups)
    sizes = [groups.count(g) for g in range(4)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == 10


def leaves(num, *sizes, dtype=torch.float64):
    return [tuple(t.requires_grad_() for t in random_inputs(*sizes, dtype=dtype)) for _ in range(num)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", SIZES)
def test_many_matrices_and_their_gradients_equal_those_of_the_formula(kernel, sizes):
    several = leaves(3, *sizes)
    signs = random_signs(sizes[1], sizes[2], sizes[0])
    matrices = generate_matrices(several, kernel, scale=1.7, signs=signs)
    expected = [1.7 * generate(*one, kernel, signs) for one in several]
    weights = [torch.randn_like(matrix) for matrix in matrices]
    flat = [t for one in several for t in one]
    for matrix, one in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix, one, rtol=1e-13, atol=1e-14)
    ours = torch.autograd.grad(sum((m * w).sum() for m, w in zip(matrices, weights, strict=True)), flat)
    theirs = torch.autograd.grad(sum((m * w).sum() for m, w in zip(expected, weights, strict=True)), flat)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("groups", [5, 64, 65, 100])
def test_groups_of_unequal_lengths_are_those_of_the_formula_however_many_they_are(groups):
    (one,) = leaves(1, 101, 2, 2, groups, 1)
    matrix, expected = generate_matrices([one], "gaussian")[0], generate(*one, "gaussian")
    torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-14)
    weights = torch.randn_like(matrix)
    found, wanted = (torch.autograd.grad((m * weights).sum(), one) for m in (matrix, expected))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sizes", SIZES)
def test_own_backward_passes_gradcheck(kernel, sizes):
    first, second = leaves(2, *sizes)
    signs = random_signs(sizes[1], sizes[2], sizes[0])
    function = lambda *t: generate_matrices([t[:4], t[4:]], kernel, scale=0.6, signs=signs)  # noqa: E731
    assert torch.autograd.gradcheck(function, (*first, *second))


@pytest.mark.parametrize("kernel", KERNELS)
def test_own_backward_at_a_zero_latent_passes_gradcheck(kernel):
    latent, *rest = leaves(1, 8, 3, 2, 4, 2)[0]
    inputs = (torch.zeros_like(latent).requires_grad_(), *rest)
    assert torch.autograd.gradcheck(lambda *t: generate_matrices([t], kernel), inputs)


def of_one_entry(t, center, kernel):
    """Gradients of a basis function by its latent and its centre, of the own backward."""
    latent, weight, centers, log_widths = (
        value.to(t.dtype).requires_grad_() for value in (t.view(1, 1), torch.ones(1, 1, 1, 1), center, torch.zeros(1))
    )
    shaped = latent, weight, centers.view(1, 1, 1), log_widths.view(1, 1, 1)
    return torch.autograd.grad(generate_matrices([shaped], kernel)[0].sum(), (latent, centers))


@pytest.mark.parametrize("kernel", KERNELS)
def test_slopes_are_accurate_near_zero_and_bounded_far_out(kernel):
    for t, center in itertools.product((1e-7, -1e-5, 1e-3), (0.7, -1.3, 2.0)):
        exact = of_one_entry(torch.tensor(t).double(), torch.tensor(center).double(), kernel)
        for one, other in zip(of_one_entry(torch.tensor(t), torch.tensor(center), kernel), exact, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=0, check_dtype=False)
    for t, center in itertools.product((0.0, 1.0, -5.0, 1e3, -1e6, 1e18), (0.0, 0.5, -3.0, 14.0, 1e4)):
        by_t, by_center = of_one_entry(torch.tensor(t), torch.tensor(center), kernel)
        assert by_t.abs().max() <= 1
        assert by_center.abs().max() <= 1.5


@pytest.mark.parametrize("kernel", KERNELS)
def test_own_backward_in_float32_equals_autograd_in_float64(kernel):
    inputs = leaves(1, 48, 6, 2, 4, 2, dtype=torch.float32)[0]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    weights = torch.randn(6, 48)
    ours = torch.autograd.grad((generate_matrices([inputs], kernel)[0] * weights).sum(), inputs)
    theirs = torch.autograd.grad((generate(*exact, kernel) * weights).sum(), exact)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_that_are_passed_on_equal_those_of_the_backward_and_are_added(sizes):
    several = leaves(3, *sizes)
    flat = [t for one in several for t in one]
    gradients = [torch.randn(sizes[1], sizes[0], dtype=torch.float64) for _ in several]
    signs = random_signs(sizes[1], sizes[2], sizes[0])
    expected = torch.autograd.grad(generate_matrices(several, "gaussian", scale=1.7, signs=signs), flat, gradients)
    for times in (1, 2):
        with torch.no_grad():
            pass_gradients_on(several, gradients, "gaussian", scale=1.7, signs=signs)
        for parameter, one in zip(flat, expected, strict=True):
            torch.testing.assert_close(parameter.grad, times * one, rtol=1e-13, atol=0)


def test_gradients_of_fixed_parameters_are_not_passed_on_and_those_in_bfloat16_are_widened():
    latent, weight, centers, log_widths = leaves(1, 12, 3, 1, 4, 1, dtype=torch.float32)[0]
    gradient = torch.randn(3, 12).bfloat16()
    pass_gradients_on([(latent, weight, centers.detach(), log_widths)], [gradient], "gaussian")
    (expected,) = torch.autograd.grad(
        generate_matrices([(latent, weight, centers, log_widths)], "gaussian"), [latent], [gradient.float()]
    )
    assert torch.equal(latent.grad, expected)
    assert centers.grad is None


def test_nothing_but_the_parameters_is_kept_for_the_backward():
    several = leaves(2, 12, 3, 2, 4, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        generate_matrices(several, "gaussian", scale=2.0, dtype=torch.bfloat16)
    assert sorted(kept) == sorted(t.data_ptr() for one in several for t in one)


def test_matrices_that_are_not_used_leave_their_parameters_without_a_gradient():
    used, unused = leaves(2, 12, 3, 1, 4, 1)
    generate_matrices([used, unused], "gaussian")[0].sum().backward()
    assert all(t.grad is not None for t in used)
    assert all(t.grad is None for t in unused)


@pytest.mark.parametrize("sizes", [*SIZES, (8, 3, 1, 1, 1)])
def test_gradients_are_laid_out_as_the_parameters_so_that_nobody_copies_them(sizes):
    # DDP warns of others, also where they differ in nothing but the stride of a dimension of size 1.
    several = [tuple(t.detach().clone().contiguous().requires_grad_() for t in one) for one in leaves(2, *sizes)]
    sum(matrix.sum() for matrix in generate_matrices(several, "gaussian")).backward()
    for one in several:
        for parameter in one:
            assert parameter.grad.stride() == torch.empty(parameter.shape).stride()


def test_parameters_that_are_fixed_get_no_gradient():
    latent, weight, centers, log_widths = leaves(1, 12, 3, 1, 4, 1)[0]
    generate_matrices([(latent, weight, centers.detach(), log_widths.detach())], "gaussian")[0].sum().backward()
    assert latent.grad is not None
    assert weight.grad is not None
    assert centers.grad is None


def test_arithmetic_is_in_the_parameters_dtype_and_the_result_is_rounded_once():
    one = random_inputs(12, 3, 1, 4, 1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (matrix,) = generate_matrices([one], "gaussian", dtype=torch.bfloat16)
    assert torch.equal(matrix, generate(*one, "gaussian").bfloat16())


def test_second_derivative_is_an_error_that_names_the_way_out():
    one = leaves(1, 12, 3, 1, 4, 1)[0]
    (matrix,) = generate_matrices([one], "gaussian")
    with pytest.raises(RuntimeError, match=r"generator .* cannot be differentiated again .*set_fused\(model, False\)"):
        torch.autograd.grad(matrix.sum(), one, create_graph=True)


def test_call_back_comes_when_the_gradients_of_all_matrices_are_there():
    calls = []
    matrices = generate_matrices(leaves(2, 12, 3, 1, 4, 1), "gaussian", when_differentiated=lambda: calls.append(1))
    assert not calls
    sum(matrix.sum() for matrix in matrices).backward()
    assert calls == [1]
