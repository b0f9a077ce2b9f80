from __future__ import annotations

import pytest
import torch
from torch import nn

from genlora_lightning import GenLoRAConfig, inject_adapters
from genlora_lightning.adapters.genlora import rbf
from genlora_lightning.adapters.genlora.rbf import Kernel, check_kernel, get_kernel, kernel_names, register_kernel
from genlora_lightning.injection.inject import adapter_parameters
from genlora_lightning.layers.sharing import set_fused
from tests.conftest import perturb, small_config

KERNELS = kernel_names()


@pytest.mark.parametrize("kernel", KERNELS)
def test_basis_functions_are_exactly_zero_at_zero(kernel):
    centers = torch.linspace(-20, 20, 1001)
    assert torch.equal(get_kernel(kernel).anchored(torch.zeros(1001), centers), torch.zeros(1001))


@pytest.mark.parametrize("kernel", KERNELS)
def test_basis_functions_are_accurate_near_zero(kernel):
    t = torch.tensor([1e-7, -1e-5, 1e-3])
    centers = torch.tensor([0.7, -1.3, 2.0])
    exact = get_kernel(kernel).anchored(t.double(), centers.double())
    torch.testing.assert_close(get_kernel(kernel).anchored(t, centers).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_basis_functions_and_slopes_are_bounded_and_finite_far_out(kernel):
    t = torch.tensor([0.0, 1.0, -5.0, 1e3, -1e6, 1e18], requires_grad=True)
    for center in (0.0, 0.5, -3.0, 14.0, 1e4):
        value = get_kernel(kernel).anchored(t, torch.tensor(center))
        (slope,) = torch.autograd.grad(value.sum(), t)
        assert value.isfinite().all()
        assert slope.isfinite().all()
        assert (value.abs() <= 1).all()
        assert (slope.abs() <= 1).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_slope_at_zero_is_the_derivative(kernel):
    centers = torch.linspace(-3, 3, 13, dtype=torch.float64)
    t = torch.zeros(13, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(get_kernel(kernel).anchored(t, centers).sum(), t)
    torch.testing.assert_close(get_kernel(kernel).slope_at_zero(centers), slope)


@pytest.mark.parametrize("kernel", KERNELS)
def test_formulas_of_what_the_library_brings_are_those_of_autograd(kernel):
    check_kernel(kernel, get_kernel(kernel))


# -- kernels of one's own ---------------------------------------------------------------------------------------------


def quartic(u: torch.Tensor) -> torch.Tensor:
    return (1 + u.square()) ** -2


class Quartic(Kernel):
    def anchored(self, t, centers):
        return quartic(t - centers) - quartic(-centers)


@pytest.fixture
def _own(monkeypatch):
    monkeypatch.setattr(rbf, "_KERNELS", dict(rbf._KERNELS))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(torch.linspace(-1, 1, 24).view(3, 8)).square().sum().backward()
    return {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("kernel", [quartic, Quartic()])
@pytest.mark.usefixtures("_own")
def test_kernel_that_is_known_by_its_value_trains_with_the_gradients_of_autograd(kernel):
    register_kernel("quartic", kernel)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    x = torch.ones(1, 8)
    before = model(x)
    inject_adapters(model, small_config(kernel="quartic", num_centers=2))
    assert torch.equal(model(x), before)
    perturb(model)
    ours = gradients(model)
    set_fused(model, False)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=name)
    assert len(ours) > 12


@pytest.mark.parametrize("method", ["factored_slope", "slope_by_center", "slope_at_zero"])
@pytest.mark.usefixtures("_own")
def test_slope_that_belongs_to_another_value_is_refused(method):
    gaussian = get_kernel("gaussian")
    wrong = type("Wrong", (Quartic,), {method: lambda self, *args: getattr(gaussian, method)(*args)})()
    with pytest.raises(ValueError, match=rf"`{method}` of the kernel 'wrong' gives .* where its value gives"):
        register_kernel("wrong", wrong)
    assert "wrong" not in kernel_names()


@pytest.mark.parametrize(
    "phi",
    [
        lambda u: u.sum().expand_as(u),
        lambda u: u / u.abs().max(),
        lambda u: 1 / u.new_zeros(()).expand_as(u),
        lambda u: torch.rand_like(u),
        lambda u: u.sum(),
    ],
)
@pytest.mark.usefixtures("_own")
def test_value_that_is_no_finite_function_of_one_number_is_refused(phi):
    with pytest.raises(ValueError, match=r"'wrong' must be a finite function of each element alone"):
        register_kernel("wrong", phi)


@pytest.mark.usefixtures("_own")
def test_names_are_taken_once_and_looked_up_before_anything_is_made():
    with pytest.raises(ValueError, match=r"'gaussian' is registered already"):
        register_kernel("gaussian", quartic)
    with pytest.raises(ValueError, match=r"got 'quartic'. One of your own is registered with `register_kernel`"):
        GenLoRAConfig(kernel="quartic")
    register_kernel("quartic", quartic)
    assert GenLoRAConfig(kernel="quartic").to_dict()["kernel"] == "quartic"
