"""Define radial basis functions: their values and slopes, and the registry of them.

Shapes: ``t`` and ``centers`` broadcast with each other; results have the broadcast shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from genlora_lightning.adapters.autograd import is_tracing
from genlora_lightning.fields import shown

# exp(c²/2), which the Gaussian's expansion multiplies and divides by, overflows float32 at c = 13.3. A centre this many
# widths from zero contributes a slope of 1e-30 and is of no use to anyone.
_MAX_CENTER = 12.0


class Kernel(ABC):
    """A radial basis function φ(u), anchored at zero: ``ψ(t) = φ(t − c) − φ(−c)``.

    A subclass says :meth:`anchored`. Slopes come from it by autograd unless the subclass gives them as formulas, which
    :func:`register_kernel` compares with autograd.
    """

    @abstractmethod
    def anchored(self, t: Tensor, centers: Tensor) -> Tensor:
        """Compute ``ψ(t) = φ(t − c) − φ(−c)``, element by element.

        It is exactly zero at ``t = 0``. It should be accurate to the last bits for small ``t``, where training starts:
        a formula that does not subtract two nearly equal numbers.

        Args:
            t: Input in units of the width, ``x/h``.
            centers: Centres ``c`` in units of the width.
        """

    def factored(self, t: Tensor, centers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute ψ as a value and a factor that depends on the centre alone; no factor if ``None``."""
        return self.anchored(t, centers), None

    def factored_slope(self, t: Tensor, centers: Tensor, value: Tensor) -> Tensor:
        """Compute the derivative of :meth:`factored`'s value by ``t``, given the value."""
        return _derivative(lambda t: self.factored(t, centers)[0], t.expand_as(value))

    def slope_by_center(self, t: Tensor, centers: Tensor, psi: Tensor) -> Tensor:
        """Compute the derivative of ψ by the centres, given ψ."""
        return _derivative(lambda centers: self.anchored(t, centers), centers.expand_as(psi))

    def slope_at_zero(self, centers: Tensor) -> Tensor:
        """Compute the derivative ``ψ'(0) = φ'(−c)`` of ψ by ``t``, for initialisation."""
        return _derivative(lambda t: self.anchored(t, centers), torch.zeros_like(centers))


class _PlainKernel(Kernel):
    """A kernel that is known by its φ alone."""

    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        self._phi = phi

    @override
    def anchored(self, t: Tensor, centers: Tensor) -> Tensor:
        return self._phi(t - centers) - self._phi(-centers)


class _Gaussian(Kernel):
    """φ(u) = exp(−u²/2)."""

    @override
    def anchored(self, t: Tensor, centers: Tensor) -> Tensor:
        value, factor = self.factored(t, centers)
        assert factor is not None
        return factor * value

    @override
    def factored(self, t: Tensor, centers: Tensor) -> tuple[Tensor, Tensor | None]:
        centers = centers.clamp(-_MAX_CENTER, _MAX_CENTER)
        inner = torch.sub(centers, t, alpha=0.5)
        # A trace is recorded with gradients and checked without them, and must be the same.
        keeps = torch.is_grad_enabled() or is_tracing()
        value = torch.expm1(t * inner) if keeps else inner.mul_(t).expm1_()
        return value, torch.exp(-0.5 * centers.square())

    @override
    def factored_slope(self, t: Tensor, centers: Tensor, value: Tensor) -> Tensor:
        centers = centers.clamp(-_MAX_CENTER, _MAX_CENTER)
        away = centers - t
        return torch.addcmul(away, away, value)

    @override
    def slope_by_center(self, t: Tensor, centers: Tensor, psi: Tensor) -> Tensor:
        inside = centers.abs() <= _MAX_CENTER
        centers = centers.clamp(-_MAX_CENTER, _MAX_CENTER)
        # (t − c)·φ(t − c) + c·φ(−c), where φ(t − c) = ψ + φ(−c)
        return ((t - centers) * psi + t * torch.exp(-0.5 * centers.square())) * inside

    @override
    def slope_at_zero(self, centers: Tensor) -> Tensor:
        return centers * torch.exp(-0.5 * centers.square())


class _InverseQuadratic(Kernel):
    """φ(u) = 1/v with v = 1 + u². v(−c) − v(t − c) = t·(2c − t), and the rest is a difference of fractions."""

    @override
    def anchored(self, t: Tensor, centers: Tensor) -> Tensor:
        at_t, at_zero = 1 + (t - centers).square(), 1 + centers.square()
        return t * (2 * centers - t) / (at_t * at_zero)

    @override
    def factored_slope(self, t: Tensor, centers: Tensor, value: Tensor) -> Tensor:
        away = t - centers
        return -2 * away / (1 + away.square()).square()

    @override
    def slope_by_center(self, t: Tensor, centers: Tensor, psi: Tensor) -> Tensor:
        # With a = 1/v(t − c) and b = 1/v(−c): a − b = ψ
        a, b = 1 / (1 + (t - centers).square()), 1 / (1 + centers.square())
        return 2 * (t * a.square() - centers * psi * (a + b))

    @override
    def slope_at_zero(self, centers: Tensor) -> Tensor:
        return 2 * centers / (1 + centers.square()).square()


