from __future__ import annotations

import pytest
import torch

from genlora_lightning.adapters.genlora.generate import generate
from genlora_lightning.adapters.genlora.generator import RBFGenerator
from genlora_lightning.adapters.genlora.rbf import get_kernel, kernel_names
from genlora_lightning.adapters.low_rank import effective_rank

KERNELS = kernel_names()


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
        slopes = (module.weight * get_kernel(module.kernel).slope_at_zero(module.centers)).sum(3)
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
