"""Compute a frozen linear with a low-rank update that leaves the weight's zeros alone, and form nothing for long.

::

    D = s · Bᵀ A where W ≠ 0, else 0                                kept: x, A, B; W by reference; D is formed twice
    y = x (W + D)ᵀ + b          in 32 bits or more: one product
      = x Wᵀ + b + x Dᵀ         in 16 bits: W + D would lose a small D to rounding
    gradients: x ← g·(W + D);  G = gᵀ·x where W ≠ 0, else 0;  A ← s·B·G;  B ← s·A·Gᵀ

Shapes: R rank, I in_features, O out_features, T tokens; ``...`` any leading dimensions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.autograd import refuse_second_derivative


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``y = x (W + s · Bᵀ A ⊙ (W ≠ 0))ᵀ + b``.

    Args:
        x: ``(..., I)``.
        weight: The frozen ``W (O, I)``; it gets no gradient.
        bias: The frozen ``b (O,)``.
        A: ``(R, I)``, in ``dtype``.
        B: ``(R, O)``: transposed, as it is generated; in ``dtype``.
        scaling: s.
        transposed: The weight is stored as ``(I, O)``.
        dtype: In which products are computed.

    Returns:
        ``(..., O)``, in ``dtype``.

    Raises:
        RuntimeError: In the backward, if it is to be differentiated itself (``create_graph=True``).
    """
    return cast("Tensor", _MaskedLinear.apply(x, weight, bias, A, B, scaling, transposed, dtype))  # type: ignore[no-untyped-call]


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        first, *others = _summands(weight, A, B, scaling, transposed, dtype)
        output = F.linear(rows, first, None if bias is None else bias.to(dtype))
        for other in others:
            output.addmm_(rows, other.T)
        ctx.save_for_backward(x, weight, A, B)
        ctx.scaling, ctx.transposed, ctx.dtype = scaling, transposed, dtype
        # No view, as F.linear gives none: autograd forbids writing to one in place, and FSDP2 warns of it.
        return cast("Tensor", torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]]))

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative("The linear with masked updates")
        x, weight, A, B = ctx.saved_tensors
        of_x = of_A = of_B = None
        # The backward may be called inside of autocast, which must not have a say in it.
        with torch.autocast(weight.device.type if weight.device.type != "meta" else "cpu", enabled=False):
            g = gradient.reshape(-1, gradient.shape[-1])
            if ctx.needs_input_grad[0]:
                first, *others = _summands(weight, A, B, ctx.scaling, ctx.transposed, ctx.dtype)
                of_x = g @ first
                for other in others:
                    of_x.addmm_(g, other)
                of_x = of_x.to(x.dtype).view(x.shape)
            if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
                of_delta = g.T @ x.reshape(-1, x.shape[-1]).to(ctx.dtype)
                of_delta.masked_fill_((weight.T if ctx.transposed else weight) == 0, 0)
                of_A = torch.addmm(A, B, of_delta, beta=0, alpha=ctx.scaling)
                of_B = torch.addmm(B, A, of_delta.T, beta=0, alpha=ctx.scaling)
        return of_x, None, None, of_A, of_B, None, None, None


def _summands(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, transposed: bool, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Matrices ``(O, I)`` whose sum is the weight with its update: it alone, or both where a sum would be rounded."""
    W = weight.T if transposed else weight
    if dtype.itemsize >= 4:
        W = W.to(dtype)
        return (torch.where(W != 0, torch.addmm(W, B.T, A, alpha=scaling), W),)
    delta = torch.addmm(A.new_zeros(()), B.T, A, beta=0, alpha=scaling)
    return W.to(dtype), delta.masked_fill_(W == 0, 0)
