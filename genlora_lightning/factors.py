"""Where an adapted linear takes its matrices from: generated for it alone, for the whole model at once, or kept.

A matrix that was generated for the whole model belongs to one forward of it. The backward of activation checkpointing
calls layers again, after that forward: without reentrance it must see tensors in number and kind as before, and uses
nothing but their values; with reentrance it makes a graph of its own, to which the model's generation does not belong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genlora_lightning.generator import RBFGenerator


class ModelForward:
    """One forward of a model, or of a part of it, for which the matrices of all its layers were generated."""

    def __init__(self) -> None:
        self.runs = True
        self.has_graph = torch.is_grad_enabled()


@dataclass
class Given:
    """What a model's forward has generated for one layer.

    Args:
        A: ``(rank, in_features)``; ``None`` as soon as its gradient is there.
        B: ``(rank, out_features)``, scaled; ``None`` as soon as its gradient is there.
        forward: The forward.
        in_graph: Whether the layer has used them under autograd.
    """

    A: Tensor | None
    B: Tensor | None
    forward: ModelForward
    in_graph: bool = False


class FactorStore:
    """The source of one layer's A ``(rank, in_features)`` and scaled, transposed B ``(rank, out_features)``.

    A copy of it, as of the layer, is empty: tensors with a history cannot be copied.

    Args:
        keeps: Whether matrices that were generated without autograd are used again until a parameter changes.
    """

    def __init__(self, keeps: bool = False) -> None:
        self.keeps = keeps
        self.given: Given | None = None
        self._kept: dict[torch.dtype, tuple[int, Tensor, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FactorStore:
        return FactorStore()

    def __reduce__(self) -> tuple[Any, ...]:
        return FactorStore, ()

    @property
    def is_served(self) -> bool:
        """Whether a model's forward that has generated for the layer is running."""
        return self.given is not None and self.given.forward.runs

    def kept(self, a: RBFGenerator, b: RBFGenerator, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """What is kept in a dtype, if it is up to date and may be used: not under autograd."""
        if not self.keeps or torch.is_grad_enabled():
            return None
        found = self._kept.get(dtype)
        if found is None or found[0] != a.changes + b.changes or found[1].device != a.latent.device:
            return None
        return found[1], found[2]

    def keep(self, a: RBFGenerator, b: RBFGenerator, A: Tensor, B: Tensor) -> None:
        """Keep matrices, if the layer keeps any."""
        if self.keeps and not torch.is_grad_enabled():
            self._kept[A.dtype] = a.changes + b.changes, A, B

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept.clear()

    def matrices(self, a: RBFGenerator, b: RBFGenerator, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A, and B scaled and transposed, in a dtype, from wherever they are to be had."""
        if torch.compiler.is_compiling():
            return a(dtype=dtype), b(scale=scale, dtype=dtype)
        kept = self.kept(a, b, dtype)
        if kept is not None:
            return kept
        with_graph = torch.is_grad_enabled()
        given = self.given
        if given is not None and given.forward.runs and (given.forward.has_graph or not with_graph):
            A, B = given.A, given.B
            # In fewer bits than asked for: autocast was on around the model and is off here.
            if A is not None and B is not None and torch.promote_types(A.dtype, dtype) == A.dtype:
                given.in_graph = given.in_graph or with_graph
                return A.to(dtype), B.to(dtype)
        elif given is not None and given.in_graph and with_graph and _in_backward():
            return self._once_more(given, a, b, scale, dtype)
        elif not _in_backward():
            self.given = None  # of a forward that is over
        A, B = a(dtype=dtype), b(scale=scale, dtype=dtype)
        self.keep(a, b, A, B)
        return A, B

    @staticmethod
    def _once_more(
        given: Given, a: RBFGenerator, b: RBFGenerator, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """For a layer that is recomputed without reentrance: the matrices' values, in a graph that is thrown away."""
        if given.A is not None and given.B is not None:
            return given.A.to(dtype), given.B.to(dtype)
        with torch.no_grad():
            A, B = a(dtype=dtype), b(scale=scale, dtype=dtype)
        return (
            A.requires_grad_(any(part.requires_grad for part in a.parts())),
            B.requires_grad_(any(part.requires_grad for part in b.parts())),
        )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
