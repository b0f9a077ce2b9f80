"""Records where Python waits for the device: a CPU run calls the operators that would do so on a GPU."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Their results are on the CPU, or have a size that only the device knows.
_READING = {
    "aten::_local_scalar_dense",  # item(), int(), float(), bool(), tolist() of a scalar, `if tensor:`
    "aten::is_nonzero",
    "aten::equal",
    "aten::allclose",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
}
_INDEXING = {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# What a CPU run cannot tell from an operator: a copy from the device, or to it from memory that is not pinned.
_COPYING_BACK = {Tensor.cpu, Tensor.numpy, Tensor.tolist}
_MAKING = {torch.tensor, torch.as_tensor}

# Parts of `file:function`. Who reads tensors that are on the CPU in a GPU run, too.
_ON_THE_CPU_ANYWAY = (
    "/torch/utils/data/",  # samplers and collating
    "/torch/optim/",  # step counters of optimizers that are not fused stay on the CPU
    "genlora_lightning/modules/base.py:_call_batch_hook",  # looks only at batches on the CPU
)


@dataclass
class Waits:
    """What was found, as ``operator at file:line in function < its caller < …``, the innermost frames first."""

    found: list[str] = field(default_factory=list)

    def add(self, name: str, ignored: tuple[str, ...]) -> None:
        frames = [f for f in traceback.extract_stack() if "_python_dispatch" not in f.filename]
        frames = [f for f in frames if f.filename != __file__]
        if any(part in f"{f.filename}:{f.name}" for f in frames for part in ignored):
            return
        places = [f"{f.filename}:{f.lineno} in {f.name}" for f in reversed(frames) if "/torch/" not in f.filename]
        self.found.append(f"{name} at {' < '.join(places[:6])}")


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits, ignored: tuple[str, ...]) -> None:
        super().__init__()
        self.waits, self.ignored = waits, ignored

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in _READING or name.removesuffix(".default") in _READING:
            self.waits.add(name, self.ignored)
        elif name in _INDEXING and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            self.waits.add(f"{name} by a mask", self.ignored)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits, ignored: tuple[str, ...]) -> None:
        super().__init__()
        self.waits, self.ignored = waits, ignored

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPYING_BACK:
            self.waits.add(f"Tensor.{func.__name__}", self.ignored)
        elif func in _MAKING and kwargs.get("device") is not None and not isinstance(args[0], Tensor):
            self.waits.add(f"torch.{func.__name__} on a device", self.ignored)
        return func(*args, **kwargs)


@contextmanager
def record_waits(ignored: tuple[str, ...] = ()) -> Iterator[Waits]:
    """Context manager that records each operator for which Python would wait on a GPU.

    It knows reading (``item``, ``int``, ``bool``, ``tolist``, ``cpu``, ``numpy``), sizes that depend on values
    (``nonzero``, indexing by a mask), and ``torch.tensor(…, device=…)``, which copies from memory that is not pinned.
    It does not know ``.to("cpu")``, ``copy_`` and ``synchronize``; a test on a GPU does
    (``torch.cuda.set_sync_debug_mode``).

    Args:
        ignored: Parts of ``file:function``; what is called from there, at any depth, is left out. Left out in any case
            is what reads tensors that are on the CPU in a GPU run, too: torch's data loading, the step counters of its
            optimizers, and the modules' look at a batch before it is moved.
    """
    waits = Waits()
    everywhere = (*_ON_THE_CPU_ANYWAY, *ignored)
    with _Functions(waits, everywhere), _Operators(waits, everywhere):
        yield waits
