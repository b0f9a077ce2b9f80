"""Define what an update of a weight is: the modules whose parameters are an adapter's, and what they can do.

::

    AdapterModule                its own parameters are an adapter's: kept in float32, each with a role in the optimizer
    ├── Factor                   a matrix M (rank, n), stored or made of parameters, alone or many at once
    └── WeightUpdate             ΔW (out, in) of one matrix
        └── FactorPair           ΔW = s · Bᵀ A of two factors A (rank, in) and B (rank, out)

Shapes: R rank, n entries of a factor's rows (in_features for A, out_features for B).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from genlora_lightning.adapters.autograd import is_ordinary


class MatrixShape(NamedTuple):
    """The sizes of a weight matrix ``W (out_features, in_features)``, and of its update."""

    out_features: int
    in_features: int

    @property
    def num_matrices(self) -> int:
        """How many matrices of these sizes stand in one parameter: 1, but for a :class:`StackShape`."""
        return 1

    @property
    def sizes(self) -> list[int]:
        """The sizes of the whole, as files have them: ``[out, in]``, of a stack ``[num_matrices, out, in]``."""
        return [*self]

    @staticmethod
    def of(sizes: Sequence[int]) -> MatrixShape:
        """The shape that :attr:`sizes` are of."""
        *num, out_features, in_features = sizes
        return StackShape(num[0], out_features, in_features) if num else MatrixShape(out_features, in_features)


class StackShape(MatrixShape):
    """The sizes of one of several matrices in one parameter, as of the experts of a mixture; and how many they are."""

    _num_matrices: int

    def __new__(cls, num_matrices: int, out_features: int, in_features: int) -> StackShape:
        """Make the shape of a stack."""
        shape = super().__new__(cls, out_features, in_features)
        shape._num_matrices = num_matrices
        return shape

    @property
    @override
    def num_matrices(self) -> int:
        return self._num_matrices

    @property
    @override
    def sizes(self) -> list[int]:
        return [self.num_matrices, *self]

    def __getnewargs__(self) -> tuple[int, int, int]:
        return self.num_matrices, *self


class Role(NamedTuple):
    """What an optimizer is told of a parameter of an adapter.

    Args:
        group: The parameter group, which may have a rate of its own.
        decayed: Whether weight decay applies.
    """

    group: str
    decayed: bool = True


class AdapterModule(nn.Module):
    """A module whose own parameters are an adapter's.

    A subclass says the role of each of them, in the order in which it takes them: in :attr:`ROLES`, or, where it
    depends on the instance, in ``self.roles``.

    Note:
        The parameters are float32 and stay so: a cast of the module to bfloat16 or float16 moves it but leaves the
        dtype, because an optimizer's small steps are lost in 8 bits of mantissa. A cast to float64 is obeyed.
        :meth:`hand_over` ends that.
    """

    ROLES: ClassVar[Mapping[str, Role]] = {}
    #: Modules of one key are one module in a model's adapter (:func:`~genlora_lightning.layers.ties.tie_modules`); one
    #: without is its layer's own.
    tie_key: Hashable = None
    #: Why the parameters must lie whole on each rank, if they must.
    must_be_whole: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.roles: Mapping[str, Role] = self.ROLES
        self.keeps_float32 = True

    @property
    def is_meta(self) -> bool:
        """Whether there are parameters that have no values yet."""
        return any(parameter is not None and parameter.is_meta for parameter in self._parameters.values())

    def is_trained(self, name: str) -> bool:
        """Whether a parameter is trained; one that is not is saved all the same."""
        return True

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new initial values. On the meta device there are none to draw."""
        raise NotImplementedError(f"{type(self).__name__} must define `reset_parameters`.")

    @classmethod
    def directions(cls, modules: Sequence[Self], name: str, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Say what the optimizer is given in place of parameters' gradients; here the gradients themselves.

        :func:`~genlora_lightning.adapters.steps.hook_steps` asks, just before the optimizer's own step.

        Args:
            modules: Modules whose parameters of that name have one shape.
            name: The parameters' name.
            gradients: As they are after the backward, the averaging between ranks, unscaling and clipping.
        """
        return gradients

    def diagnostics(self) -> Mapping[str, Tensor]:
        """Figures of the parameters' state that are worth a look, by name: of all modules the largest is logged."""
        return {}

    @torch.no_grad()
    def hand_over(self) -> None:
        """Leave the parameters to another library: casts are obeyed, and what is not trained becomes a buffer.

        Such a library takes every parameter of an adapter for one to train, and decides on dtypes itself.
        """
        self.keeps_float32 = False
        for name in [name for name in self.roles if not self.is_trained(name)]:
            fixed = self._parameters.pop(name)
            self.register_buffer(name, None if fixed is None else fixed.detach())

    @override
    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        # Every cast and move of a module (`.to`, `.half`, Lightning's precision plugins) goes through `_apply`.
        if not self.keeps_float32:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def keep_precision(tensor: Tensor) -> Tensor:
            result: Tensor = fn(tensor)
            if result.dtype in (torch.bfloat16, torch.float16):
                return tensor.to(device=result.device)
            return result

        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]


