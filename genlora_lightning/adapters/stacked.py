"""Make the updates of a stack of matrices of one shape, as of a mixture's experts, from any kind's update of one.

A kind says what the update of one matrix is, and need not know of stacks. Of a kind with two factors each parameter of
a factor becomes one with the stack's dimension first, so that a layer of a hundred experts has as few tensors as a
linear, and the matrices are made at once (:meth:`Factor.make_stack`). What all matrices share has
the dimension 1 there. Any other kind has one update for each matrix.

Shapes: E matrices in the stack, R rank, n entries of a factor's rows, I in_features, O out_features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from genlora_lightning.adapters.autograd import is_ordinary
from genlora_lightning.adapters.base import AdapterModule, Factor, FactorPair, MatrixShape, StackShape, WeightUpdate
from genlora_lightning.adapters.config import AdapterConfig

# As `layers.sharing` cuts what is made at once, here for slices of one stack.
_AT_ONCE_ON_CPU = 1 << 18
_AT_ONCE = 1 << 24


class StackedFactor(Factor):
    """E matrices ``M (E, rank, num_entries)`` that one kind of factor makes, with their parameters stacked.

    Args:
        factors: The factors; of one class and one :meth:`Factor.batch_key`.
        shared: Parameters that all of them have together: the first one's. If these are all that a factor has, there
            is one matrix for all, ``M (1, rank, num_entries)``.
    """

    def __init__(self, factors: Sequence[Factor], shared: Collection[str] = ()) -> None:
        first = factors[0]
        super().__init__(first.rank, first.num_entries)
        self.num_matrices = 1 if set(first.roles) <= set(shared) else len(factors)
        self.shared = frozenset(shared)
        self.roles = first.roles
        self.is_stored = first.is_stored  # type: ignore[misc]
        self.ROWS_ALONG = first.ROWS_ALONG  # type: ignore[misc]
        for name in self.roles:
            parts = [getattr(factor, name).detach() for factor in (factors[:1] if name in shared else factors)]
            self.register_parameter(name, nn.Parameter(torch.stack(parts), requires_grad=first.is_trained(name)))
        # What a slice is made of beside its tensors. In a tuple, so that it is no part of the module.
        self._template = (copy.deepcopy(first).to("meta"),)

    @override
    def is_trained(self, name: str) -> bool:
        return self._template[0].is_trained(name)

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.is_meta:
            return
        for parts in self._each():
            self._template[0].with_parts(parts).reset_parameters(generator)

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return 1 if next(iter(self.roles)) in self.shared else self.num_matrices, *self._template[0].first_shape

    @override
    def batch_key(self) -> Hashable:
        template = self._template[0]
        return type(template), self.num_matrices, self.shared, template.batch_key()

    @property
    @override
    def cost(self) -> int:
        return self.num_matrices * self._template[0].cost

    @override
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        """Make the matrices ``M (E, rank, num_entries)``."""
        if self.is_stored:
            (stack,) = self.parts()
            matrices = stack if dtype is None else stack.to(dtype)
            # As of a factor alone: FSDP1 frees a view in the parameter's place after this forward.
            return matrices.clone() if matrices is stack and not isinstance(stack, nn.Parameter) else matrices
        parts = self.parts()
        if plain or torch.compiler.is_compiling() or not is_ordinary(parts[0]):
            return torch.stack([self._template[0].with_parts(own)(dtype=dtype, plain=plain) for own in self._each()])
        return self._make(parts, dtype)

    def _each(self) -> Iterator[tuple[Tensor, ...]]:
        """The parameters of each matrix."""
        parts = [part.expand(self.num_matrices, *part.shape[1:]).unbind(0) for part in self.parts()]
        return zip(*parts, strict=True)

    def _make(self, parts: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
        template = self._template[0]
        number = max(1, (_AT_ONCE_ON_CPU if parts[0].device.type == "cpu" else _AT_ONCE) // template.cost)
        if number >= self.num_matrices:
            return template.make_stack(parts, dtype=dtype)
        starts = range(0, self.num_matrices, number)
        pieces = ([part if len(part) == 1 else part[start : start + number] for part in parts] for start in starts)
        return torch.cat([template.make_stack(piece, dtype=dtype) for piece in pieces])

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        matrices = [factor._make(factor.parts(), dtype) for factor in factors]
        waiting = sum(matrix.requires_grad for matrix in matrices)

        def one_is_differentiated(_: Tensor) -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting and when_differentiated is not None:
                when_differentiated()

        for matrix in matrices:
            if matrix.requires_grad and when_differentiated is not None:
                matrix.register_hook(one_is_differentiated)  # type: ignore[no-untyped-call]
        return matrices

    @override
    def extra_repr(self) -> str:
        return f"num_matrices={self.num_matrices}, {self._template[0].extra_repr()}"


class StackedUpdate(WeightUpdate):
    """The updates ``ΔW (E, out, in)`` of E matrices, of a kind without two factors, one by one.

    Args:
        updates: Of the matrices.
    """

    def __init__(self, updates: Sequence[WeightUpdate]) -> None:
        super().__init__(updates[0].shape)
        self.each = nn.ModuleList(updates)
        self.scaling = updates[0].scaling

    def _updates(self) -> Iterator[WeightUpdate]:
        yield from self.each  # type: ignore[misc]

    @property
    @override
    def rank(self) -> int:
        return next(self._updates()).rank

    @override
    def delta_weight(self) -> Tensor:
        return torch.stack([update() for update in self._updates()])

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        pairs = [update.factors() for update in self._updates()]
        return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])


def _can_be_stacked(factor: nn.Module) -> bool:
    """Whether a factor is its own parameters alone, which nobody looks for in factors of its class before a step."""
    assert isinstance(factor, Factor)
    return not factor._modules and type(factor).directions.__func__ is AdapterModule.directions.__func__  # type: ignore[attr-defined]


def make_stack(
    config: AdapterConfig,
    shape: StackShape,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> WeightUpdate:
    """Make the updates of a stack of matrices, which change nothing yet.

    Args:
        config: The kind, its rank, …
        shape: The stack's.
        device: Where the parameters are made.
        generator: Random number generator for the initial values; torch's default one if ``None``.
    """
    one = MatrixShape(*shape)
    first = config.make(one, device=device, generator=generator)
    is_pair = type(first) is FactorPair and all(map(_can_be_stacked, first.children()))
    if is_pair and device is not None and device.type == "meta":  # nothing to draw: all are alike
        updates = [first] * shape.num_matrices
    else:
        others = range(shape.num_matrices - 1)
        updates = [first, *(config.make(one, device=device, generator=generator) for _ in others)]
    if not is_pair:
        return StackedUpdate(updates)
    A, B = (
        StackedFactor([getattr(update, name) for update in updates], shared)
        for name, shared in zip(("A", "B"), config.shared_over_experts, strict=True)
    )
    return FactorPair(A, B, first.scaling)
