"""Tell ordinary tensors from others, and refuse second derivatives where a backward of our own has none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def is_ordinary(tensor: Any) -> bool:
    """Whether a tensor is torch's own, strided: not a quantized, sharded or otherwise derived one.

    Those without values, with which memory is counted, stand for such tensors, so that what is counted is what runs.
    """
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.layout == torch.strided


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` records what runs."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def in_transform() -> bool:
    """Whether a transform of ``torch.func`` (``grad``, ``vmap``, …) or a trace runs, where own backwards do not go."""
    if torch.compiler.is_compiling():
        return False
    return is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None


def refuse_second_derivative(what: str) -> None:
    """Raise an error in a backward that has no derivative, rather than leave it out silently.

    Raises:
        RuntimeError: The backward runs with ``create_graph=True``.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{what} has a backward of its own, which cannot be differentiated again (`create_graph=True`). For second "
            "derivatives use the plain path: `set_fused(model, False)` of `genlora_lightning.layers.sharing`, once the "
            "adapters are in the model (with the callback in `on_fit_start`)."
        )
