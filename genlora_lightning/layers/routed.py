"""Add to each row of a batch the update of the adapter that the row names; give a layer another update.

The rows of one adapter are a group. Groups of as many rows, and of one rank, are computed at once::

    x (rows, T, I) ── rows of these groups ── (groups, rows each · T, I) ── bmm Aᵀ ── bmm B ── added to their rows of y

Shapes: R rank, I in_features, O out_features, T whatever else a row has (tokens).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.autograd import in_transform
from genlora_lightning.adapters.base import Factor, FactorPair, WeightUpdate
from genlora_lightning.adapters.combined import ConcatenatedFactor
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.factors import FactorLayer, FactorStore, ForForward
from genlora_lightning.layers.fused import compute_dtype, fusable
from genlora_lightning.layers.linear import AdaptedLinear

L = TypeVar("L", bound=AdaptedLayer)


def with_update(layer: L, update: WeightUpdate) -> L:
    """Make a layer like another one, on the same base, with another update; the other one is left as it is."""
    other = copy.copy(layer)
    other._parameters, other._buffers = dict(layer._parameters), dict(layer._buffers)
    other._modules = {**layer._modules, "update": update}
    other.store = FactorStore()
    return other


class _Member(NamedTuple):
    """What decides on how an adapter's rows are computed in one layer."""

    name: str
    rank: int | None  # None: it is no product of two factors
    scaling: float
    dropout: float


class _Step(NamedTuple):
    """Groups that are computed at once.

    Args:
        member: The first one; the others differ in their names only.
        groups: How many.
        start: Where their rows of A and B begin.
        rows: The batch's rows in the order of the groups; ``None`` if that is all rows in their order.
    """

    member: _Member
    groups: int
    start: int
    rows: Tensor | None


class Routing:
    """Which adapter each row of a batch is for: common to all layers of a model.

    Attributes:
        batch_size: That of the model's forward which is running; ``None`` if there is none, or it is not known.
    """

    def __init__(self) -> None:
        self.batch_size: int | None = None
        self._rows: tuple[str | None, ...] = ()
        self._steps: dict[tuple[Any, ...], list[_Step]] = {}
        self._signatures: dict[tuple[_Member, ...], int] = {}

    def signature(self, members: tuple[_Member, ...]) -> int:
        """The number of a layer's adapters: that of all layers that have the same ones."""
        return self._signatures.setdefault(members, len(self._signatures))

    def members(self, signature: int) -> tuple[_Member, ...]:
        """The adapters of a number."""
        return list(self._signatures)[signature]

    @property
    def rows(self) -> tuple[str | None, ...]:
        """The adapter of each row; ``None``: the base alone."""
        return self._rows

    @rows.setter
    def rows(self, names: Sequence[str | None]) -> None:
        names = tuple(names)
        if names != self._rows:
            self._rows, self._steps = names, {}

    def check_batch(self, size: int) -> None:
        """Check that a batch has a row for each name, or as many for each as a search has beams.

        Raises:
            ValueError: It has not.
        """
        if size == 0 or size % len(self._rows):
            raise ValueError(
                f"`rows` names {len(self._rows)} adapters, and the batch has {size} rows: give one name for each row "
                "(None: the base alone). Of a batch that is a multiple of them each has as many, one after another."
            )

    def steps(self, signature: int, x: Tensor) -> list[_Step]:
        """How a layer with the adapters of a number computes an input.

        Raises:
            ValueError: The input's first dimension is not the batch's.
        """
        size = x.shape[0] if x.ndim > 1 else 0
        if self.batch_size is not None and size != self.batch_size:
            raise ValueError(
                f"A linear gets an input of shape {tuple(x.shape)} in a batch of {self.batch_size} rows: it works on "
                "tokens of several rows (sorted among experts, flattened, or with the batch not in front), which "
                "cannot be told apart. Run the rows of each adapter by themselves, with `activate(name)`."
            )
        key = (signature, size, x.device)
        found = self._steps.get(key)
        if found is None:
            self.check_batch(size)
            with torch.inference_mode(False):  # forwards under autograd will use them, too
                found = self._steps[key] = self._plan(self.members(signature), size, x.device)
        return found

    def _plan(self, members: tuple[_Member, ...], size: int, device: torch.device) -> list[_Step]:
        each = size // len(self._rows)
        steps: list[tuple[_Member, list[list[int]], int]] = []
        start = 0
        for member in members:
            rows = [i * each + k for i, name in enumerate(self._rows) if name == member.name for k in range(each)]
            before = steps[-1] if steps else None
            if not rows:
                pass
            elif (
                before is not None
                and member.rank is not None
                and before[0][1:] == member[1:]
                and len(before[1][0]) == len(rows)
                and before[2] + len(before[1]) * member.rank == start
            ):
                before[1].append(rows)
            else:
                steps.append((member, [rows], start))
            start += member.rank or 0
        planned = []
        for first, groups, start in steps:
            order = [row for rows in groups for row in rows]
            rows_of = None if order == [*range(size)] else torch.tensor(order, device=device)
            planned.append(_Step(first, len(groups), start, rows_of))
        return planned


