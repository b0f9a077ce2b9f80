"""Make the updates of a stack of matrices of one shape, as of a mixture's experts, from any kind's update of one.

A kind says what the update of one matrix is, and needs to know nothing of stacks. Of a kind with two factors each
parameter of a factor becomes one with the stack's dimension first, so that a layer of hundred experts has no more
parameters than a linear; the slices are factors of the kind, which are made at once. Any other kind has one update for
each matrix.

Shapes: E matrices in the stack, R rank, n entries of a factor's rows, I in_features, O out_features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from genlora_lightning.adapters.autograd import is_ordinary
from genlora_lightning.adapters.base import Factor, FactorPair, MatrixShape, StackShape, WeightUpdate
from genlora_lightning.adapters.config import AdapterConfig

# As `layers.sharing` cuts what is made at once, here for slices of one stack.
_AT_ONCE_ON_CPU = 1 << 18
_AT_ONCE = 1 << 24


class StackedFactor(Factor):
    """E matrices ``M (E, rank, num_entries)`` that one kind of factor makes, with their parameters stacked.

    Args:
        factors: The factors; of one class and one :meth:`Factor.batch_key`.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        first = factors[0]
        super().__init__(first.rank, first.num_entries)
        self.num_matrices = len(factors)
        self.roles = first.roles
        self.is_stored = first.is_stored  # type: ignore[misc]
        for name in self.roles:
            parts = [getattr(factor, name).detach() for factor in factors]
            self.register_parameter(name, nn.Parameter(torch.stack(parts), requires_grad=first.is_trained(name)))
        # What a slice is made of beside its tensors. In a tuple, so that it is no part of the module.
        self._template = (copy.deepcopy(first).to("meta"),)

    def slices(self) -> list[Factor]:
        """A factor of the kind for each matrix, whose parameters are views of the stacked ones."""
        return self._slices([part.unbind(0) for part in self.parts()])

    def _slices(self, unbound: Sequence[Sequence[Tensor]]) -> list[Factor]:
        (template,) = self._template
        found = []
        for parts in zip(*unbound, strict=True):
            factor = object.__new__(type(template))
            own = {"_parameters": dict(zip(self.roles, parts, strict=True)), "_buffers": {}}
            factor.__dict__.update(template.__dict__, **own)
            found.append(factor)
        return found

    @override
    def is_trained(self, name: str) -> bool:
        return self._template[0].is_trained(name)

    @override
    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        if self.is_meta:
            return
        for factor in self.slices():
            factor.reset_parameters(generator)

    @property
    @override
    def first_shape(self) -> tuple[int, ...]:
        return self.num_matrices, *self._template[0].first_shape

    @override
    def batch_key(self) -> Hashable:
        template = self._template[0]
        return type(template), self.num_matrices, template.batch_key()

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
        if plain or torch.compiler.is_compiling() or not is_ordinary(self.parts()[0]):
            return torch.stack([factor(dtype=dtype, plain=plain) for factor in self.slices()])
        return self.make_many([self], dtype=dtype)[0]

    @classmethod
    @override
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        slices = [one for stack in factors for one in stack.slices()]
        pieces = list(_pieces(slices, factors[0].device))
        waiting = len(pieces)

        def one_is_differentiated() -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting and when_differentiated is not None:
                when_differentiated()

        kind = type(slices[0])
        matrices = [
            matrix
            for piece in pieces
            for matrix in kind.make_many(piece, dtype=dtype, when_differentiated=one_is_differentiated)
        ]
        size = factors[0].num_matrices
        return [torch.stack(matrices[start : start + size]) for start in range(0, len(matrices), size)]

    @classmethod
    @override
    def pass_gradients(cls, factors: Sequence[Self], gradients: Sequence[Tensor]) -> None:
        for stack, gradient in zip(factors, gradients, strict=True):
            parts = [part for part in stack.parts() if part.requires_grad]
            with torch.inference_mode(False):
                leaves = [[leaf.detach() for leaf in part.unbind(0)] for part in stack.parts()]
                for part, own in zip(stack.parts(), leaves, strict=True):
                    for leaf in own:
                        leaf.requires_grad_(part.requires_grad)
            slices, of_slices = stack._slices(leaves), gradient.unbind(0)
            kind, start = type(slices[0]), 0
            for piece in _pieces(slices, stack.device):
                kind.pass_gradients(piece, of_slices[start : start + len(piece)])
                start += len(piece)
            # To each parameter in one backward, for whoever hangs on its gradient: the averaging between ranks, hooks.
            found = [torch.stack([leaf.grad for leaf in own]) for own in leaves if own[0].requires_grad]  # type: ignore[misc]
            torch.autograd.backward(parts, found)

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
    is_pair = type(first) is FactorPair
    if is_pair and device is not None and device.type == "meta":  # nothing to draw: all are alike
        updates = [first] * shape.num_matrices
    else:
        others = range(shape.num_matrices - 1)
        updates = [first, *(config.make(one, device=device, generator=generator) for _ in others)]
    if not is_pair:
        return StackedUpdate(updates)
    A, B = (StackedFactor([getattr(update, name) for update in updates]) for name in ("A", "B"))
    return FactorPair(A, B, first.scaling)


def _pieces(slices: list[Factor], device: torch.device) -> Iterator[list[Factor]]:
    number = max(1, (_AT_ONCE_ON_CPU if device.type == "cpu" else _AT_ONCE) // slices[0].cost)
    for start in range(0, len(slices), number):
        yield slices[start : start + number]