class Factor(AdapterModule, ABC):
    """A matrix ``M (rank, num_entries)``: stored as it is, or made of other parameters.

    Factors of one class and one :meth:`batch_key` are made at once, however many layers they stand in.

    Args:
        rank: Number R of rows.
        num_entries: Length n of a row.
    """

    #: Whether the matrix is a parameter: then nothing is gained by making many at once, or by keeping what was made.
    is_stored: ClassVar[bool] = False
    #: Along which dimension of a parameter, counted from its end, the rows lie, by its name; all rows have the other
    #: parameters in common. For kinds that :attr:`~genlora_lightning.adapters.config.AdapterConfig.can_be_elastic`.
    ROWS_ALONG: ClassVar[Mapping[str, int]] = {}

    def __init__(self, rank: int, num_entries: int) -> None:
        super().__init__()
        self.rank = rank
        self.num_entries = num_entries

    # -- what a kind says ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def first_shape(self) -> tuple[int, ...]:
        """The shape of the first parameter where nobody has cut it."""

    @abstractmethod
    def forward(self, *, dtype: torch.dtype | None = None, plain: bool = False) -> Tensor:
        """Make the matrix ``M (rank, num_entries)``, computed in the parameters' dtype, also under autocast.

        It must not be a view of what stands in a parameter's place: FSDP1 frees that after the forward.

        Args:
            dtype: Of the result; the parameters' if ``None``.
            plain: Leave the backward to autograd, which can differentiate it again but may keep more for it.
        """

    # -- what a kind may do faster ------------------------------------------------------------------------------------

    def batch_key(self) -> Hashable:
        """What factors that are made at once have in common, beside their class."""
        return self.rank, self.num_entries

    @classmethod
    def make_many(
        cls,
        factors: Sequence[Self],
        *,
        dtype: torch.dtype | None,
        when_differentiated: Callable[[], None] | None = None,
    ) -> Sequence[Tensor]:
        """Make the matrices of factors of one key; here one by one.

        Args:
            factors: The factors.
            dtype: Of the results; the parameters' if ``None``.
            when_differentiated: May be called as soon as nobody needs the matrices any more: their gradients are there.
        """
        return [factor(dtype=dtype) for factor in factors]

    @classmethod
    def pass_gradients(cls, factors: Sequence[Self], gradients: Sequence[Tensor]) -> None:
        """Add to the parameters' gradients what the gradients of the matrices make of them; here by autograd.

        Args:
            factors: Factors of one key.
            gradients: Of the matrices that :meth:`make_many` made of them.
        """
        with torch.inference_mode(False), torch.enable_grad():
            matrices = cls.make_many(factors, dtype=None)
            torch.autograd.backward(matrices, [gradient.to(matrices[0].dtype) for gradient in gradients])

    def with_parts(self, parts: Sequence[Tensor]) -> Self:
        """A factor like this one of other tensors, in the order of their roles; they need not be parameters."""
        factor = object.__new__(type(self))
        factor.__dict__.update(self.__dict__, _parameters=dict(zip(self.roles, parts, strict=True)), _buffers={})
        return factor

    def make_stack(self, parts: Sequence[Tensor], *, dtype: torch.dtype | None) -> Tensor:
        """Make the matrices ``(E, rank, num_entries)`` of E factors like this one; here by :meth:`make_many`.

        Args:
            parts: Their parameters, stacked, in the order of their roles; with one for all where they share it.
            dtype: Of the result; the parameters' if ``None``.
        """
        number = max(map(len, parts))
        stacks = [part.expand(number, *part.shape[1:]).unbind(0) for part in parts]
        factors = [self.with_parts(own) for own in zip(*stacks, strict=True)]
        return torch.stack([*self.make_many(factors, dtype=dtype)])

    @property
    def cost(self) -> int:
        """Numbers that making the matrix needs in between, which decides how many are made at once."""
        return self.rank * self.num_entries

    # -- what follows -------------------------------------------------------------------------------------------------

    def parts(self) -> tuple[Tensor, ...]:
        """The parameters, in the order of their roles."""
        # Hundreds of factors are asked in each forward, and a module's own lookup of a parameter is slow.
        own: Mapping[str, Tensor | None] = {**self._parameters, **self._buffers} if self._buffers else self._parameters
        try:
            return tuple([own[name] for name in self.roles])  # type: ignore[misc]
        except KeyError:  # FSDP1 has put views in their places
            return tuple(getattr(self, name) for name in self.roles)

    @property
    def own_dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return self.parts()[0].dtype

    @property
    def device(self) -> torch.device:
        """The parameters' device."""
        return self.parts()[0].device

    @property
    def is_whole(self) -> bool:
        """Whether the parameters are ordinary tensors here and now, and not shards that FSDP1 or FSDP2 has made."""
        parts = self.parts()
        if parts[0].shape != self.first_shape:
            return False
        return all(is_ordinary(part) and not getattr(part, "_fsdp_flattened", False) for part in parts)


