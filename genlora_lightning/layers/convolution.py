"""Adapt a convolution: the frozen one plus a convolution with A and one of a single point with B.

Shapes: I in_channels, O out_channels, G groups, K points of the kernel, R rank.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import override

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.layers.by_name import AdaptedByName
from genlora_lightning.layers.swapped import call_with

_OF_POINTS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_PLAIN = {(cls.forward, cls._conv_forward) for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


class AdaptedConv(AdaptedByName):
    r"""A frozen convolution with an update of its weight, as a matrix ``W (O, I / G · K)``.

    .. math::
        y = W * x + b + s \, B (A * \mathrm{dropout}(x))

    where A, ``(rank, I · K)``, is a kernel of ``rank`` channels with the stride, padding and dilation of the base. With
    groups ΔW is formed and convolved with. A class with a forward of its own (standardised weights, padding by the
    input's size) is called with ``W + ΔW`` in the place of W; dropout is not applied then.
    """

    noun = "convolution"

    @classmethod
    @override
    def matrix_shape(cls, module: nn.Module) -> MatrixShape | None:
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, _ConvTransposeNd)):
            return None
        return MatrixShape(module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size))

    @classmethod
    @override
    def obstacle(cls, module: nn.Module) -> str | None:
        if isinstance(module, _ConvTransposeNd):
            return "transposed convolutions are no site; name it in `modules_to_train` to train it in full"
        if has_own_forward(module) and "weight" not in module._parameters:
            return f"the forward of {type(module).__name__} is its own, and its weight is computed from others"
        return None

    @override
    def to_stored(self, delta: Tensor) -> Tensor:
        base = self.base_layer
        assert isinstance(base, _ConvNd)
        return delta.reshape(-1, base.in_channels // base.groups, *base.kernel_size)

    @property
    @override
    def forms_delta(self) -> bool:
        base = self.base_layer
        assert isinstance(base, _ConvNd)
        return super().forms_delta or base.groups != 1 or has_own_forward(base)

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the adapted layer.

        Args:
            x: ``(batch, I, …)`` or ``(I, …)``.
            args: Further arguments for a base layer whose class takes them.
            kwargs: The same by name.

        Returns:
            What the base layer gives, with the update.
        """
        base = self.base_layer
        if not self.is_active:
            output: Tensor = base(x, *args, **kwargs)
            return output
        if has_own_forward(base):
            weight = self.weight
            changed = (weight + self.masked(self.to_stored(self.update()))).to(weight.dtype)
            return call_with(base, "weight", changed, base, (x, *args), kwargs)  # type: ignore[no-any-return]
        assert isinstance(base, _ConvNd)
        output = base(x)
        x, dtype = self.dropout(x), self.factor_dtype()
        pair = self.matrices(dtype)
        if pair is None:
            return output + base._conv_forward(x, self.masked(self.to_stored(self.update())).to(dtype), None)
        A, B = pair
        h = base._conv_forward(x, self.to_stored(A), None)
        points = B.T.reshape(*B.T.shape, *[1] * len(base.kernel_size))
        return output + _OF_POINTS[points.ndim](self.update.scaling * h, points)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a convolution computes in another way than torch's own ones."""
    own = type(module).forward, getattr(type(module), "_conv_forward", None)
    return own not in _PLAIN or "forward" in vars(module)
