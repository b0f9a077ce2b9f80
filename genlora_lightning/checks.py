"""Checks around a training run: the optimizer's parameters, the first gradients, the mode, the place to save."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from genlora_lightning.full_training import trained_modules
from genlora_lightning.injection import adapter_layers


def check_writable(folder: Path, needed: int) -> None:
    """Find out before the training, not after it, that the adapter cannot be saved."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"The adapter is to be saved in {folder}, but {existing} is not writable.")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(f"The adapter is to be saved in {folder}, which takes {needed:,} bytes; {free:,} are free.")


def prune_frozen(optimizers: list[Optimizer]) -> int:
    """Take frozen parameters out of the optimizers; returns how many.

    A module that knows nothing of adapters gives its optimizer ``self.parameters()``, the frozen base included.
    """
    removed = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            trainable = [p for p in group["params"] if p.requires_grad]
            removed += len(group["params"]) - len(trainable)
            group["params"] = trainable
    return removed


def check_optimizers_hold(optimizers: list[Optimizer], model: nn.Module) -> None:
    """Check that each trainable parameter of the model is in an optimizer, and none that is not the model's.

    Raises:
        ValueError: A parameter would not be trained, or the optimizer trains one that nobody uses.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    absent = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if absent:
        raise ValueError(
            f"{len(absent)} trainable parameters, {absent[0]} among them, are in no optimizer and would not be "
            "trained. `configure_optimizers` must collect the parameters when it is called, after the adapters are "
            "injected, for example with `self.parameters()`; a list made in `__init__` does not know the adapters."
        )
    foreign = held - {id(p) for p in model.parameters()}
    if foreign:
        raise ValueError(
            f"The optimizer holds {len(foreign)} parameters that the module does not have (any more). "
            "`configure_optimizers` must collect the parameters when it is called."
        )


def check_gradients_arrived(model: nn.Module) -> list[str]:
    """Check that the backward pass reached the adapters; returns the names of adapted linears that it did not.

    Raises:
        RuntimeError: It reached none; the message lists what usually causes this.
    """
    layers = adapter_layers(model)
    without = [
        name
        for name, layer in layers.items()
        if not any(p.grad is not None and bool((p.grad != 0).any()) for p in layer.adapter_parameters().values())
    ]
    if len(without) == len(layers):
        raise RuntimeError(
            f"After the first backward pass none of the {len(layers)} adapters has a gradient, so nothing would be "
            "trained. Likely causes: reentrant gradient checkpointing over a frozen input (set "
            "`use_reentrant=False` or call `model.enable_input_require_grads()`), a `torch.no_grad()` around the "
            "backbone, a `detach()`, or an optimizer that steps on other parameters."
        )
    return without


def set_train_mode(model: nn.Module) -> None:
    """Set train mode, but leave frozen normalisation layers with running statistics in evaluation mode.

    Their statistics belong to the base: they are not saved with the adapter, so they must not change.
    """
    model.train()
    trained = {id(m) for module in trained_modules(model).values() for m in module.modules()}
    for module in model.modules():
        has_statistics = getattr(module, "running_mean", None) is not None
        if has_statistics and id(module) not in trained:
            module.eval()