class WeightUpdate(AdapterModule, ABC):
    """The update ΔW of one matrix. A new one is zero, exactly.

    One that is a product of two matrices is a :class:`FactorPair`, with which layers never form ΔW. Of any other kind
    layers use :meth:`delta_weight` itself.

    Args:
        shape: The matrix's.
    """

    #: The factor s in ``ΔW = s · B @ A`` of :meth:`factors`.
    scaling: float = 1.0

    def __init__(self, shape: MatrixShape) -> None:
        super().__init__()
        self.shape = shape

    @property
    @abstractmethod
    def rank(self) -> int:
        """The highest rank that ΔW can have."""

    @abstractmethod
    def delta_weight(self) -> Tensor:
        """Compute ``ΔW (out_features, in_features)`` in the parameters' dtype: what is merged."""

    @override
    def forward(self) -> Tensor:
        """Compute :meth:`delta_weight`: as a forward, before which FSDP gathers the parameters."""
        return self.delta_weight()

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Compute ``A (rank, in_features)`` and ``B (out_features, rank)`` with ``ΔW = scaling · B @ A``.

        Here by a singular value decomposition in float64, exact to rounding; a kind that has factors gives its own.
        """
        delta = self.delta_weight()
        U, S, V = torch.linalg.svd(delta.double(), full_matrices=False)
        root = S[: self.rank].sqrt()
        return (root[:, None] * V[: self.rank]).to(delta.dtype), (U[:, : self.rank] * root).to(delta.dtype)


class FactorPair(WeightUpdate):
    r"""An update that is a product of two factors.

    .. math:: \Delta W = s \, B^\top A

    Args:
        A: ``(rank, in_features)``.
        B: ``(rank, out_features)``: transposed, so that both are made by the same code.
        scaling: s, whatever :attr:`active_rank` is.
    """

    #: How many of the first rows of A and B make up ΔW at present; all if ``None``.
    active_rank: int | None = None

    def __init__(self, A: Factor, B: Factor, scaling: float) -> None:
        super().__init__(MatrixShape(B.num_entries, A.num_entries))
        self.A = A
        self.B = B
        self.scaling = scaling
        #: Whether both are parameters.
        self.is_stored = A.is_stored and B.is_stored

    @property
    @override
    def rank(self) -> int:
        return self.A.rank

    @override
    def delta_weight(self) -> Tensor:
        A, B = self.factors()
        with torch.autocast(A.device.type, enabled=False):
            return self.scaling * (B @ A)

    @override
    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.active_rows(self.A(), self.B())
        return A, B.mT

    def active_rows(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The first :attr:`active_rank` rows of ``A (rank, in)`` and ``B (rank, out)``, as views."""
        rank = self.active_rank
        return (A, B) if rank is None else (A[..., :rank, :], B[..., :rank, :])

    @override
    def extra_repr(self) -> str:
        return f"scaling={self.scaling:.4g}"


def adapter_modules(module: nn.Module) -> list[AdapterModule]:
    """List the modules with parameters of an adapter in a module, each once."""
    return [m for m in module.modules() if isinstance(m, AdapterModule) and m.roles]


def trained_by_role(module: nn.Module) -> dict[str, tuple[Role, list[nn.Parameter]]]:
    """Sort the trainable parameters of adapters into their optimizer groups, in the order of the modules.

    Raises:
        ValueError: A parameter has no role, or one group holds parameters with and without weight decay.
    """
    found: dict[str, tuple[Role, list[nn.Parameter]]] = {}
    placed: set[int] = set()
    for owner in adapter_modules(module):
        for name, parameter in owner.named_parameters(recurse=False):
            role = owner.roles.get(name)
            if role is None:
                raise ValueError(f"{type(owner).__name__} gives no role to its parameter {name!r}: add it to `ROLES`.")
            if not parameter.requires_grad or id(parameter) in placed:
                continue
            placed.add(id(parameter))
            known, members = found.setdefault(role.group, (role, []))
            if known != role:
                raise ValueError(f"The group {role.group!r} has parameters with and without weight decay.")
            members.append(parameter)
    return found
