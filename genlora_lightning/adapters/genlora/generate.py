"""Generate matrices of basis vectors from radial basis functions, one or many at once.

:func:`generate` is the formula, left to autograd: what all else is compared with. :func:`generate_matrices` computes
the same for many generators of one shape, in a number of operators that does not depend on how many they are, with a
backward of its own that keeps nothing but the parameters.

Shapes: L generators, R rank (basis vectors), Q latents (mostly one or two), G groups, K centres per basis function and
latent, n entries of a basis vector (in_features for A, out_features for B).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import override

from genlora_lightning.adapters.autograd import refuse_second_derivative
from genlora_lightning.adapters.genlora.rbf import get_kernel

_PER_GENERATOR = 4  # tensors: latent, weight, centers, log_widths
_MOST_RUNS = 64  # groups of unequal length that are taken one by one, which is many times as fast as by index


def generate(
    latent: Tensor,
    weight: Tensor,
    centers: Tensor,
    log_widths: Tensor,
    kernel: str,
    signs: Tensor | None = None,
) -> Tensor:
    """Generate basis vectors: ``M[r, j] = Σ_q σ[r, q, j] Σ_k w[g(j), r, q, k] · ψ(z[j, q] / h[r, q, k]; c[r, q, k])``.

    Entry j belongs to group ``g(j) = ⌊j·G/n⌋``: G runs of consecutive entries whose lengths differ by at most one.

    Args:
        latent: ``z (n, Q)``.
        weight: ``w (G, R, Q, K)``.
        centers: ``c (R, Q, K)``, in units of the width.
        log_widths: ``log h (R, Q, K)``.
        kernel: Name of the radial basis function.
        signs: ``σ (R, Q, n)``; 1 everywhere if ``None``.

    Returns:
        ``M (R, n)``, in the dtype of the inputs. A column is exactly zero where all its latents are.
    """
    num_entries, num_groups = latent.shape[0], weight.shape[0]
    rank = centers.shape[0]
    # Of one latent the transposed gradient would have strides that DDP warns about, though it is contiguous.
    by_latent = latent.view(1, num_entries) if latent.shape[1] == 1 else latent.T
    t = by_latent.unsqueeze(1) * torch.exp(-log_widths).unsqueeze(-1)  # (R, Q, K, n)
    psi = get_kernel(kernel).anchored(t, centers.unsqueeze(-1))
    psi = (psi if signs is None else psi * signs.unsqueeze(2)).flatten(1, 2)
    by_function = weight.permute(1, 2, 3, 0).flatten(1, 2)  # (R, Q·K, G)
    if num_entries % num_groups == 0:
        grouped = psi.view(rank, psi.shape[1], num_groups, num_entries // num_groups)
        return (grouped * by_function.unsqueeze(-1)).sum(1).view(rank, num_entries)
    return (psi * by_function.index_select(2, _group_of_entry(by_latent, num_groups))).sum(1)


def generate_matrices(
    parameters: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    kernel: str,
    *,
    scale: float = 1.0,
    signs: Tensor | None = None,
    dtype: torch.dtype | None = None,
    when_differentiated: Callable[[], None] | None = None,
) -> tuple[Tensor, ...]:
    """:func:`generate` for generators of one shape, at once.

    Nothing but the parameters is kept for the backward, by reference. A matrix that is not used leaves its generator's
    parameters without a gradient, as if it had not been generated.

    Args:
        parameters: For each generator latent, weight, centres and logarithms of widths, as :func:`generate` takes them.
            Or one tuple of the four stacked, each with the dimension of the generators first: then there is one
            matrix ``(L, R, n)``, and nothing is copied on the way in or out. That dimension is 1 of what all share.
        kernel: Name of the radial basis function.
        scale: A factor on the matrices.
        signs: The same for all of them.
        dtype: Of the matrices, computed in the parameters' dtype and rounded once; that one if ``None``.
        when_differentiated: Called when the gradients of all matrices that were used are there.

    Returns:
        The matrices ``(R, n)``, in that order.

    Raises:
        RuntimeError: In the backward, if it is to be differentiated itself (``create_graph=True``).
    """
    flat = [tensor for one in parameters for tensor in one]
    return cast("tuple[Tensor, ...]", _Generate.apply(kernel, scale, signs, dtype, when_differentiated, *flat))  # type: ignore[no-untyped-call]


class _Generate(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        kernel: str,
        scale: float,
        signs: Tensor | None,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None,
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*flat)
        ctx.set_materialize_grads(False)
        ctx.kernel, ctx.scale, ctx.signs, ctx.when_differentiated = kernel, scale, signs, when_differentiated
        latent, weight, centers, inverse_widths = _stacked(flat, scale)
        value, factor = get_kernel(kernel).factored(latent * inverse_widths, centers)
        matrices = value.mul_(weight if factor is None else weight * factor)
        if signs is not None:
            matrices *= _grouped(signs, latent)
        matrices = matrices.flatten(-2)  # (L, R, Q, K, n)
        matrices = matrices.sum((2, 3)) if matrices.shape[2] * matrices.shape[3] > 1 else matrices[:, :, 0, 0]
        matrices = matrices if dtype is None else matrices.to(dtype)
        return (matrices,) if _are_stacked(flat) else matrices.unbind(0)

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative("The generator of the adapter's matrices")
        if ctx.when_differentiated is not None:
            ctx.when_differentiated()
        needed = ctx.needs_input_grad[5:]
        of_parameters = _of_parameters(ctx.saved_tensors, needed, gradients, ctx.kernel, ctx.scale, ctx.signs)
        return (None, None, None, None, None, *of_parameters)


def pass_gradients_on(
    parameters: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    gradients: Sequence[Tensor],
    kernel: str,
    *,
    scale: float = 1.0,
    signs: Tensor | None = None,
) -> None:
    """Add to the parameters' gradients what those of the matrices make of them, without generating the matrices.

    It is the backward of :func:`generate_matrices`, by autograd and with its hooks.

    Args:
        parameters: As there.
        gradients: Of the matrices ``(R, n)``, in any dtype.
        kernel: As there.
        scale: As there.
        signs: As there.
    """
    flat = [tensor for one in parameters for tensor in one]
    with torch.inference_mode(False), torch.enable_grad():  # a validation may be on, in which a checkpoint is saved
        end = cast("Tensor", _PassOn.apply(kernel, scale, signs, gradients, *flat))  # type: ignore[no-untyped-call]
        end.backward()  # type: ignore[no-untyped-call]


class _PassOn(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, kernel: str, scale: float, signs: Tensor | None, gradients: Sequence[Tensor], *flat: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*flat)
        ctx.kernel, ctx.scale, ctx.signs, ctx.gradients = kernel, scale, signs, gradients
        return flat[0].new_zeros(())  # for autograd to begin at

    @staticmethod
    @override
    def backward(ctx: Any, *_: Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[4:]
        of_parameters = _of_parameters(ctx.saved_tensors, needed, ctx.gradients, ctx.kernel, ctx.scale, ctx.signs)
        return (None, None, None, None, *of_parameters)


def _of_parameters(
    flat: Sequence[Tensor],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
    kernel: str,
    scale: float,
    signs: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of all parameters, from those of the matrices; ``None`` where there is none or none is needed."""
    if _are_stacked(flat):
        (of_stack,) = gradients
        if of_stack is None:
            return [None] * len(flat)
        return [*_gradients(flat, of_stack.to(flat[0].dtype), kernel, scale, signs, needed)]
    used = [(i, gradient) for i, gradient in enumerate(gradients) if gradient is not None]
    result: list[Tensor | None] = [None] * len(flat)
    if used:
        taken = [t for i, _ in used for t in flat[_PER_GENERATOR * i : _PER_GENERATOR * (i + 1)]]
        gradient = torch.stack([one for _, one in used]).to(flat[0].dtype)
        wanted = [any(needed[_PER_GENERATOR * i + kind] for i, _ in used) for kind in range(_PER_GENERATOR)]
        for kind, stacked in enumerate(_gradients(taken, gradient, kernel, scale, signs, wanted)):
            if stacked is None:
                continue
            for (i, _), one in zip(used, stacked.unbind(0), strict=True):
                if needed[_PER_GENERATOR * i + kind]:
                    result[_PER_GENERATOR * i + kind] = one
    return result


