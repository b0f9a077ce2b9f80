"""Sum losses for each named adapter by itself, and scale gradients likewise, so that each trains as it would alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genlora_lightning.artifacts.adapter_set import AdapterSet
from genlora_lightning.training.named_adapters import SET_ATTRIBUTE


def acting_by_row(module: nn.Module) -> AdapterSet | None:
    """The named adapters of a module while they act by row; ``None`` if it has none, or they do not."""
    found = module._modules.get(SET_ATTRIBUTE)
    return found if isinstance(found, AdapterSet) and isinstance(found.active, list) else None


def sums_by_adapter(adapters: AdapterSet, losses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sum a batch's losses for each of the named adapters that act on it by row.

    Args:
        adapters: The adapters.
        losses: The losses of tokens, or of whatever a row has several of; shape (n).
        rows: The row of each; shape (n).

    Returns:
        Sums and numbers, each (adapters), in the order of ``trained_names``; rows of the base alone are left out.
    """
    assert isinstance(adapters.active, list)
    names = adapters.trained_names
    place: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    owners = torch.tensor([place.get(name, len(names)) for name in adapters.active], device=losses.device)[rows]
    sums = losses.new_zeros(len(names) + 1).index_add(0, owners, losses)
    return sums[:-1], torch.bincount(owners, minlength=len(names) + 1)[:-1]


def scale_gradients(adapters: AdapterSet, scales: Tensor) -> None:
    """Multiply the gradients of each named adapter by a number of its own.

    Args:
        adapters: The adapters.
        scales: The numbers, shape (adapters), in the order of ``trained_names``.
    """
    for name, scale in zip(adapters.trained_names, scales, strict=True):
        gradients = [parameter.grad for parameter in adapters.parameters_of(name) if parameter.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale.to(gradients[0].device))
