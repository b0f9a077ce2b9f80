"""Stand in the place of a stack of frozen matrices with their low-rank updates, in whatever is computed with it.

A module that keeps the weights of its experts in one parameter reads it by name and computes with it as it likes: takes
one expert's matrix after the other, those of each token, or gives all to one grouped product. What stands in the
parameter's place must know these products and not the module::

    F.linear(x, W[e])                ──►  F.linear(x, W[e]) + s · F.linear(F.linear(x, R[e]), L[e])
    x @ W[e], bmm(W[ids], x)         ──►  x @ W[e] + s · (x @ L[e]) @ R[e],  …
    grouped_mm(x, W, offs)           ──►  grouped_mm(x, W, offs) + s · grouped_mm(grouped_mm(x, L, offs), R, offs)
    anything else                    ──►  the same with W + s · L R, formed for it

Only experts that compute anything take a product then, W is copied nowhere, and the backward keeps what that of a
linear's update does.

Where all matrices have one factor, of a first dimension 1, its grouped products are plain ones.

Shapes: E matrices (p, q) as the module stores them, R rank: W (E, p, q), L (E, p, R), R (E, R, q).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

# Products of which one argument may be ours: linear in it.
_PRODUCTS: set[Callable[..., Any]] = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm}
_PRODUCTS |= {Tensor.__matmul__, Tensor.__rmatmul__}
_PRODUCTS |= {f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None}
# transformers' own, where torch's grouped product does not go.
_NAMED_PRODUCTS = {"transformers.grouped_mm_fallback", "transformers::grouped_mm_fallback"}
# What is asked of a weight without computing with it.
_FACTS = {
    "dtype", "device", "shape", "ndim", "layout", "size", "dim", "numel", "stride", "data_ptr", "is_cuda", "is_cpu",
    "is_meta", "is_sparse", "is_quantized", "requires_grad", "is_floating_point", "element_size", "itemsize",
    "is_contiguous",
}  # fmt: skip


class StackedWeight:
    """``W + s · L R``, which is formed only where something is computed that is no product with it.

    Args:
        weight: ``W (..., p, q)``, frozen.
        left: ``L (..., p, R)``, in the weight's dtype; ``(1, p, R)`` if all matrices have it together.
        right: ``R (..., R, q)``, in the weight's dtype; likewise.
        scaling: s.
        dropout: Of what the update is multiplied with; ``None`` for none.
    """

    def __init__(
        self,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        scaling: float,
        dropout: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._weight = weight
        self._left = left
        self._right = right
        self._scaling = scaling
        self._dropout = dropout
        self._whole: Tensor | None = None
        self._unbound: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def _with(self, weight: Tensor, left: Tensor, right: Tensor) -> StackedWeight:
        return StackedWeight(weight, left, right, self._scaling, self._dropout)

    def whole(self) -> Tensor:
        """Form the sum ``W + s · L R``.

        Raises:
            RuntimeError: With dropout, which needs to know what the update is multiplied with.
        """
        if self._dropout is not None:
            raise RuntimeError(
                "The experts compute something with their weights that is no product which the adapter knows, and "
                "dropout acts on what an update is multiplied with: set `dropout` to 0, or choose another "
                "implementation of the experts (`experts_implementation`)."
            )
        if self._whole is None:
            with torch.autocast(self._weight.device.type, enabled=False):
                sum_up = torch.baddbmm if self._weight.dim() == 3 else torch.addmm
                left, right = (_for_each(factor, self._weight) for factor in (self._left, self._right))
                self._whole = sum_up(self._weight, left, right, alpha=self._scaling)
        return self._whole

    def __getitem__(self, index: Any) -> Any:
        if self._weight.dim() != 3 or not isinstance(index, (int, slice, list, Tensor)):
            return self.whole()[index]
        if isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point():
            index = int(index)
        if not isinstance(index, int) or isinstance(index, bool):
            factors = (side if len(side) < len(self._weight) else side[index] for side in (self._left, self._right))
            return self._with(self._weight[index], *factors)
        if self._unbound is None:  # whose backward gives one gradient for all, where each slice's would be as large
            self._unbound = self._left.unbind(0), self._right.unbind(0)
        weight = self._weight[index]
        return self._with(weight, *(side[index if len(side) > 1 else 0] for side in self._unbound))

    def __len__(self) -> int:
        return len(self._weight)

    def transpose(self, first: int, second: int) -> Any:
        """Exchange two dimensions; without forming the sum if they are a matrix's."""
        dims = self._weight.dim()
        if {first % dims, second % dims} != {dims - 2, dims - 1}:
            return self.whole().transpose(first, second)
        return self._with(self._weight.mT, self._right.mT, self._left.mT)

    def t(self) -> Any:
        """Transpose one matrix."""
        return self.transpose(0, 1)

    @property
    def mT(self) -> Any:
        """Each matrix transposed."""
        return self.transpose(-2, -1)

    @property
    def T(self) -> Any:
        """One matrix transposed."""
        return self.transpose(0, 1) if self._weight.dim() == 2 else self.whole().T

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._weight if name in _FACTS else self.whole(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1] if len(args) > 1 else None, cls) and not isinstance(args[0], cls):
            return args[1]._linear(args[0], *args[2:], **kwargs)
        if func in (torch.transpose, torch.swapaxes) and len(args) == 3 and not kwargs:
            return args[0].transpose(*args[1:])
        is_product = func in _PRODUCTS or any(name in str(func) for name in _NAMED_PRODUCTS)
        if is_product and [isinstance(arg, cls) for arg in args[:2]].count(True) == 1 and kwargs.get("bias") is None:
            return _product(func, *args, **kwargs)
        args, kwargs = tree_map(lambda arg: arg.whole() if isinstance(arg, cls) else arg, (args, kwargs))
        return func(*args, **kwargs)

    def _dropped(self, x: Tensor) -> Tensor:
        return x if self._dropout is None else self._dropout(x)

    def _linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        update = F.linear(F.linear(self._dropped(x), self._right), self._left)
        return F.linear(x, self._weight, bias) + self._scaling * update


def _product(func: Any, first: Any, second: Any, *args: Any, **kwargs: Any) -> Tensor:
    if isinstance(first, StackedWeight):
        own, x = first, second
        inner = _times(func, own._right, own._dropped(x), own._right, *args, **kwargs)
        update = _times(func, own._left, inner, own._left, *args, **kwargs)
        base: Tensor = func(own._weight, x, *args, **kwargs)
    else:
        own, x = second, first
        inner = _times(func, own._dropped(x), own._left, own._left, *args, **kwargs)
        update = _times(func, inner, own._right, own._right, *args, **kwargs)
        base = func(x, own._weight, *args, **kwargs)
    result: Tensor = base + own._scaling * update
    return result


def _for_each(factor: Tensor, like: Tensor) -> Tensor:
    """A factor for each matrix, as a view where they have it together."""
    return factor.expand(len(like), *factor.shape[1:]) if like.dim() == 3 else factor


def _times(func: Any, first: Tensor, second: Tensor, factor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The product of two, of which one is a factor that all matrices may have together."""
    other = second if first is factor else first
    if factor.dim() != 3 or len(factor) > 1:
        result: Tensor = func(first, second, *args, **kwargs)
    elif other.dim() == 2:  # a grouped product, of which each group has the same matrix; or E is 1
        result = first[0] @ second if first is factor else first @ second[0]
    else:
        one = _for_each(factor, other)
        result = func(one, second, *args, **kwargs) if first is factor else func(first, one, *args, **kwargs)
    return result
