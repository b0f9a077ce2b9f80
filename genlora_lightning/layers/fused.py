"""Compute a frozen linear and its low-rank update as one function, whose backward keeps little.

::

    x ──┬── W, b ───────────────── y ◄─┐ added in place        forward: 3 matrix products
        └── A ── h (R per token) ─ s·B ┘                       kept: x, A, B; W by reference; h if I > O
    gradients: x ← g·W + s·(g·B)·A;  A ← s·(g·B)ᵀ·x;  B ← s·hᵀ·g: 5 matrix products, none for W; a 6th for h if not kept

To compute h again takes I products per number, and to keep it one number: the linears that narrow keep theirs. Where A
and B are parameters, nothing else is kept for the update, and all keep their h.

Shapes: R rank, I in_features, O out_features, T tokens; ``...`` any leading dimensions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.autograd import is_ordinary, refuse_second_derivative


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    transposed: bool = False,
    keep_h: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``y = x Wᵀ + b + s · (dropout(x) Aᵀ) B``.

    Args:
        x: ``(..., I)``.
        weight: The frozen ``W (O, I)``; it gets no gradient.
        bias: The frozen ``b (O,)``.
        A: ``(R, I)``, in :func:`compute_dtype`.
        B: ``(R, O)``: transposed, as it is generated; in :func:`compute_dtype`.
        scaling: s.
        dropout: Probability of dropping an entry of the update's input; a mask of one byte per entry is kept then.
        transposed: The weight is stored as ``(I, O)``.
        keep_h: Keep ``h = x Aᵀ`` for the backward also where computing it again is cheap.
        dtype: What :func:`compute_dtype` gives, if it is known.

    Returns:
        ``(..., O)``, in the dtype that ``F.linear`` gives.

    Raises:
        RuntimeError: In the backward, if it is to be differentiated itself (``create_graph=True``).
    """
    dtype = dtype or compute_dtype(weight)
    if not torch.is_grad_enabled() and not dropout and x.dtype == weight.dtype == dtype:
        # Nothing to cast, keep or drop. With one token at a time each call that is saved counts.
        output = F.linear(x, weight.T if transposed else weight, bias)
        flat, h = output.view(-1, B.shape[1]), F.linear(x, A).view(-1, B.shape[0])
        flat.addmm_(h, B, alpha=scaling)
        return output
    options = scaling, dropout, transposed, keep_h, dtype
    return cast("Tensor", _AdaptedLinear.apply(x, weight, bias, A, B, *options))  # type: ignore[no-untyped-call]


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` computes with a weight: autocast's inside of autocast, else the weight's own."""
    device = weight.device.type
    if weight.dtype != torch.float64 and _autocast_is_on(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def fusable(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear that computes ``x Wᵀ + b`` from ordinary ones of its own, frozen, and nothing else.

    ``None`` for a quantized or wrapped linear, a sharded weight, or one with hooks: these are called.
    """
    own: Any = base._parameters  # a module's own lookup is slow; FSDP1 puts views beside the parameters, not among them
    weight: Any = own.get("weight")
    bias: Any = own.get("bias")
    if weight is None or (bias is None and "bias" not in own):
        weight, bias = base.weight, base.bias
    if not (is_ordinary(weight) and is_ordinary(x) and (bias is None or is_ordinary(bias))):
        return None
    if _hooks(base) or "forward" in base.__dict__ or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad) or not x.is_floating_point():
        return None
    return (weight, bias) if x.dtype == weight.dtype or _autocast_is_on(weight.device.type) else None


def _autocast_is_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def _hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _AdaptedLinear(torch.autograd.Function):
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
        dropout: float,
        transposed: bool,
        keep_h: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        # What autocast would do to them, done here, so that the backward can do the same again and nothing is kept.
        rows, W = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        output = F.linear(rows, W.T if transposed else W, b)
        mask = None
        if dropout:
            rows, mask = torch.native_dropout(rows, dropout, True)
        h = rows @ A.T
        output.addmm_(h, B, alpha=scaling)
        # To compute it again takes time with the inputs' number, to keep it is cheap beside an x of many inputs.
        keeps = (keep_h or A.shape[1] > B.shape[1]) and ctx.needs_input_grad[4]
        ctx.save_for_backward(x, weight, A, B, mask, h if keeps else None)
        ctx.scaling, ctx.dropout, ctx.transposed, ctx.dtype = scaling, dropout, transposed, dtype
        # No view, as F.linear gives none: autograd forbids writing to one in place, and FSDP2 warns of it.
        return cast("Tensor", torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]]))

    @staticmethod
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative("The adapted linear")
        x, weight, A, B, mask, h = ctx.saved_tensors
        # The backward may be called inside of autocast, which must not have a say in it.
        with torch.autocast(weight.device.type if weight.device.type != "meta" else "cpu", enabled=False):
            return (*_gradients(ctx, gradient, x, weight, A, B, mask, h), *[None] * 5)


def _gradients(
    ctx: Any,
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    mask: Tensor | None,
    h: Tensor | None,
) -> tuple[Tensor | None, ...]:
    of_x = of_A = of_B = None
    kept = 1 / (1 - ctx.dropout)
    g = gradient.reshape(-1, gradient.shape[-1])
    of_h, s = g @ B.T, ctx.scaling  # (T, R), without the scaling: products with it cost no more than products
    if ctx.needs_input_grad[0]:
        W = weight.to(ctx.dtype)
        of_x = g @ (W.T if ctx.transposed else W)
        if mask is None:
            of_x.addmm_(of_h, A, alpha=s)
        else:
            of_x += torch.ops.aten.native_dropout_backward(of_h @ A, mask, s * kept)
        of_x = of_x.to(x.dtype).view(x.shape)
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        rows = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
        if mask is not None:
            rows = torch.ops.aten.native_dropout_backward(rows, mask, kept)
        # With `beta=0` nothing of the first argument is used but its shape.
        of_A = torch.addmm(A, of_h.T, rows, beta=0, alpha=s)
        of_B = torch.addmm(B, (rows @ A.T if h is None else h).T, g, beta=0, alpha=s)
    return of_x, None, None, of_A, of_B
