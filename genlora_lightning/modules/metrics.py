"""Average metrics over tokens or examples, not over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torchmetrics
from torch import Tensor
from typing_extensions import override


class _StaysInFloat32(torchmetrics.Metric):
    """A metric whose states are not cast with the module it belongs to (``precision="bf16-true"``).

    In bfloat16 a count would stop growing at 256.
    """

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), exclude_state)


class R2(torchmetrics.R2Score, _StaysInFloat32):
    """Coefficient of determination, the mean of several values'; NaN for fewer than two examples, not an error."""

    @override
    def compute(self) -> Tensor:
        return super().compute() if self.total >= 2 else torch.full_like(self.sum_error, torch.nan).mean()


class WeightedMean(_StaysInFloat32):
    """Mean over all tokens (or examples) of all batches and ranks, ``Σ sum / Σ count``.

    torchmetrics' own ``MeanMetric`` either drops NaN, which a mean loss must show, or (``nan_strategy="disable"``,
    release 1.9) drops the weights.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("total", "count"):
            self.add_state(state, default=torch.tensor(0.0, dtype=torch.float32), dist_reduce_fx="sum")

    @override
    def update(self, total: Tensor, count: Tensor | int) -> None:
        """Add a batch.

        Args:
            total: Sum of the batch's values; a scalar.
            count: How many values it is the sum of.
        """
        # Not in place: after a validation the states are inference tensors, which the next run must not write to.
        self.total = self.total + total.float()
        self.count = self.count + count

    @override
    def compute(self) -> Tensor:
        return self.total / self.count


class Perplexity(WeightedMean):
    """Exponential of the mean loss per token.

    torchmetrics has a perplexity of its own, which takes the full logits and repeats the log-softmax over the whole
    vocabulary. The loss is known already, and weighting it by tokens gives the same number.
    """

    @override
    def compute(self) -> Tensor:
        return torch.exp(super().compute())
