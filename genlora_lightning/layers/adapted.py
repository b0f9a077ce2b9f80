"""Hold a frozen layer and the update of its weight: switch it on and off, merge it and take it out again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from genlora_lightning.adapters.autograd import in_transform
from genlora_lightning.adapters.base import Factor, FactorPair, MatrixShape, WeightUpdate
from genlora_lightning.adapters.chosen_rows import spread_over
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.low_rank import RankKind, effective_rank
from genlora_lightning.layers.factors import FactorLayer, FactorStore
from genlora_lightning.layers.fused import compute_dtype
from genlora_lightning.layers.obstacles import obstacle_in_hooks, obstacle_in_weight
from genlora_lightning.layers.pretrained import save_by_base_names


class AdaptedLayer(FactorLayer):
    r"""A frozen layer and the update :math:`\Delta W` of its weight, of whatever kind.

    This is a site: where a matrix stands in a module. A subclass says which modules it adapts, how their parameter
    stores the matrix, and what a forward is. The kind of the update is the configuration's matter.

    Args:
        base_layer: The layer to adapt. It is kept, not copied, and frozen.
        config: The kind, its rank, scaling, dropout, …
        generator: Random number generator for the initial values.

    Raises:
        TypeError: ``base_layer`` is no layer of this site.
        ValueError: The configuration does not fit the matrix.
    """

    #: Whether the layer stands where a module of the base stood, which it holds as ``base_layer``.
    is_place: ClassVar[bool] = True
    #: Whether ``"all-linear"`` leaves the site out, so that only what a configuration names is adapted.
    named_only: ClassVar[bool] = False
    #: What a layer of the site is called in files.
    noun: ClassVar[str] = "linear"
    #: The base layer's parameter that is adapted.
    parameter: ClassVar[str] = "weight"

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        shape = self.matrix_shape(base_layer)
        if shape is None:
            raise TypeError(f"{type(self).__name__} cannot adapt a {type(base_layer).__name__}.")
        self.shape = shape
        self.out_features, self.in_features = shape
        self.config = config
        self.base_layer = base_layer.requires_grad_(False)
        self.update: WeightUpdate = self._make_update(config, generator)
        self.set_dropout(config)
        self.enabled = True
        self.store = FactorStore()
        self.train(base_layer.training)  # dropout follows the mode of the model it is put into
        # The weight as it was before `merge`, kept out of the module's parameters so that no state dict holds it.
        self._unmerged_weight: tuple[nn.Parameter, ...] = ()
        save_by_base_names(is_place)

    def _make_update(self, config: AdapterConfig, generator: torch.Generator | None) -> WeightUpdate:
        update = config.make(config.chosen(self.shape), device=self.weight.device, generator=generator)
        return spread_over(update, config.rows, self.shape) if config.rows else update

    # -- what a site says ---------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def matrix_shape(cls, module: nn.Module) -> MatrixShape | None:
        """The sizes of the matrix of a module that can be adapted; ``None`` for any other module."""

    @classmethod
    def obstacle(cls, module: nn.Module) -> str | None:
        """Why a module of this site cannot be adapted all the same; ``None`` if it can."""
        return None

    @abstractmethod
    def to_stored(self, delta: Tensor) -> Tensor:
        """Lay out ``ΔW (out_features, in_features)`` as the base layer stores its weight."""

    def computes_with(self, weight: Tensor) -> bool:
        """Whether the base layer, with another weight, would give what merging takes for granted."""
        return True

    # -- the update ---------------------------------------------------------------------------------------------------

    @property
    @override
    def pair(self) -> tuple[Factor, Factor] | None:
        # Asked of hundreds of layers in each forward, and a module's own lookup is slow.
        update = self._modules["update"]
        if not isinstance(update, FactorPair):
            return None
        return update._modules["A"], update._modules["B"]  # type: ignore[return-value]

    def factor_dtype(self) -> torch.dtype:
        """The dtype in which a forward computes with A and B: that in which the base layer does with its weight."""
        own: Any = self._modules["base_layer"]._parameters.get(self.parameter)  # type: ignore[union-attr]
        weight = self.weight if own is None else own
        if weight.is_floating_point() and weight.dtype.itemsize >= 2:
            return compute_dtype(weight)
        pair = self.pair  # a quantized weight says nothing of the input
        return torch.float32 if pair is None else pair[0].own_dtype

    @property
    def forms_delta(self) -> bool:
        """Whether a forward needs ΔW itself, also of a kind with two factors."""
        return self.config.keep_zeros

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The active rows of ``A (rank, in_features)`` and ``B (rank, out_features)``; ``None`` if ΔW is formed."""
        pair = self.pair
        if pair is None or self.forms_delta:
            return None
        if not self.fused or in_transform():
            A, B = pair[0](plain=True).to(dtype), pair[1](plain=True).to(dtype)
        else:
            A, B = self.store.matrices(*pair, dtype)
        return self.update.active_rows(A, B)  # type: ignore[operator, no-any-return]

    @override
    def wanted_dtype(self) -> torch.dtype | None:
        pair = self.pair
        if not self.is_active or not self.fused or pair is None or self.update.is_stored or in_transform():
            return None
        return None if self.forms_delta else self.factor_dtype()

    @property
    def scaling(self) -> float:
        """The factor s in ``ΔW = s · B @ A``."""
        return self.update.scaling

    @property
    def active_config(self) -> AdapterConfig:
        """The configuration of what the layer computes with at present: that of the active rows of A and B."""
        update = self.update
        rank = update.active_rank if isinstance(update, FactorPair) else None
        return self.config if rank is None else self.config.of_first_rows(rank)

    @property
    def weight(self) -> Tensor:
        """The base layer's parameter, for code that reads a linear's dtype or device; merged if the layer is merged."""
        weight = getattr(self.base_layer, self.parameter)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def weight_place(self) -> tuple[nn.Module, str]:
        """The module that has :attr:`weight` for a parameter, and the name of it there."""
        return self.base_layer, self.parameter

    @property
    def merged(self) -> bool:
        """Whether the update is added into the base layer's weight at present."""
        return bool(self._unmerged_weight)

    @property
    def is_active(self) -> bool:
        """Whether a forward adds the update to what the base layer gives."""
        return self.enabled and not self._unmerged_weight

    @property
    def base_weight(self) -> Tensor:
        """The base layer's weight without the update, also while the layer is merged."""
        return self._unmerged_weight[0] if self._unmerged_weight else self.weight

    def set_dropout(self, config: AdapterConfig) -> None:
        """Take over a configuration that differs in its dropout at most."""
        self.config = config
        self.dropout = nn.Dropout(config.dropout).train(self.training) if config.dropout else nn.Identity()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in this layer; fixed ones are among them."""
        return {f"update.{name}": parameter for name, parameter in self.update.named_parameters()}

    def factors(self) -> tuple[Tensor, Tensor]:
        """Compute ``A (rank, in_features)`` and ``B (out_features, rank)`` with ``ΔW = scaling · B @ A``."""
        return self.update.factors()

    def delta_weight(self) -> Tensor:
        """Compute the update ``ΔW (out_features, in_features)`` in the parameters' dtype, float32.

        With ``keep_zeros`` it is not masked yet; :meth:`stored_delta` is.
        """
        return self.update.delta_weight()

    def effective_rank(self, kind: RankKind = "entropy") -> float:
        """Measure the effective rank of the update (:func:`~genlora_lightning.adapters.low_rank.effective_rank`)."""
        return effective_rank(*self.factors(), kind=kind)

    @torch.no_grad()
    def acts(self) -> bool:
        """Whether the update is other than the zero that it starts as."""
        if self.pair is not None:
            return all(bool(factor.any()) for factor in self.factors())
        return bool(self.delta_weight().any())

    def stored_delta(self) -> Tensor:
        """Compute what merging adds: the update in the layout of the base layer's weight, masked by its zeros if so."""
        return self.masked(self.to_stored(self.delta_weight()))

    def masked(self, delta: Tensor) -> Tensor:
        """Leave out what an update, in the layout of the base layer's weight, has where that is 0, with ``keep_zeros``.

        The mask is the base's own zeros, as they are stored, and takes no memory of its own between two calls.
        """
        if not self.config.keep_zeros:
            return delta
        # A negative zero is the number that changes no other one when it is added: not even another negative zero.
        return torch.where((self.base_weight != 0).to(delta.device), delta, -0.0)

    # -- merging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The original weight plus the update, as the base layer stores its weight; nothing is changed.

        Args:
            dtype: Of the result; the sum is computed in float32 or better and rounded once. The weight's own if
                ``None``.

        Raises:
            ValueError: The weight is not stored as an ordinary matrix (quantized, sharded, or computed), the layer
                has hooks or computes something else with it, or the update, or the sum in ``dtype``, is not finite.
        """
        weight = self.base_weight
        shape = self.to_stored(torch.empty(self.shape.sizes, device="meta")).shape
        module, name = self.weight_place
        obstacle = obstacle_in_weight(module, weight, shape, name) or obstacle_in_hooks(module)
        if obstacle is not None:
            raise ValueError(f"Cannot merge into this {type(module).__name__}: {obstacle}")
        delta = self.stored_delta()
        merged = self._sum(weight, delta).to(dtype or weight.dtype)
        if not merged.isfinite().all():
            what = "The update" if not delta.isfinite().all() else f"The merged weight in {merged.dtype}"
            raise ValueError(f"{what} holds NaN or infinite values; nothing was merged.")
        if not self.computes_with(merged.to(weight.dtype)):
            raise ValueError(
                f"Cannot merge into this {type(self.base_layer).__name__}: its forward computes something else than "
                "x·Wᵀ + b, and the update acts beside what it gives, not inside of W. Keep the adapter separate, or "
                "export it as a LoRA; nothing was merged."
            )
        return merged

    def _sum(self, weight: Tensor, delta: Tensor) -> Tensor:
        """The weight plus the update, in float32 or better."""
        compute_dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(delta.device, compute_dtype) + delta.to(compute_dtype)

    @property
    def merged_with(self) -> Hashable:
        """What layers have in common that merge into one weight, as those of tied weights may."""
        return id(self)

    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Add the update into the base layer's weight, in float32 with one rounding, and keep the original aside.

        The base layer gets a new parameter; the original one is untouched, so that another module that shares it (a
        tied embedding) keeps what it had, and :meth:`unmerge` restores it bit for bit. Until then memory holds both.
        Merging a merged layer does nothing.

        Args:
            dtype: Of the merged weight; the original's if ``None``. The layer's input must have the same.

        Raises:
            ValueError: As :meth:`merged_weight`; then nothing is merged.
        """
        if self.merged:
            return
        merged = self.merged_weight(dtype)
        original = self.weight
        if not isinstance(original, nn.Parameter):  # a buffer, as `remove_parametrizations` leaves it
            original = nn.Parameter(original, requires_grad=False)
            setattr(self.base_layer, self.parameter, original)
        self._unmerged_weight = (original,)
        setattr(self.base_layer, self.parameter, nn.Parameter(merged, requires_grad=False))

    def share_merged(self, other: AdaptedLayer) -> None:
        """Take the merged weight of a layer that has the same, so that they stay tied."""
        setattr(self.base_layer, self.parameter, other.weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Unmerging a layer that is not merged does nothing."""
        if not self._unmerged_weight:
            return
        (weight,) = self._unmerged_weight
        current = self.weight
        if (weight.device, weight.dtype) != (current.device, current.dtype):  # moved or cast while merged
            weight = nn.Parameter(weight.to(current.device, current.dtype), requires_grad=weight.requires_grad)
        setattr(self.base_layer, self.parameter, weight)
        self._unmerged_weight = ()

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # By the names that they have in a base without adapters, too.
        base = self.base_layer
        for name in [name for tensors in (base.named_parameters(), base.named_buffers()) for name, _ in tensors]:
            if f"{prefix}{name}" in state_dict:
                state_dict.setdefault(f"{prefix}base_layer.{name}", state_dict.pop(f"{prefix}{name}"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        save_by_base_names(is_place)  # a pickle may be loaded where nothing was adapted yet

    @override
    def extra_repr(self) -> str:
        return f"scaling={self.scaling:.4g}, merged={self.merged}"


def is_place(module: nn.Module) -> bool:
    """Whether a module of ours stands where a module of the base stood, which it holds as ``base_layer``."""
    return getattr(type(module), "is_place", False)
