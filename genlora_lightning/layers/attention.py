"""Adapt torch's attention: its projections of queries, keys and values lie in one parameter, which it never calls.

Shapes: E embed_dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.layers.by_name import AdaptedByName
from genlora_lightning.layers.swapped import call_with


class AdaptedAttention(AdaptedByName):
    r"""A frozen ``nn.MultiheadAttention`` with an update of its ``in_proj_weight (3 E, E)``: queries, keys and values.

    A forward is the base's with :math:`W + \Delta W` in the place of W, also in the fused kernel of evaluation. The
    output's projection stays with the base, and dropout is not applied to the update.
    """

    noun = "attention"
    parameter = "in_proj_weight"

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module) -> MatrixShape | None:
        if not isinstance(module, nn.MultiheadAttention):
            return None
        return MatrixShape(3 * module.embed_dim, module.embed_dim)

    @classmethod
    @override
    def obstacle(cls, module: nn.Module) -> str | None:
        assert isinstance(module, nn.MultiheadAttention)
        if module._parameters.get("in_proj_weight") is None:
            return (
                "its queries, keys and values have parameters of their own (`kdim`, `vdim`), or computed ones; name it "
                "in `modules_to_train` to train it in full"
            )
        return None

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return True  # which torch's transformer layers ask for

    @override
    def to_stored(self, delta: Tensor) -> Tensor:
        return delta

    @override
    def wanted_dtype(self) -> None:
        return None  # ΔW is formed

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the adapted layer to what an ``nn.MultiheadAttention`` takes; what one gives comes back."""
        if not self.is_active:
            return self.base_layer(*args, **kwargs)
        weight = self.weight
        changed = (weight + self.masked(self.update())).to(weight.dtype)
        return call_with(self.base_layer, self.parameter, changed, self.base_layer, args, kwargs)
