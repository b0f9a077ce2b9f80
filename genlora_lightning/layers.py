"""The adapted linear layer: a frozen linear plus a generated low-rank update.

Shapes: R rank, I in_features, O out_features; ``...`` any leading dimensions (batch, tokens).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from genlora_lightning.config import GenLoRAConfig
from genlora_lightning.factors import FactorStore
from genlora_lightning.fused import adapted_linear, can_fuse, compute_dtype
from genlora_lightning.generator import RBFGenerator


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D`` (GPT-2): a linear whose weight is stored as ``(in, out)``."""
    # By name, so that neither transformers nor its torch-dependent pytorch_utils must be imported to adapt an MLP.
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """``(in_features, out_features)`` of a linear that can be adapted; ``None`` for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[0]), int(weight.shape[1])
    return None


class GenLoRALinear(nn.Module):
    r"""A frozen linear layer with a generated low-rank update.

    .. math::
        y = W x + b + s \, B (A \, \mathrm{dropout}(x)), \qquad \Delta W = s \, B A

    A ``(rank, in_features)`` and B ``(out_features, rank)`` come from two :class:`~genlora_lightning.RBFGenerator`, s
    is ``config.scaling_factor``. A new layer gives bit for bit the output of its base layer, because B starts at zero.

    Args:
        base_layer: The ``nn.Linear`` (or transformers ``Conv1D``) to adapt. It is kept, not copied, and frozen.
        config: Rank, groups, centres, scaling, dropout.
        generator: Random number generator for the initial values.

    Raises:
        TypeError: ``base_layer`` is no linear layer.
        ValueError: More groups than features.
    """

    def __init__(self, base_layer: nn.Module, config: GenLoRAConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        shape = linear_shape(base_layer)
        if shape is None:
            raise TypeError(
                f"GenLoRALinear adapts nn.Linear and transformers' Conv1D, got a {type(base_layer).__name__}."
            )
        self.in_features, self.out_features = shape
        self.config = config
        self.scaling = config.scaling_factor
        self.base_layer = base_layer.requires_grad_(False)
        weight = base_layer.weight
        assert isinstance(weight, Tensor)

        def make(num_entries: int, num_latents: int, num_groups: int, table: int, zero_start: bool) -> RBFGenerator:
            return RBFGenerator(
                num_entries,
                rank=config.rank,
                num_latents=num_latents,
                num_groups=num_groups,
                num_centers=config.num_centers,
                width=config.width,
                kernel=config.kernel,
                learn_centers=config.learn_centers,
                learn_widths=config.learn_widths,
                sign_table=table if config.entry_signs else None,
                weight_gain=config.gain,
                zero_start=config.init if zero_start else None,
                device=weight.device,
                generator=generator,
            )

        self.generator_A = make(self.in_features, config.num_latents_a, config.num_groups_a, 0, zero_start=False)
        self.generator_B = make(self.out_features, config.num_latents_b, config.num_groups_b, 1, zero_start=True)
        self.set_dropout(config)
        self.enabled = True
        # Whether functions with backwards of their own compute it; else plain autograd, which they are compared with.
        self.fused = True
        self.store = FactorStore()
        self.train(base_layer.training)  # dropout follows the mode of the model it is put into
        # The weight as it was before `merge`, kept out of the module's parameters so that no state dict holds it.
        self._unmerged_weight: tuple[nn.Parameter, ...] = ()

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that reads a linear's dtype or device; merged if the layer is merged."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

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

    def set_dropout(self, config: GenLoRAConfig) -> None:
        """Take over a configuration that differs in its dropout at most."""
        self.config = config
        self.dropout = nn.Dropout(config.dropout).train(self.training) if config.dropout else nn.Identity()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in this layer; fixed centres and widths are among them."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, generator in (("generator_A", self.generator_A), ("generator_B", self.generator_B))
            for name, parameter in generator.named_parameters()
        }

    def factors(self) -> tuple[Tensor, Tensor]:
        """Generate ``A (rank, in_features)`` and ``B (out_features, rank)`` in float32; ``ΔW = scaling · B @ A``."""
        return self.generator_A(), self.generator_B().T

    def delta_weight(self) -> Tensor:
        """The update ``ΔW = scaling · B @ A (out_features, in_features)``, in float32."""
        A, B = self.factors()
        with torch.autocast(A.device.type, enabled=False):
            return self.scaling * (B @ A)

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the adapted layer.

        Args:
            x: ``(..., in_features)``.
            args: Further arguments for a base layer whose class takes them. They are the base layer's alone: the update
                is ``s B A x`` whatever they are.
            kwargs: The same by name.

        Returns:
            ``(..., out_features)``, in the dtype the base layer gives.
        """
        base = self.base_layer
        if not self.is_active:
            output: Tensor = base(x, *args, **kwargs)
            return output
        if not self.fused:
            return self._plain_forward(x, *args, **kwargs)
        transposed = is_conv1d(base)
        # A class that was derived from these may compute something else.
        is_known = type(base).__name__ == "Conv1D" if transposed else type(base) is nn.Linear
        if is_known and not args and not kwargs and can_fuse(base, x):
            weight = self.weight
            A, B = self.store.matrices(self.generator_A, self.generator_B, self.scaling, compute_dtype(weight))
            rate = self.config.dropout if self.dropout.training else 0.0
            return adapted_linear(x, weight, self.bias, A, B, dropout=rate, transposed=transposed)
        output = base(x, *args, **kwargs)
        A, B = self.store.matrices(self.generator_A, self.generator_B, self.scaling, compute_dtype(x))
        return output + F.linear(F.linear(self.dropout(x), A), B.T)

    def _plain_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The formula, left to autograd: what the other ways are compared with."""
        output: Tensor = self.base_layer(x, *args, **kwargs)
        A, B = self.generator_A(plain=True), self.generator_B(plain=True).T
        # The small A and B take x's dtype, never x theirs: a copy of x in float32 would be kept for the backward.
        A, B = A.to(x.dtype), (self.scaling * B).to(x.dtype)
        return output + F.linear(F.linear(self.dropout(x), A), B)

    def wanted_dtype(self) -> torch.dtype | None:
        """The dtype in which a forward would use A and B here and now; ``None`` if it would not."""
        if not self.is_active or not self.fused:
            return None
        weight = self.weight
        is_narrow = not weight.is_floating_point() or weight.dtype.itemsize < 2  # a quantized one says nothing of x
        return self.generator_A.latent.dtype if is_narrow else compute_dtype(weight)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The original weight plus the update, as the base layer stores its weight; nothing is changed.

        Args:
            dtype: Of the result; the sum is computed in float32 or better and rounded once. The weight's own if
                ``None``.

        Raises:
            ValueError: The weight is not stored as an ordinary matrix (quantized or sharded), or the update, or the
                sum in ``dtype``, is not finite.
        """
        weight = self.base_weight
        delta = self.stored_delta()
        # A quantized or sharded weight may be of a subclass of Tensor that poses as an ordinary matrix.
        is_plain = isinstance(weight, nn.Parameter) and type(weight.data) is Tensor and weight.is_floating_point()
        if not is_plain or weight.shape != delta.shape or weight.dtype.itemsize < 2:
            raise ValueError(
                f"Cannot merge into a {type(self.base_layer).__name__} whose weight is stored as "
                f"{tuple(weight.shape)} {weight.dtype} ({type(weight.data).__name__}); merging needs "
                f"{tuple(delta.shape)} floating point values. "
                "The weight is probably quantized or sharded: load the model unquantized and whole, then merge."
            )
        compute_dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(delta.device, compute_dtype) + delta.to(compute_dtype)
        merged = total.to(dtype or weight.dtype)
        if not merged.isfinite().all():
            what = "The update" if not delta.isfinite().all() else f"The merged weight in {merged.dtype}"
            raise ValueError(f"{what} holds NaN or infinite values; nothing was merged.")
        return merged

    def stored_delta(self) -> Tensor:
        """The update in the layout of the base layer's weight: :meth:`delta_weight`, transposed for a ``Conv1D``."""
        delta = self.delta_weight()
        return delta.T if is_conv1d(self.base_layer) else delta

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
        self._unmerged_weight = (self.base_layer.weight,)  # type: ignore[assignment]
        self.base_layer.weight = nn.Parameter(merged, requires_grad=False)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Unmerging a layer that is not merged does nothing."""
        if not self._unmerged_weight:
            return
        (weight,) = self._unmerged_weight
        current = self.weight
        if (weight.device, weight.dtype) != (current.device, current.dtype):  # moved or cast while merged
            weight = nn.Parameter(weight.to(current.device, current.dtype), requires_grad=weight.requires_grad)
        self.base_layer.weight = weight
        self._unmerged_weight = ()

    @override
    def extra_repr(self) -> str:
        return f"scaling={self.scaling:.4g}, merged={self.merged}"
