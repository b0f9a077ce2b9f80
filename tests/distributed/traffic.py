"""Counts what processes send each other: every collective of torch.distributed, with its elements and bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override


class Traffic(TorchDispatchMode):
    """A context in which collectives are counted, by their kind.

    Attributes:
        calls: Kind and number of elements of each collective, in order; of the whole tensor where one is gathered or
            scattered.
        bytes: Bytes of all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.bytes = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sides = [[t for t in tree_leaves(arg) if isinstance(t, Tensor)] for arg in args]
            larger = max(sides, key=lambda tensors: sum(t.numel() for t in tensors), default=[])
            if larger and "wait" not in str(func):
                name = func._schema.name.split("::")[1].strip("_")
                self.calls.append((name, sum(t.numel() for t in larger)))
                self.bytes += sum(t.numel() * t.element_size() for t in larger)
        return func(*args, **(kwargs or {}))

    def elements(self, kind: str) -> int:
        """Elements of all collectives whose kind contains a word, such as ``"reduce"``."""
        return sum(count for name, count in self.calls if kind in name)

    def number(self) -> Counter[str]:
        """How many collectives there were of each kind."""
        return Counter(name for name, _ in self.calls)
