"""Remember what another library has put into a model, and take it out again without that library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from genlora_lightning.injection.full_training import stop_training_in_full, trained_modules
from genlora_lightning.injection.places import adapter_places, unmark_place
from genlora_lightning.overrides import forget, note, noted, take_off

_HELD = "adapters of another library"


@dataclass(frozen=True)
class Held:
    """What a model remembers of PEFT's adapters in it.

    Args:
        adapter: The configuration that was asked for.
        config: PEFT's object, as the injection has completed it.
        keys: The name in the model of each tensor in PEFT's files.
        trainable: The names of what is trained.
    """

    adapter: Any
    config: Any
    keys: dict[str, str]
    trainable: frozenset[str]


def held_root(module: nn.Module) -> tuple[nn.Module, Held] | None:
    """The part of a module that PEFT's adapters were put into, and what is remembered of them; ``None`` if none."""
    for part in module.modules():
        held: Held | None = noted(part, _HELD)
        if held is not None:
            return part, held
    return None


def remember(root: nn.Module, held: Held) -> None:
    """Remember what was put into a model."""
    note(root, _HELD, held)


def remove_held(model: nn.Module) -> None:
    """Take PEFT's adapters off a model, in place: its modules are the ones it had. All parameters stay frozen."""
    found = held_root(model)
    assert found is not None, "there are none"
    root = found[0]
    root.requires_grad_(False)
    forget(root, _HELD)
    places = {id(place.module): place.base_module for place in adapter_places(root).values()}
    for module in trained_modules(root).values():
        stop_training_in_full(module)
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            while child is not None and id(child) in places and id(parent) not in places:
                unmark_place(child)
                for part in child._modules.values():
                    if part is not None:
                        take_off(part, "_apply")
                child = parent._modules[name] = places[id(child)]
    vars(root).pop("peft_config", None)
