"""Add adapters into the base weights and take them out again, with the drift that rounding brings to each layer.

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from genlora_lightning.errors import MergeReadWeightWarning, MergeRoundingWarning
from genlora_lightning.injection.inject import require_adapters
from genlora_lightning.injection.uncalled import read_layers
from genlora_lightning.injection.widening import restore_dtypes, widen
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.text import text_table

_LOST = 0.1
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class MergeRow:
    """What rounding did to the update of one linear.

    Args:
        module: Its name.
        dtype: Of the merged weight.
        relative_error: ``‖(W_merged − W) − ΔW‖ / ‖ΔW‖`` (Frobenius norms); 0 for an update that is zero.
        unchanged: Share of the weights that the merge left as they were.
    """

    module: str
    dtype: torch.dtype
    relative_error: float
    unchanged: float


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The drift of every merged linear; ``print`` it for a table.

    Args:
        rows: The linears.
        folder: Where the merged model was written, if it was.
        copied: Names of the tokenizer's files that were copied beside it.
    """

    rows: tuple[MergeRow, ...]
    folder: Path | None = None
    copied: tuple[str, ...] = ()

    @property
    def worst(self) -> MergeRow:
        """The linear with the largest relative error."""
        return max(self.rows, key=lambda row: row.relative_error)

    def __str__(self) -> str:
        rows = [
            (row.module, str(row.dtype).removeprefix("torch."), f"{row.relative_error:.2e}", f"{row.unchanged:.1%}")
            for row in self.rows
        ]
        text = [text_table(("module", "dtype", "relative error of ΔW", "unchanged weights"), rows)]
        text.append(f"Merged {len(rows)} layers; the largest error is {self.worst.relative_error:.2e}.")
        if self.folder is not None:
            tokenizer = f", with the tokenizer ({', '.join(self.copied)})" if self.copied else ", without a tokenizer"
            text.append(f"The merged model is in {self.folder}{tokenizer}.")
        return "\n".join(text)


@torch.no_grad()
def merge_adapters(model: nn.Module, *, dtype: torch.dtype | None = None) -> MergeReport:
    """Add each update into its base weight; the outputs stay, to rounding.

    Each sum is computed in float32 and rounded once to the weight's dtype. What that rounding lost is in the report:
    an update that is much smaller than the weights is lost in bfloat16's 8 bits.

    Args:
        model: A model with adapters. A linear that is merged already stays so and is reported again.
        dtype: Cast the whole model to this dtype, so that the sums need no rounding to fewer bits; it must hold the
            present values exactly (``torch.float32`` for a bfloat16 base). :func:`unmerge_adapters` casts back.

    Returns:
        The drift of each linear.

    Raises:
        ValueError: The model has no adapters, a weight is not an ordinary matrix (quantized or sharded), an update or
            a sum is not finite (the message names the layer), or ``dtype`` is too narrow. Then nothing is merged.

    Warns:
        MergeReadWeightWarning: A module computes with the weight of an adapted layer beside calling it.
        MergeRoundingWarning: A linear lost more than 10 % of its update.
    """
    layers = require_adapters(model)
    warn_of_reads(model)
    done: list[AdaptedLayer] = []
    tied: dict[Hashable, AdaptedLayer] = {}
    rows = []
    if dtype is not None:
        widen(model, dtype)
    try:
        for name, layer in layers.items():
            if dtype is not None:
                layer.unmerge()  # a sum that was rounded to fewer bits is computed anew
            if not layer.merged:
                with naming(name):
                    layer.merge(dtype)
                done.append(layer)
            if (first := tied.setdefault(layer.merged_with, layer)) is not layer:
                layer.share_merged(first)
            rows.append(measure_drift(name, layer, layer.weight))
    except BaseException:
        for layer in done if dtype is None else layers.values():
            layer.unmerge()
        if dtype is not None:
            restore_dtypes(model)
        raise
    report = MergeReport(rows=tuple(rows))
    warn_of_losses(report)
    return report


def unmerge_adapters(model: nn.Module) -> None:
    """Put the original weights back, bit for bit, and every dtype, after :func:`merge_adapters`."""
    for layer in require_adapters(model).values():
        layer.unmerge()
    restore_dtypes(model)


@contextmanager
def adapters_merged(model: nn.Module, *, dtype: torch.dtype | None = None) -> Iterator[MergeReport]:
    """Context manager in which the adapters are merged, so that a forward costs what the base's does.

    For generating a lot: it pays where forwards are many, and takes a second copy of the adapted weights. In 16 bits
    the merged weights are rounded, and the outputs with them; without it nothing is rounded, and it costs little more.

    Args:
        model: A model with adapters, none of them merged.
        dtype: As :func:`merge_adapters`.

    Yields:
        The drift of each linear.

    Raises:
        ValueError: As :func:`merge_adapters`, or an adapter is merged already.
    """
    merged = [name for name, layer in require_adapters(model).items() if layer.merged]
    if merged:
        raise ValueError(f"{len(merged)} adapters are merged already ({merged[0]}): call `unmerge_adapters(model)`.")
    report = merge_adapters(model, dtype=dtype)
    try:
        yield report
    finally:
        unmerge_adapters(model)


@torch.no_grad()
def measure_drift(name: str, layer: AdaptedLayer, merged: Tensor) -> MergeRow:
    """Measure what rounding does to the update of a layer, before it is merged.

    Args:
        name: The layer's.
        layer: The layer.
        merged: Its merged weight.
    """
    weight, delta = layer.base_weight.to(merged.device), layer.stored_delta()
    lost = total = 0.0
    unchanged = 0
    step = max(1, _CHUNK // weight[0].numel())  # in parts, because float64 copies of a large weight are large
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        exact, before, after = delta[rows].double(), weight[rows].double(), merged[rows].double()
        lost += float((after - before - exact).square().sum())
        total += float(exact.square().sum())
        unchanged += int((after == before).sum())
    error = (lost / total) ** 0.5 if total > 0 else 0.0
    return MergeRow(module=name, dtype=merged.dtype, relative_error=error, unchanged=unchanged / weight.numel())


def warn_of_reads(model: nn.Module) -> None:
    """Warn of layers whose weight is computed with where their update does not act, before it is merged."""
    layers = require_adapters(model)
    read = {name: cls for name, cls in read_layers(model).items() if not layers[name].merged}
    if read:
        name, cls = next(iter(read.items()))
        others = f" (and so with {len(read) - 1} other layers)" if len(read) > 1 else ""
        warnings.warn(
            f"{cls} computes with the weight of {name} beside calling it{others}. The update acts where the layer is "
            "called, and the merged weight acts where it is read, too: if a forward does both, the merged model gives "
            "other outputs than the trained one. Compare the two. If they differ, keep the adapter separate (or export "
            f"it as a LoRA), or train with {name} in `exclude_modules`.",
            MergeReadWeightWarning,
            stacklevel=4,
        )


def warn_of_losses(report: MergeReport) -> None:
    """Warn of layers that lost more than 10 % of their update."""
    lossy = [row for row in report.rows if row.relative_error > _LOST]
    if lossy:
        worst = report.worst
        warnings.warn(
            f"Rounding to {str(worst.dtype).removeprefix('torch.')} changed the update of {len(lossy)} of "
            f"{len(report.rows)} layers by more than {_LOST:.0%} ({worst.module}: {worst.relative_error:.0%}). Merge "
            "with `dtype=torch.float32`, or keep the adapter separate.",
            MergeRoundingWarning,
            stacklevel=4,
        )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Context manager that puts a layer's name before the message of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
