"""What can be counted, and is the same in every run: operators, bytes kept for the backward, optimizer, gradients."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from genlora_lightning.backbone.architectures import repeated_blocks
from genlora_lightning.layers.sharing import batch_key, generated, layers_of

from .models import Arm, adapted_modules, autocast, base_of, make_arm, put_on, sharing_copy, targets
from .plan import Cell

_CPU = "cpu"
# They compute nothing, but only make an object, or answer a question about dtypes.
_NOTHING = ("_unsafe_view", "detach", "empty.memory_format", "_reshape_alias", "promote_types")


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: no views.

    Args:
        modules: Those of their forwards are also counted apart, in :attr:`inside`.
    """

    def __init__(self, modules: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.total = self.inside = self._depth = 0
        self._modules = modules or []
        self._hooks: list[Any] = []

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.name().removeprefix("aten::") not in _NOTHING:
            self.total += 1
            self.inside += self._depth > 0
        return func(*args, **(kwargs or {}))

    @override
    def __enter__(self) -> Operators:
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(lambda *_: self._move(1)))
            self._hooks.append(module.register_forward_hook(lambda *_: self._move(-1)))
        super().__enter__()
        return self

    @override
    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _move(self, by: int) -> None:
        self._depth += by


def measure_counts(cell: Cell) -> dict[str, Any]:
    """All that is counted, for each arm; on the CPU, whose backward runs in the thread that counts."""
    found = {}
    for name in cell.arms:
        found[name] = _count(make_arm(name, cell, _CPU))
        gc.collect()  # the arm
    return found


def _count(arm: Arm) -> dict[str, Any]:
    base = base_of(arm.name, arm.cell, _CPU)
    kept, frozen_apart = saved_bytes(arm)
    arm.step()  # so that the optimizer has its state
    trained = [parameter for parameter in arm.model.parameters() if parameter.requires_grad]
    found: dict[str, Any] = {
        "operators": count_operators(arm, adapted_modules(arm.model, targets(base))),
        "saved_bytes": kept,
        "saved_and_trained_bytes": frozen_apart,
        "gradient_elements": sum(parameter.numel() for parameter in trained),
        "gradient_bytes": sum(_bytes(parameter) for parameter in trained),
        "optimizer_bytes": optimizer_bytes(arm.optimizer),
    }
    if arm.name.startswith("genlora"):
        at_half_depth = count_generator(arm.cell, _half(arm, base))["forward"]
        found["generator"] = {**count_generator(arm.cell, arm.model), "forward_at_half_depth": at_half_depth}
    return found


def count_operators(arm: Arm, linears: list[nn.Module]) -> dict[str, float]:
    """Operators in a step's parts, and on average in the forward of one of the linears."""
    with Operators(linears) as forward:
        loss = arm.loss(arm.batches[0])
    with Operators() as backward:
        loss.backward()
    assert all(p.grad is not None for p in arm.model.parameters() if p.requires_grad)
    with Operators() as stepping:
        if arm.optimizer is not None:
            arm.optimizer.step()
    parts = {"forward": forward.total, "backward": backward.total, "optimizer": stepping.total}
    return {**parts, "step": sum(parts.values()), "per_linear": forward.inside / len(linears)}


def saved_bytes(arm: Arm) -> tuple[int, int]:
    """Bytes of all storages that autograd keeps of a forward, each once.

    Returns:
        Without those of parameters and buffers, which are there anyway; and without those alone that are frozen.
    """
    kept: dict[int, Tensor] = {}  # which holds them, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        plain = tensor.detach()  # an output with its history would keep the graph that keeps it
        kept.setdefault(_address(tensor), plain)
        return plain

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arm.loss(arm.batches[0])
    state = [*arm.model.parameters(), *arm.model.buffers()]
    frozen = {_address(tensor) for tensor in state if not tensor.requires_grad}
    own = {_address(tensor) for tensor in state}
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in kept.items()}
    return sum(sizes[one] for one in sizes.keys() - own), sum(sizes[one] for one in sizes.keys() - frozen)


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of an optimizer's state."""
    if optimizer is None:
        return 0
    return sum(
        _bytes(value) for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )


def count_generator(cell: Cell, model: nn.Module) -> dict[str, int]:
    """Operators that generate for a whole model, in its forward and backward, and how many shapes it has."""
    with autocast(cell, _CPU):
        with Operators() as forward, generated(model) as matrices:
            pass
        generators = [
            (generator, layer.wanted_dtype() or torch.float32)
            for layer in layers_of(model)
            for generator in layer.pair or ()
        ]
    gradients = [torch.ones_like(matrix) for matrix in matrices]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with Operators() as backward:
        torch.autograd.grad(matrices, parameters, gradients)
    shapes = {batch_key(*one) for one in generators}
    return {"forward": forward.total, "backward": backward.total, "shapes": len(shapes)}


def _half(arm: Arm, base: Any) -> Any:
    """The base with half as many blocks, and the arm's adapters."""
    model = sharing_copy(base)
    blocks = repeated_blocks(model)
    assert blocks is not None
    del blocks[len(blocks) // 2 :]
    return put_on(arm.name, model, arm.cell.rank)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
