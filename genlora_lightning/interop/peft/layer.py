"""Adapt a linear of a PEFT model: several adapters, switched, merged and taken out as PEFT wants it.

Shapes: R rank, I in_features, O out_features; ``...`` any leading dimensions (batch, tokens).
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.adapters.autograd import in_transform
from genlora_lightning.adapters.base import Factor, MatrixShape
from genlora_lightning.interop.peft.config import GenLoraConfig
from genlora_lightning.layers.factors import FactorLayer, FactorStore
from genlora_lightning.layers.fused import adapted_linear, compute_dtype, fusable
from genlora_lightning.layers.linear import AdaptedLinear, is_conv1d


class GenLoraLinear(FactorLayer, BaseTunerLayer):  # type: ignore[misc]  # PEFT's classes are untyped
    r"""A frozen linear with GenLoRA adapters of PEFT.

    .. math:: y = W x + b + \sum_i s_i \, B_i (A_i \, \mathrm{dropout}_i(x))

    over the active adapters i. With one of them and an ordinary base it is computed as in a model that PEFT knows
    nothing of: as one function, of matrices that are generated for all layers at once.

    Args:
        base_layer: The ``nn.Linear``, transformers ``Conv1D`` or quantized linear, or another layer of PEFT around one.
        adapter_name: The first adapter.
        config: Its configuration.
        kwargs: What PEFT needs to know of the quantization.
    """

    # PEFT's "all-linear" knows adapted linears by "Linear" in the name of their class, and their parts by these.
    adapter_layer_names = ("genlora_A", "genlora_B")
    other_param_names = ("r", "scaling", "genlora_dropout")
    # What is used of PEFT's class.
    active_adapters: list[str]
    get_base_layer: Any
    get_base_weight: Any
    set_base_weight: Any
    set_adapter: Any
    _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: GenLoraConfig, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.store = FactorStore()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.genlora_dropout = nn.ModuleDict({})
        self.genlora_A = nn.ModuleDict({})
        self.genlora_B = nn.ModuleDict({})
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        shape = AdaptedLinear.matrix_shape(base)
        self.shape = MatrixShape(base.out_features, base.in_features) if shape is None else shape
        self.out_features, self.in_features = self.shape
        self.is_transposed = is_conv1d(base)
        self.quantization_backend = resolve_quantization_backend(base, **kwargs)
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: GenLoraConfig, **kwargs: Any) -> None:
        """Add an adapter, or make it anew.

        Args:
            adapter_name: Its name.
            config: Its configuration.
            kwargs: Of other kinds; not used.

        Raises:
            ValueError: The configuration does not fit the matrix.
        """
        own = config.generation()
        own.check_shape(self.shape, f"a linear of {self.in_features} inputs and {self.out_features} outputs")
        pair = own.make(self.shape)
        if not config.init_weights:
            B: Any = pair.B
            B.zero_start = None
            B.reset_parameters()
        for factor in (pair.A, pair.B):
            factor.hand_over()
        self.r[adapter_name] = own.rank
        self.scaling[adapter_name] = pair.scaling
        self.genlora_dropout[adapter_name] = nn.Dropout(own.dropout) if own.dropout else nn.Identity()
        self.genlora_A[adapter_name] = pair.A
        self.genlora_B[adapter_name] = pair.B
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # -- what is generated --------------------------------------------------------------------------------------------

    def _acting(self) -> list[str]:
        """The adapters that a forward adds to what the base gives."""
        if self._disable_adapters or self.merged_adapters:
            return []
        # Asked of hundreds of layers in each forward, and a module's own lookup is slow.
        own: Any = self._modules["genlora_A"]
        return [name for name in self.active_adapters if name in own._modules]

    def _factors_of(self, name: str) -> tuple[Factor, Factor]:
        A, B = cast("Any", self._modules["genlora_A"]), cast("Any", self._modules["genlora_B"])
        return A._modules[name], B._modules[name]

    @property
    @override
    def pair(self) -> tuple[Factor, Factor] | None:
        acting = self._acting()
        return self._factors_of(acting[0]) if len(acting) == 1 else None

    @override
    def wanted_dtype(self) -> torch.dtype | None:
        pair = self.pair
        if not self.fused or pair is None or in_transform():
            return None
        base: Any = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        weight = self.get_base_layer().weight if weight is None else weight
        is_narrow = not weight.is_floating_point() or weight.dtype.itemsize < 2  # a quantized one says nothing of x
        return pair[0].own_dtype if is_narrow else compute_dtype(weight)

    def _matrices(self, name: str, dtype: torch.dtype, is_alone: bool) -> tuple[Tensor, Tensor]:
        """A ``(R, I)``, and B transposed ``(R, O)``, of one of the adapters that act, or of the one that does."""
        a, b = self._factors_of(name)
        if not self.fused or in_transform():
            return a(plain=True).to(dtype), b(plain=True).to(dtype)
        return self.store.matrices(a, b, dtype) if is_alone else (a(dtype=dtype), b(dtype=dtype))

    # -- the forward --------------------------------------------------------------------------------------------------

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(..., I)``.
            args: Further arguments for the base layer alone.
            kwargs: The same by name.

        Returns:
            ``(..., O)``, in x's dtype; under autocast in that which the base gives.
        """
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        acting = self._acting()
        base: Any = self._modules["base_layer"]
        if len(acting) == 1 and self.fused and not args and not kwargs and not in_transform():
            name = acting[0]
            is_plain = type(base) is nn.Linear or (type(base).__name__ == "Conv1D" and self.is_transposed)
            own = fusable(base, x) if is_plain else None
            if own is not None:
                dtype = compute_dtype(own[0])
                dropout: Any = self._modules["genlora_dropout"]._modules[name]  # type: ignore[union-attr]
                return adapted_linear(
                    x,
                    *own,
                    *self._matrices(name, dtype, True),
                    scaling=self.scaling[name],
                    dropout=dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0,
                    transposed=self.is_transposed,
                    dtype=dtype,
                )
        result: Tensor = base(x, *args, **kwargs)
        if not acting:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        dtype = compute_dtype(x)
        for name in acting:
            # The small A and B take x's dtype, never x theirs: a copy of x would be kept for the backward.
            A, B = self._matrices(name, dtype, len(acting) == 1)
            h = self.scaling[name] * F.linear(self.genlora_dropout[name](x), A)
            result = result + F.linear(h, B.T).to(result.dtype)
        return result

    # -- merging ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Compute an adapter's ΔW, laid out as the base stores its weight, in the adapter's dtype."""
        a, b = self._factors_of(adapter)
        dtype = torch.promote_types(a.own_dtype, torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            delta: Tensor = self.scaling[adapter] * (b(dtype=dtype).T @ a(dtype=dtype))
        return (delta.T if self.is_transposed else delta).to(a.own_dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base's weight, computed in float32 and rounded once.

        Args:
            safe_merge: Refuse a weight that is not finite.
            adapter_names: Which; the active ones if ``None``.

        Raises:
            ValueError: With ``safe_merge``; then this layer is as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.genlora_A:
                self._add(name, 1.0, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what was merged; the weight is as before to rounding."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1.0)

    @torch.no_grad()
    def _add(self, name: str, sign: float, checked: bool = False) -> None:
        weight = self.get_base_weight()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.to(dtype) + sign * self.get_delta_weight(name).to(weight.device, dtype)
        merged = merged.to(weight.dtype)
        if checked and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        self.set_base_weight(merged)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can make a LoRA of it: exactly, at the adapter's rank."""
        return True

    def __repr__(self) -> str:
        return "genlora." + super().__repr__()

    @override
    def extra_repr(self) -> str:
        return str(quantization_extra_repr(self))