def _are_stacked(flat: Sequence[Tensor]) -> bool:
    """Whether the parameters are stacked ones of several generators."""
    return flat[0].dim() == 3  # a generator's latent has two


def _stacked(flat: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, scaled weights, centres and inverse widths of L generators, broadcastable to (L, R, Q, K, G, n/G).

    Where the entries cannot be divided evenly, each is a group of its own, with the weight of the one it belongs to.
    """
    latent, weight, centers, log_widths = (
        flat if _are_stacked(flat) else (torch.stack([*flat[kind::_PER_GENERATOR]]) for kind in range(_PER_GENERATOR))
    )
    (num, num_entries, num_latents), num_groups = latent.shape, weight.shape[1]
    latent = latent.mT.contiguous()  # or all that follows would lie as it does, with steps of Q between entries
    weight = weight.permute(0, 2, 3, 4, 1)  # (L, R, Q, K, G)
    if scale != 1.0:
        weight = scale * weight
    if num_entries % num_groups:
        weight, num_groups = _to_entries(weight, num_entries), num_entries
    latent = latent.view(num, 1, num_latents, 1, num_groups, num_entries // num_groups)
    return latent, weight.unsqueeze(-1), centers[..., None, None], torch.exp(-log_widths)[..., None, None]


def _grouped(signs: Tensor, latent: Tensor) -> Tensor:
    """Signs ``(R, Q, n)`` as (R, Q, 1, G, n/G), like the latents of :func:`_stacked`."""
    return signs.view(*signs.shape[:2], 1, *latent.shape[-2:])


def _gradients(
    flat: Sequence[Tensor],
    gradient: Tensor,
    kernel: str,
    scale: float,
    signs: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of L generators' parameters, stacked, from those of their matrices ``(L, R, n)``, where wanted.

    Of what they share, whose first dimension is 1, it is the sum. Each line is a pass over as many numbers as the
    matrices have, and these passes are what a generator costs.
    """
    latent, weight, centers, inverse_widths = _stacked(flat, scale)
    (num, rank, num_entries), num_groups = gradient.shape, flat[1].shape[-4]
    gradient = gradient.reshape(num, rank, 1, 1, *latent.shape[-2:])
    if signs is not None:
        gradient = gradient * _grouped(signs, latent)
    t = latent * inverse_widths
    rbf = get_kernel(kernel)
    value, factor = rbf.factored(t, centers)
    of_latent = of_weight = of_centers = of_log_widths = None

    def summed(values: Tensor, dims: tuple[int, ...], like: Tensor) -> Tensor:
        return values.sum((0, *dims)).unsqueeze(0) if len(like) < num else values.sum(dims)

    if wanted[1]:
        of_weight = summed(gradient * value, (-1,), weight)  # (L, R, Q, K, G)
        if factor is not None:
            of_weight *= scale * factor.squeeze(-1)
        elif scale != 1.0:
            of_weight *= scale
        if num_entries % num_groups:
            of_weight = _sum_groups(of_weight, num_groups)
        # With the parameters' strides, also in dimensions of size 1: autograd and DDP would copy each one otherwise.
        of_weight = of_weight.permute(0, 4, 1, 2, 3)
        of_weight = of_weight.flatten().view(of_weight.shape)
    if wanted[2]:
        psi = value if factor is None else value * factor
        of_centers = summed(gradient * weight * rbf.slope_by_center(t, centers, psi), (-1, -2), centers)
    if wanted[0] or wanted[3]:
        by_t = weight * inverse_widths if factor is None else weight * factor * inverse_widths
        by_t = rbf.factored_slope(t, centers, value).mul_(gradient).mul_(by_t)
        if wanted[3]:
            of_log_widths = -summed(by_t * latent, (-1, -2), inverse_widths)
        of_latent = by_t.sum((1, 3)).view(num, -1, num_entries).mT
        of_latent = of_latent.flatten().view(of_latent.shape)
    return of_latent if wanted[0] else None, of_weight, of_centers, of_log_widths


def _group_of_entry(like: Tensor, num_groups: int) -> Tensor:
    num_entries = like.shape[-1]
    return torch.arange(num_entries, device=like.device) * num_groups // num_entries


def _lengths(num_entries: int, num_groups: int) -> list[int]:
    """How many entries each group has."""
    first = [-(-group * num_entries // num_groups) for group in range(num_groups + 1)]  # the first j with ⌊j·G/n⌋ = g
    return [end - start for start, end in itertools.pairwise(first)]


def _to_entries(of_groups: Tensor, num_entries: int) -> Tensor:
    """Give each entry what its group has, along the last dimension."""
    num_groups = of_groups.shape[-1]
    if num_groups > _MOST_RUNS:
        return of_groups.index_select(-1, _group_of_entry(of_groups.new_empty(num_entries), num_groups))
    runs = zip(torch.split(of_groups, 1, -1), _lengths(num_entries, num_groups), strict=True)
    return torch.cat([one.expand(*one.shape[:-1], length) for one, length in runs], -1)


def _sum_groups(values: Tensor, num_groups: int) -> Tensor:
    """Sum the runs of entries that :func:`generate` calls groups, along the last dimension, always in one order."""
    num_entries = values.shape[-1]
    if num_groups <= _MOST_RUNS:
        return torch.stack([run.sum(-1) for run in torch.split(values, _lengths(num_entries, num_groups), -1)], -1)
    groups = torch.arange(num_groups + 1, device=values.device)
    first = -(-groups * num_entries // num_groups)  # the first j with ⌊j·G/n⌋ = g
    places = first[:-1, None] + torch.arange(-(-num_entries // num_groups), device=values.device)
    inside = places < first[1:, None]
    taken = values.index_select(-1, places.clamp(max=num_entries - 1).flatten())
    return (taken.view(*values.shape[:-1], *places.shape) * inside).sum(-1)
