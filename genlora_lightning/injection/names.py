"""Name a model's modules and tensors as the model does without what wraps its parts: FSDP1, compiling, checkpointing.

A part that is compiled (``self.net = torch.compile(self.net)``), or wrapped otherwise, is the part that it was: what is
saved with the wrapper loads without it, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import nn

# What FSDP1, activation checkpointing and `torch.compile` call the module inside of theirs.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
_V = TypeVar("_V")


def plain_name(name: str) -> str:
    """A module's or tensor's name without the wrappers around the model's parts."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` by their plain names, without the wrappers."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if _WRAPPERS.isdisjoint(module._modules):
            yield plain_name(name), module


def with_own_names(state: Mapping[str, _V], names: Iterable[str]) -> dict[str, _V]:
    """Entries by plain names, and also by a model's own names for them, by which it loads a state dict.

    Args:
        state: The entries.
        names: The model's own names of its tensors.
    """
    return {**state, **{name: state[plain] for name in names if (plain := plain_name(name)) in state}}
