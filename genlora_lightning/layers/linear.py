"""Adapt a linear layer: the frozen linear plus the low-rank product, fused where that is possible.

Shapes: R rank, I in_features, O out_features; ``...`` any leading dimensions (batch, tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.autograd import in_transform
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.fused import adapted_linear, compute_dtype, fusable
from genlora_lightning.layers.masked import masked_linear


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D`` (GPT-2): a linear whose weight is stored as ``(in, out)``."""
    # By name, so that neither transformers nor its torch-dependent pytorch_utils must be imported to adapt an MLP.
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def _own_forward(module: nn.Module) -> type | None:
    """The class that gives a linear a forward other than that of ``nn.Linear`` or ``Conv1D``; ``None`` if none does."""
    for cls in type(module).__mro__:
        if cls is nn.Linear or (cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"):
            return None
        if "forward" in vars(cls) or "__call__" in vars(cls):
            return cls
    return None


class AdaptedLinear(AdaptedLayer):
    r"""A frozen linear layer with an update of its weight.

    .. math::
        y = W x + b + \Delta W \, \mathrm{dropout}(x), \qquad \Delta W x = s \, B (A x)

    The second form is that of kinds with two factors, ``A (rank, in_features)`` and ``B (out_features, rank)``, with
    which ΔW is never formed; with ``keep_zeros`` it is, and masked. A new layer gives bit for bit the output of its
    base layer.

    Args:
        base_layer: The ``nn.Linear`` (or transformers ``Conv1D``) to adapt. It is kept, not copied, and frozen.
        config: The kind, its rank, scaling, dropout, …
        generator: Random number generator for the initial values.

    Raises:
        TypeError: ``base_layer`` is no linear layer.
        ValueError: The configuration does not fit the matrix.
    """

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module) -> MatrixShape | None:
        if isinstance(module, nn.Linear):
            return MatrixShape(module.out_features, module.in_features)
        if is_conv1d(module):
            sizes: Any = module  # not the weight's, of which FSDP1 holds a flat piece between two forwards
            return MatrixShape(sizes.nf, sizes.nx)
        return None

    @override
    def to_stored(self, delta: Tensor) -> Tensor:
        return delta.T if is_conv1d(self.base_layer) else delta

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the adapted layer.

        Args:
            x: ``(..., in_features)``.
            args: Further arguments for a base layer whose class takes them. They are the base layer's alone: the update
                is ``ΔW x`` whatever they are.
            kwargs: The same by name.

        Returns:
            ``(..., out_features)``, in the dtype the base layer gives.
        """
        # Hundreds of layers come here for each token, and a module's own lookup is slow.
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        if not self.enabled or self._unmerged_weight:
            output: Tensor = base(x, *args, **kwargs)
            return output
        if self.config.keep_zeros:
            return self._masked_forward(x, *args, **kwargs)
        pair = self.pair
        if pair is None:
            output = base(x, *args, **kwargs)
            return output + F.linear(self.dropout(x), self.update().to(compute_dtype(x)))
        update: Any = self._modules["update"]
        scaling = update.scaling
        if not self.fused or in_transform():
            output = base(x, *args, **kwargs)
            A, B = update.active_rows(pair[0](plain=True), pair[1](plain=True))
            # The small A and B take x's dtype, never x theirs: a copy of x in float32 would be kept for the backward.
            update_of_x: Tensor = scaling * F.linear(F.linear(self.dropout(x), A.to(x.dtype)), B.T.to(x.dtype))
            return output + update_of_x
        # A class that was derived from these may compute something else.
        is_linear = type(base) is nn.Linear
        transposed = not is_linear and type(base).__name__ == "Conv1D" and is_conv1d(base)
        own = fusable(base, x) if (is_linear or transposed) and not args and not kwargs else None
        if own is not None:
            weight, bias = own
            dtype = compute_dtype(weight)
            A, B = self.store.matrices(*pair, dtype)
            if update.active_rank is not None:
                A, B = update.active_rows(A, B)
            return adapted_linear(
                x,
                weight,
                bias,
                A,
                B,
                scaling=scaling,
                dropout=self.config.dropout if self._modules["dropout"].training else 0.0,  # type: ignore[union-attr]
                transposed=transposed,
                keep_h=update.is_stored,
                dtype=dtype,
            )
        output = base(x, *args, **kwargs)
        A, B = update.active_rows(*self.store.matrices(*pair, compute_dtype(x)))
        return output + F.linear(scaling * F.linear(self.dropout(x), A), B.T)

    def _masked_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base, transposed = self.base_layer, is_conv1d(self.base_layer)
        is_plain = type(base) is nn.Linear or (transposed and type(base).__name__ == "Conv1D")
        drops = self.training and self.config.dropout > 0
        own = fusable(base, x) if is_plain and not (args or kwargs or drops or in_transform()) and self.fused else None
        if own is not None and self.pair is not None:
            weight, bias = own
            dtype = compute_dtype(weight)
            A, B = self.store.matrices(*self.pair, dtype)
            A, B = self.update.active_rows(A, B)  # type: ignore[operator]
            return masked_linear(x, weight, bias, A, B, scaling=self.scaling, transposed=transposed, dtype=dtype)
        output: Tensor = base(x, *args, **kwargs)
        dtype = compute_dtype(x)
        factors = self.matrices(dtype)
        delta = self.update() if factors is None else self.scaling * (factors[1].T @ factors[0])
        # To lay it out as it is stored is its own inverse.
        return output + F.linear(self.dropout(x), self.to_stored(self.masked(self.to_stored(delta.to(dtype)))))

    @property
    @override
    def forms_delta(self) -> bool:
        return False  # where it is formed, it is of A and B, which may be made for the whole model

    @override
    def computes_with(self, weight: Tensor) -> bool:
        base, transposed = self.base_layer, is_conv1d(self.base_layer)
        if "forward" not in vars(base) and _own_forward(base) is None:
            return True
        # A class, or somebody who has replaced the forward, may do anything, and mostly does the same: it is tried.
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, self.in_features, generator=generator).to(weight.device, weight.dtype)
        expected = F.linear(x, weight.T if transposed else weight, self.bias)
        try:
            given = functional_call(base, {"weight": weight}, (x,))
        except (TypeError, ValueError, RuntimeError, AttributeError):  # it takes something else
            return False
        if not isinstance(given, Tensor) or given.shape != expected.shape:
            return False
        error = (given.double() - expected.double()).norm()
        return bool(error <= 8 * torch.finfo(weight.dtype).eps * expected.double().norm())