class _InverseMultiquadric(Kernel):
    """φ(u) = 1/√v with v = 1 + u²."""

    @override
    def anchored(self, t: Tensor, centers: Tensor) -> Tensor:
        root_t, root_zero = (1 + (t - centers).square()).sqrt(), (1 + centers.square()).sqrt()
        return t * (2 * centers - t) / (root_zero * root_t * (root_zero + root_t))

    @override
    def factored_slope(self, t: Tensor, centers: Tensor, value: Tensor) -> Tensor:
        away = t - centers
        inverse = 1 / (1 + away.square())
        return -away * inverse * inverse.sqrt()

    @override
    def slope_by_center(self, t: Tensor, centers: Tensor, psi: Tensor) -> Tensor:
        # With a = 1/v(t − c) and b = 1/v(−c): √a − √b = ψ
        a, b = 1 / (1 + (t - centers).square()), 1 / (1 + centers.square())
        root_a, root_b = a.sqrt(), b.sqrt()
        return t * a * root_a - centers * psi * (a + root_a * root_b + b)

    @override
    def slope_at_zero(self, centers: Tensor) -> Tensor:
        return centers / (1 + centers.square()) ** 1.5


_KERNELS: dict[str, Kernel] = {
    "gaussian": _Gaussian(),
    "inverse_multiquadric": _InverseMultiquadric(),
    "inverse_quadratic": _InverseQuadratic(),
}


def kernel_names() -> tuple[str, ...]:
    """List the names under which radial basis functions are registered."""
    return tuple(_KERNELS)


def get_kernel(name: str) -> Kernel:
    """Look up a radial basis function.

    Raises:
        ValueError: There is none of this name.
    """
    found = _KERNELS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"`kernel` must be one of {', '.join(map(repr, _KERNELS))}, got {shown(name)}. One of your own is "
            "registered with `register_kernel` before a configuration or a file names it."
        )
    return found


def register_kernel(name: str, kernel: Kernel | Callable[[Tensor], Tensor]) -> None:
    """Register a radial basis function under a name that ``GenLoRAConfig(kernel=…)`` then takes.

    ::

        register_kernel("quartic", lambda u: (1 + u.square()) ** -2)

    It has to be done in each process that trains with it or loads its files: these hold the name alone.

    Args:
        name: A name that is not taken.
        kernel: φ(u), element by element, or a :class:`Kernel`.

    Raises:
        ValueError: The name is taken, or ψ is not zero at zero, not finite or not element by element, or a slope that
            the kernel gives is not what autograd makes of its value.
    """
    if name in _KERNELS:
        raise ValueError(f"A kernel {name!r} is registered already; the names are {', '.join(_KERNELS)}.")
    made = kernel if isinstance(kernel, Kernel) else _PlainKernel(kernel)
    check_kernel(name, made)
    _KERNELS[name] = made


def check_kernel(name: str, kernel: Kernel) -> None:
    """Check a radial basis function against autograd, in float64, near zero and away from it.

    Raises:
        ValueError: As :func:`register_kernel`.
    """
    t = torch.tensor([0.0, 1e-6, -1e-6, 0.01, 0.3, -0.7, 1.4, -2.5, 4.0], dtype=torch.float64)[:, None]
    centers = torch.tensor([0.5, -0.5, 1.1, -1.6, 2.0, 3.5], dtype=torch.float64)
    psi = kernel.anchored(t, centers)
    is_alone = psi.shape == (len(t), len(centers)) and torch.equal(kernel.anchored(t[4], centers[2]), psi[4, 2][None])
    if not is_alone or not psi.isfinite().all() or psi[0].any():
        raise ValueError(
            f"The kernel {name!r} must be a finite function of each element alone, and ψ(0) = φ(−c) − φ(−c) zero."
        )
    value, factor = kernel.factored(t, centers)
    scale = torch.ones_like(psi) if factor is None else factor
    by_t = Kernel.factored_slope(kernel, t, centers, value)
    for method, given, expected in (
        ("factored", value * scale, psi),
        ("factored_slope", kernel.factored_slope(t, centers, value), by_t),
        ("slope_by_center", kernel.slope_by_center(t, centers, psi), Kernel.slope_by_center(kernel, t, centers, psi)),
        ("slope_at_zero", kernel.slope_at_zero(centers).expand_as(psi), (by_t * scale)[:1].expand_as(psi)),
    ):
        wrong = ~torch.isclose(given, expected, rtol=1e-7, atol=1e-9)
        if wrong.any():
            i, j = (int(n) for n in wrong.nonzero()[0])
            raise ValueError(
                f"`{method}` of the kernel {name!r} gives {given[i, j]:.6g} at t = {t[i, 0]:g}, c = {centers[j]:g}, "
                f"where its value gives {expected[i, j]:.6g}. Mend the formula, or leave the method out: autograd is "
                "used then."
            )


def _derivative(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The derivative of a function that is computed element by element."""
    with torch.inference_mode(False), torch.enable_grad():
        at = at.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(at).sum(), at)
    return slope
