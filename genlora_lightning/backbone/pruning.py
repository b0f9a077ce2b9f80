"""Prune a model by Wanda (Sun et al., arXiv 2306.11695): weights that matter least to what their layers give become 0.

Shapes: I in_features, O out_features, T tokens of the calibration batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.adapters.config import ALL_LINEAR
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.fields import check_integer, check_number
from genlora_lightning.injection.names import plain_modules
from genlora_lightning.injection.places import has_adapters
from genlora_lightning.injection.targets import select_targets
from genlora_lightning.layers.linear import is_conv1d
from genlora_lightning.layers.quantized import is_quantized
from genlora_lightning.layers.sites import is_linear, matrix_shape
from genlora_lightning.text import text_table


@dataclass(frozen=True, kw_only=True)
class PrunedRow:
    """One pruned matrix: its layer's name, its sizes, and how many of its values are 0."""

    module: str
    shape: MatrixShape
    zeros: int

    @property
    def size(self) -> int:
        """Number of values."""
        return self.shape.out_features * self.shape.in_features


@dataclass(frozen=True, kw_only=True)
class PruningReport:
    """What :func:`prune_model` did; ``print`` it for a table.

    Args:
        rows: The matrices.
        skipped: Linears that were left alone, with the reason.
        total_parameters: Number of all values of the model; tied ones count once.
    """

    rows: tuple[PrunedRow, ...]
    skipped: dict[str, str]
    total_parameters: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in the pruned matrices."""
        return sum(row.zeros for row in self.rows) / sum(row.size for row in self.rows)

    def __str__(self) -> str:
        rows = [
            (row.module, f"({row.shape.out_features}, {row.shape.in_features})", f"{row.zeros / row.size:.4f}")
            for row in self.rows
        ]
        size, zeros = sum(row.size for row in self.rows), sum(row.zeros for row in self.rows)
        return "\n".join(
            [
                text_table(("module", "shape (out, in)", "sparsity"), rows, left=2),
                *(f"left alone: {name} ({reason})" for name, reason in self.skipped.items()),
                f"{zeros:,} of {size:,} values in {len(rows)} matrices are 0 ({self.sparsity:.2%}), which is "
                f"{zeros / self.total_parameters:.1%} of the model's {self.total_parameters:,}.",
            ]
        )


@dataclass
class _Calibration:
    """Prunes each matrix when a calibration forward comes to it.

    Args:
        counted: Which tokens count, flat ``(T)``; all if ``None``.
        sparsity: As :func:`prune_model`.
        pattern: As there.
        done: The matrices that were pruned, by the names of their layers, and what stood where there is 0 now.
    """

    counted: Tensor | None
    sparsity: float
    pattern: tuple[int, int] | None
    done: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def prune(self, name: str, layer: nn.Module, x: Tensor) -> None:
        """Prune the matrix of a layer that is about to compute, if it has not been before."""
        if name in self.done or not x.numel():
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.counted is not None and len(self.counted) == len(rows):
            rows = rows[self.counted.to(rows.device)]
        norms = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
        if not norms.isfinite().all():
            raise ValueError(f"The inputs of {name} in the calibration batch are not finite; nothing was pruned.")
        weight: Any = layer.weight
        matrix = weight.data.T if is_conv1d(layer) else weight.data
        group, removed = self._removed_of(matrix.shape[1])
        places = lowest(matrix.float().abs() * norms.to(matrix.device), removed, group)
        self.done[name] = matrix, matrix[places | (matrix == 0)]
        matrix[places] = 0

    def _removed_of(self, in_features: int) -> tuple[int, int]:
        if self.pattern is None:
            return in_features, int(self.sparsity * in_features)
        kept, group = self.pattern
        return group, group - kept

    def undo(self) -> None:
        """Put back what was removed."""
        for matrix, values in self.done.values():
            matrix[matrix == 0] = values


@torch.no_grad()
def prune_model(
    model: nn.Module,
    batch: Mapping[str, Any],
    sparsity: float = 0.5,
    *,
    pattern: tuple[int, int] | None = None,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    exclude_modules: Iterable[str] = (),
) -> PruningReport:
    r"""Set the weights with the lowest scores to 0, in place, in each row of each matrix.

    .. math:: s_{ij} = |W_{ij}| \, \lVert x_j \rVert_2

    with :math:`x_j (T)` the j-th input of the layer over all tokens of the calibration batch. The batch goes through
    the model once, and a matrix is pruned when the forward comes to it, from the inputs that it gets there: those that
    the matrices before it give as they are then, pruned. (Wanda's own code scores the matrices of one block before any
    of them is pruned, and goes from block to block.) Nothing is trained. Weights that are 0 already go first.

    Args:
        model: A model without adapters. It is called in evaluation mode; a transformers model without its head.
        batch: What its forward takes, by name: all calibration examples at once. Tokens that have a 0 in its
            ``attention_mask`` do not count. ``labels`` are left out.
        sparsity: The share of each row to set to 0, rounded down to whole weights.
        pattern: ``(n, m)``: n of each m neighbours in a row stay at most, such as ``(2, 4)``, which some GPUs compute
            faster; it takes the place of ``sparsity``.
        target_modules: Linears to prune, as an adapter's configuration names them; ``"all-linear"`` leaves out output
            heads. Embeddings are not pruned.
        exclude_modules: Names, or last parts of names, of linears to leave out.

    Returns:
        How many values of each matrix are 0.

    Raises:
        ValueError: A value is out of its range, a name matches no linear, the model has adapters, a matrix is
            quantized, computed, without memory or tied to another layer, its inputs are no multiple of m or not
            finite, or the batch did not come to it. The model is as it was then.
    """
    check_number("sparsity", sparsity, least=0.0, below=1.0)
    if pattern is not None:
        _check_pattern(pattern)
    if has_adapters(model):
        raise ValueError("The model has adapters: prune the base first, and train adapters on what is left.")
    layers, skipped = _targets(model, target_modules, exclude_modules)
    for name, layer in layers.items():
        _check_layer(model, name, layer, pattern)
    mask = batch.get("attention_mask")
    calibration = _Calibration(None if mask is None else mask.flatten().bool(), sparsity, pattern)
    handles = [
        layer.register_forward_pre_hook(partial(_look, calibration, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    was_training = {module: module.training for module in model.modules()}
    try:
        inner = getattr(model, "base_model", model)
        inner = inner if {*layers.values()} <= {*inner.modules()} else model
        inner.eval()(**{name: value for name, value in batch.items() if name != "labels"})
        absent = [name for name in layers if name not in calibration.done]
        if absent:
            raise ValueError(
                f"The calibration batch did not come to {len(absent)} of {len(layers)} linears ({absent[0]}), as to "
                "experts without tokens. Give more data, or name them in `exclude_modules`; nothing was pruned."
            )
    except BaseException:
        calibration.undo()
        raise
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in was_training.items():
            module.training = mode
    rows = []
    for name, layer in layers.items():
        weight, shape = layer.weight, matrix_shape(layer)
        assert isinstance(weight, Tensor)
        assert shape is not None
        rows.append(PrunedRow(module=name, shape=shape, zeros=int((weight == 0).sum())))
    return PruningReport(rows=tuple(rows), skipped=skipped, total_parameters=sum(p.numel() for p in model.parameters()))


def _look(calibration: _Calibration, name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
    calibration.prune(name, layer, next(iter((*args, *kwargs.values()))))


def lowest(scores: Tensor, number: int, group: int) -> Tensor:
    """Find the lowest scores ``(O, I)``: of each row, in each group of neighbours, exactly so many.

    Args:
        scores: Where two are equal, either is taken.
        number: How many of a group.
        group: Size of a group, of which I is a multiple.
    """
    groups = scores.reshape(len(scores), -1, group)
    places = groups.topk(number, dim=-1, largest=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, places, True).flatten(-2)


def _check_pattern(pattern: tuple[int, int]) -> None:
    kept, group = pattern
    check_integer("pattern", kept, least=1)
    check_integer("pattern", group, least=2)
    if kept >= group:
        raise ValueError(f"`pattern` is {kept}:{group}: less than {group} of {group} weights must stay, as in 2:4.")


def _targets(
    model: nn.Module, target_modules: str | Iterable[str], excluded: Iterable[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    linears = {name: module for name, module in plain_modules(model) if is_linear(module)}
    if not linears:
        raise ValueError(f"This {type(model).__name__} has no nn.Linear or Conv1D to prune.")
    names = target_modules if isinstance(target_modules, str) else [*target_modules]
    config = read_config({"target_modules": names, "exclude_modules": [*excluded]})
    return select_targets(model, linears, config, {})


def _check_layer(model: nn.Module, name: str, layer: nn.Module, pattern: tuple[int, int] | None) -> None:
    weight = layer._parameters.get("weight")
    if weight is None or is_quantized(weight) or type(weight.data) is not Tensor or not weight.is_floating_point():
        raise ValueError(
            f"{name} cannot be pruned: its weight is quantized, sharded, or computed from others. Load the model "
            "unquantized and whole."
        )
    if weight.is_meta:
        raise ValueError(f"{name} cannot be pruned: its weight has no memory. Load the model whole.")
    tied = [other for other, m in plain_modules(model) if m is not layer and m._parameters.get("weight") is weight]
    if tied:
        raise ValueError(f"{name} cannot be pruned: {tied[0]} has the same weight. Leave it out (`exclude_modules`).")
    shape = matrix_shape(layer)
    assert shape is not None
    if pattern is not None and shape.in_features % pattern[1]:
        raise ValueError(
            f"{name} has {shape.in_features} inputs, no multiple of {pattern[1]}, and cannot be pruned to "
            f"{pattern[0]}:{pattern[1]}. Leave it out (`exclude_modules`)."
        )
