"""Compute anchored radial basis functions and their slopes, accurate to the last bits near zero."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["gaussian", "inverse_multiquadric", "inverse_quadratic"]

# exp(c²/2), which the Gaussian's expansion multiplies and divides by, overflows float32 at c = 13.3. A centre this many
# widths from zero contributes a slope of 1e-30 and is of no use to anyone.
_MAX_CENTER = 12.0


def anchored_rbf(t: Tensor, centers: Tensor, kernel: Kernel) -> Tensor:
    """Radial basis function that is exactly zero at zero: ``ψ(t) = φ(t − c) − φ(−c)``.

    It is computed without the subtraction of two nearly equal numbers, so that it is accurate to the last bits for the
    small ``t`` at the start of training, and zero to the last bit at ``t = 0``.

    Args:
        t: Input in units of the width, ``x/h``; any shape.
        centers: Centres ``c`` in units of the width; broadcastable with ``t``.
        kernel: Name of φ; see :class:`~genlora_lightning.GenLoRAConfig`.

    Returns:
        ψ, in the broadcast shape. |ψ| < 1, and so is its derivative for every kernel.
    """
    value, factor = factored_rbf(t, centers, kernel)
    return value if factor is None else factor * value


def factored_rbf(t: Tensor, centers: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
    """ψ; of the Gaussian what is left of it without its factor ``exp(−c²/2)``, which depends on the centre alone."""
    if kernel == "gaussian":
        centers = centers.clamp(-_MAX_CENTER, _MAX_CENTER)
        inner = torch.sub(centers, t, alpha=0.5)
        value = torch.expm1(t * inner) if torch.is_grad_enabled() else inner.mul_(t).expm1_()
        return value, torch.exp(-0.5 * centers.square())
    # φ(u) = v^-½ or v^-1 with v = 1 + u²; v(−c) − v(t − c) = t·(2c − t), and the rest is the difference of fractions.
    at_zero = 1 + centers.square()
    at_t = 1 + (t - centers).square()
    difference = t * (2 * centers - t)
    if kernel == "inverse_quadratic":
        return difference / (at_t * at_zero), None
    if kernel == "inverse_multiquadric":
        root_zero, root_t = at_zero.sqrt(), at_t.sqrt()
        return difference / (root_zero * root_t * (root_zero + root_t)), None
    raise ValueError(f"Unknown kernel {kernel!r}.")


def factored_slope(t: Tensor, centers: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
    """Derivative of :func:`factored_rbf` by ``t``, given its value; as accurate for small ``t`` as that is."""
    if kernel == "gaussian":
        centers = centers.clamp(-_MAX_CENTER, _MAX_CENTER)
        away = centers - t
        return torch.addcmul(away, away, value)
    # With v = 1 + u² at u = t − c: φ' = −2u/v² or −u/v^(3/2)
    away = t - centers
    inverse = 1 / (1 + away.square())
    return -2 * away * inverse.square() if kernel == "inverse_quadratic" else -away * inverse * inverse.sqrt()


def slope_by_center(t: Tensor, centers: Tensor, psi: Tensor, kernel: Kernel) -> Tensor:
    """Derivative of :func:`anchored_rbf` by the centres, given its value; as accurate for small ``t`` as that is."""
    if kernel == "gaussian":
        inside = centers.abs() <= _MAX_CENTER
        centers = centers.clamp(-_MAX_CENTER, _MAX_CENTER)
        # (t − c)·φ(t − c) + c·φ(−c), where φ(t − c) = ψ + φ(−c)
        return ((t - centers) * psi + t * torch.exp(-0.5 * centers.square())) * inside
    # With a = 1/v(t − c) and b = 1/v(−c): a − b = ψ, a^½ − b^½ = ψ, and the other powers' differences follow.
    a, b = 1 / (1 + (t - centers).square()), 1 / (1 + centers.square())
    if kernel == "inverse_quadratic":
        return 2 * (t * a.square() - centers * psi * (a + b))
    root_a, root_b = a.sqrt(), b.sqrt()
    return t * a * root_a - centers * psi * (a + root_a * root_b + b)


def slope_at_zero(centers: Tensor, kernel: Kernel) -> Tensor:
    """Derivative ``ψ'(0) = φ'(−c)`` of :func:`anchored_rbf` by ``t``, for initialisation."""
    if kernel == "gaussian":
        return centers * torch.exp(-0.5 * centers.square())
    power = 1.5 if kernel == "inverse_multiquadric" else 2.0
    factor = 1.0 if kernel == "inverse_multiquadric" else 2.0
    return factor * centers / (1 + centers.square()) ** power