class RoutedLinear(AdaptedLinear):
    """A frozen linear with the updates of several adapters, each for the rows of a batch that name it.

    The updates' parameters are not its own: they belong to whoever has the adapters.

    Args:
        layers: The linear with each adapter, by the adapters' names; of one base.
        routing: Which adapter each row is for.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], routing: Routing) -> None:
        FactorLayer.__init__(self)
        first = next(iter(layers.values()))
        self.shape = first.shape
        self.out_features, self.in_features = first.shape
        self.config = first.config
        self.base_layer = first.base_layer
        self.dropout = nn.Identity()
        self.enabled = True
        self.store = FactorStore()
        self._unmerged_weight = ()
        self.routing = routing
        self.training = first.base_layer.training
        pairs = {name: layer.update for name, layer in layers.items() if isinstance(layer.update, FactorPair)}
        # In tuples, which hide them from `parameters()` and from state dicts.
        self._pair: tuple[Factor, Factor] | None = None
        if pairs:
            self._pair = (
                ConcatenatedFactor([pair.A for pair in pairs.values()]),
                ConcatenatedFactor([pair.B for pair in pairs.values()]),
            )
        self._given = tuple(layers[name].store.for_forward for name in pairs)
        self._others = {name: layer.update for name, layer in layers.items() if name not in pairs}
        ranks = {name: pair.rank for name, pair in pairs.items()}
        members = tuple(
            _Member(name, ranks.get(name), layers[name].scaling, layers[name].config.dropout)
            for name in (*pairs, *self._others)
        )
        self._signature = routing.signature(members)

    @torch.no_grad()
    def join_generated(self) -> int:
        """Use what was generated for good for each adapter's layer, copied together; the bytes, 0 if it is not there.

        The adapters' own may be dropped after it: they are looked up once.
        """
        given, self._given = self._given, ()
        if not given or any(one is None or one.A is None or one.B is None for one in given):
            return 0
        with torch.inference_mode(False):
            A, B = (torch.cat([matrix for one in given if (matrix := getattr(one, n)) is not None]) for n in ("A", "B"))
        self.store.for_forward = ForForward(A, B, given[0].forward)  # type: ignore[union-attr]
        return A.nbytes + B.nbytes

    @property
    @override
    def pair(self) -> tuple[Factor, Factor] | None:
        return self._pair

    @property
    def update(self) -> WeightUpdate:  # type: ignore[override]
        """There is none that all rows have in common.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Rows of different adapters are active on this model, so that there is no one update of a weight. Activate "
            "one adapter, or a sum of some, first: `adapters.activate(name)`."
        )

    @override
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    @override
    def wanted_dtype(self) -> torch.dtype | None:
        pair = self._pair
        if not self.enabled or not self.fused or pair is None or in_transform():
            return None
        weight = self.weight
        is_narrow = not weight.is_floating_point() or weight.dtype.itemsize < 2  # a quantized one says nothing of x
        return pair[0].own_dtype if is_narrow else compute_dtype(weight)

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(rows, ..., in_features)``.
            args: Further arguments for the base layer alone.
            kwargs: The same by name.

        Returns:
            ``(rows, ..., out_features)``, in the dtype the base layer gives.

        Raises:
            ValueError: The rows are not the batch's.
        """
        base: nn.Module = self._modules["base_layer"]  # type: ignore[assignment]
        steps = self.routing.steps(self._signature, x) if self.enabled else []
        if not steps:
            output: Tensor = base(x, *args, **kwargs)
            return output
        is_plain = not self.fused or in_transform()
        # Hundreds of layers come here for each token, and a module's call is slow.
        is_own = not (is_plain or args or kwargs or torch.is_grad_enabled()) and type(base) is nn.Linear
        own = fusable(base, x) if is_own else None
        output = base(x, *args, **kwargs) if own is None else F.linear(x, *own)
        dtype = compute_dtype(x if own is None else own[0])
        if self._pair is not None:
            a, b = self._pair
            A, B = (a(plain=True), b(plain=True)) if is_plain else self.store.matrices(a, b, dtype)
            if A.dtype != dtype:
                A, B = A.to(dtype), B.to(dtype)
        rows = x.view(x.shape[0], -1, x.shape[-1]) if x.is_contiguous() else x.reshape(x.shape[0], -1, x.shape[-1])
        result = output.view(x.shape[0], -1, output.shape[-1])
        for step in steps:
            (_, rank, scaling, dropout), groups, start = step.member, step.groups, step.start
            picked = rows if step.rows is None else rows.index_select(0, step.rows)
            if dropout and self.training:
                picked = F.dropout(picked, dropout)
            if picked.dtype != dtype:
                picked = picked.to(dtype)
            if rank is None:
                added = F.linear(picked, self._others[step.member.name]().to(dtype))
            else:
                stop = start + groups * rank
                few_A, few_B = (A, B) if stop - start == len(A) else (A[start:stop], B[start:stop])
                grouped = picked if groups == len(picked) else picked.view(groups, -1, self.in_features)
                h = grouped @ few_A.view(groups, rank, -1).mT
                if step.rows is None and own is not None and result.dtype == dtype:  # nobody else has a part in it
                    result.view(groups, -1, self.out_features).baddbmm_(h, few_B.view(groups, rank, -1), alpha=scaling)
                    continue
                added = (scaling * h) @ few_B.view(groups, rank, -1)
            added = added.view(len(picked), -1, self.out_features).to(result.dtype)
            if own is not None and step.rows is not None:
                result.index_add_(0, step.rows, added)
            else:
                result = result + added if step.rows is None else result.index_add(0, step.rows, added)
        return result.view(output.shape)

    @override
    def extra_repr(self) -> str:
        return f"adapters={[member.name for member in self.routing.members(self._signature)]}"
