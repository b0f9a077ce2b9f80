"""Give the figures that tell how an optimizer gets on: learning rate, gradient norm, memory."""

from __future__ import annotations

import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from genlora_lightning.adapters.steps import largest_diagnostics
from genlora_lightning.callbacks.reading import is_reading_step
from genlora_lightning.distributed.collectives import gradient_norm

LEARNING_RATE = "lr"
GRADIENT_NORM = "grad_norm"
MEMORY = "memory_gib"
FIGURES = (LEARNING_RATE, GRADIENT_NORM, MEMORY)

_GIB = 2**30


def learning_rate(optimizer: Optimizer) -> float:
    """The rate of an optimizer's next step; of several groups the highest."""
    return max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)


def peak_memory_gib(device: torch.device) -> float | None:
    """The most memory that tensors have taken on a GPU so far, or this process on a CPU; ``None`` if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / _GIB


def log_figures(trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
    """Log ``lr``, ``grad_norm`` (before clipping) and ``memory_gib`` of the first step and those after which is logged.

    Beside them the figures that the adapters' modules give of themselves (``diagnostics``). To be called with the true
    gradients. On the steps in between it does nothing; on all ranks.
    """
    if trainer.global_step and not is_reading_step(trainer):
        return
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    memory = peak_memory_gib(trainer.strategy.root_device)
    figures: list[tuple[str, float | Tensor | None]] = [
        (LEARNING_RATE, learning_rate(optimizer)),
        (GRADIENT_NORM, gradient_norm(parameters)),
        (MEMORY, memory),
        *largest_diagnostics(module).items(),
    ]
    for name, value in figures:
        if value is not None:
            module.log(name, value, on_step=True, on_epoch=False, batch_size=1)
