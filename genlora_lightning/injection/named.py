"""Know that a model has a set of named adapters, and what is trained of it; refuse what would see the active alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import nn

from genlora_lightning.injection.names import plain_modules
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.overrides import forget, note, noted

_SET = "named adapters"


class NamedAdapters(Protocol):
    """A set of named adapters of one model."""

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        ...

    @property
    def is_one(self) -> bool:
        """Whether the model computes with one adapter as it is, or with none."""
        ...

    @property
    def trained_names(self) -> list[str]:
        """The names of those that are trained."""
        ...

    def using(self, which: None = None) -> AbstractContextManager[None]:
        """Context manager in which the model is the base."""
        ...

    def end(self) -> None:
        """Know the model no more: its adapters were taken off."""
        ...


class NamedUpdate(nn.Module):
    """The update of one matrix by a named adapter that is trained: where its parameters are, whatever is active.

    Args:
        name: The adapter's name.
        layer: The layer that computes with it while it is active. It is not part of this module.
    """

    def __init__(self, name: str, layer: AdaptedLayer) -> None:
        super().__init__()
        self.adapter = name
        self.update = layer.update
        self._layer = (layer,)  # in a tuple, which hides it, and the base in it, from `parameters()` and state dicts

    @property
    def layer(self) -> AdaptedLayer:
        """The layer that computes with it."""
        return self._layer[0]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters by their names in this module; fixed ones are among them."""
        return self.layer.adapter_parameters()


def named_updates(module: nn.Module) -> dict[str, NamedUpdate]:
    """What is trained of a module's named adapters, by the names in its state dict."""
    return {name: part for name, part in plain_modules(module) if isinstance(part, NamedUpdate)}


def note_set(model: nn.Module, adapters: NamedAdapters) -> None:
    """Remember a model's set."""
    note(model, _SET, adapters)


def forget_set(model: nn.Module) -> None:
    """Undo :func:`note_set`."""
    forget(model, _SET)


def set_of(model: nn.Module) -> NamedAdapters | None:
    """The set of a model, or of a part of it; ``None`` if there is none."""
    found = (noted(module, _SET) for module in model.modules())
    return next((adapters for adapters in found if adapters is not None), None)


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Context manager in which no named adapter stands in a model, so that what is theirs has one name each."""
    adapters = set_of(model)
    if adapters is None:
        yield
        return
    with adapters.using(None):
        yield


def end_set(model: nn.Module) -> None:
    """End the set of a model whose adapters were taken off, if there is one."""
    for module in model.modules():
        adapters: NamedAdapters | None = forget(module, _SET)
        if adapters is not None:
            adapters.end()


def check_no_set(model: nn.Module) -> None:
    """Check that a model has no set, beside which an adapter would be put in.

    Raises:
        ValueError: It has one.
    """
    adapters = set_of(model)
    if adapters is not None:
        raise ValueError(
            f"This {type(model).__name__} has an AdapterSet ({_listed(adapters)}). Add the adapter to it "
            "(`adapters.add(name, ...)`), or take the set off first (`adapters.close()`)."
        )


def check_one_active(model: nn.Module) -> None:
    """Check that what a model computes with is one adapter, if it has a set.

    Raises:
        ValueError: It is a sum of some, or one for each row.
    """
    adapters = set_of(model)
    if adapters is not None and not adapters.is_one:
        raise ValueError(
            f"Several adapters of this {type(model).__name__}'s AdapterSet ({_listed(adapters)}) are active at once. "
            "Save each by its name (`adapters.save(name, folder)`), activate one (`adapters.activate(name)`), or merge."
        )


def _listed(adapters: NamedAdapters) -> str:
    names = adapters.names
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "empty"
