"""Say where a model's adapters stand and what is theirs, whoever has put them in: this library or another one.

This is all that checkpoints, strategies and checks know of adapters: a *place* is a module that stands where one of the
base's stood and holds it; whatever else is in it is the adapter's. Ours are places by their class; those of another
library are marked when they are put in (:mod:`genlora_lightning.injection.peft_adapters`). What is trained of a set of
named adapters has places of its own in the set, which hold nothing of the base: they come and go in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from genlora_lightning.injection.named import NamedUpdate
from genlora_lightning.injection.names import plain_modules
from genlora_lightning.injection.names import plain_name as plain_name
from genlora_lightning.layers.adapted import is_place
from genlora_lightning.overrides import forget, note, noted

_MARK = "place of another library's adapter"


@dataclass(frozen=True)
class Place:
    """A module that holds a module of the base, and what an adapter adds to it.

    Args:
        module: It.
        base: The name in it of the base's module.
        is_copy: Whether the adapter's is a whole copy, trained in place of the base's module, which is not used.
    """

    module: nn.Module
    base: str = "base_layer"
    is_copy: bool = False

    @property
    def base_module(self) -> nn.Module:
        """The base's module."""
        return getattr(self.module, self.base)  # type: ignore[no-any-return]

    @property
    def is_ours(self) -> bool:
        """Whether this library has made it."""
        return is_place(self.module) or isinstance(self.module, NamedUpdate)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in the place; fixed ones are among them."""
        if self.is_ours:
            own: dict[str, nn.Parameter] = self.module.adapter_parameters()  # type: ignore[operator]
            return own
        return {name: tensor for name, tensor in self._tensors() if isinstance(tensor, nn.Parameter)}

    def adapter_buffers(self) -> dict[str, Tensor]:
        """The adapter's buffers that a state dict holds, by their names in the place."""
        if self.is_ours:
            return {}
        return {name: tensor for name, tensor in self._tensors() if not isinstance(tensor, nn.Parameter)}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        bases = {id(inner) for inner in self.base_module.modules()}
        for prefix, part in self.module.named_modules():
            if id(part) in bases:
                continue
            lasting = {n: b for n, b in part._buffers.items() if n not in part._non_persistent_buffers_set}
            for name, tensor in {**part._parameters, **lasting}.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, tensor


def mark_place(place: Place) -> None:
    """Mark a module of another library as a place."""
    note(place.module, _MARK, (place.base, place.is_copy))


def unmark_place(module: nn.Module) -> None:
    """Undo :func:`mark_place`."""
    forget(module, _MARK)


def adapter_places(model: nn.Module) -> dict[str, Place]:
    """The places of a model's adapters by name, each once; empty if the model has none."""
    found: dict[str, Place] = {}
    for name, module in plain_modules(model):
        if is_place(module) or isinstance(module, NamedUpdate):
            found[name] = Place(module)
        elif (mark := noted(module, _MARK)) is not None:
            found[name] = Place(module, *mark)
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters, whoever put them in."""
    return any(is_place(m) or isinstance(m, NamedUpdate) or noted(m, _MARK) is not None for m in model.modules())


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their full names, each once; of ours without those of modules trained in full."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    # Those of named adapters first: a layer in the model may have them, too, for as long as it is active.
    places = sorted(adapter_places(model).items(), key=lambda item: not isinstance(item[1].module, NamedUpdate))
    for place_name, place in places:
        for name, parameter in place.adapter_parameters().items():
            found.setdefault(id(parameter), (f"{place_name}.{name}" if place_name else name, parameter))
    return dict(found.values())


def adapter_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' buffers that a state dict holds, by their full names, each once (VeRA's projections)."""
    found: dict[int, tuple[str, Tensor]] = {}
    for place_name, place in adapter_places(model).items():
        for name, buffer in place.adapter_buffers().items():
            found.setdefault(id(buffer), (f"{place_name}.{name}" if place_name else name, buffer))
    return dict(found.values())


def base_name(name: str, places: dict[str, Place]) -> str:
    """The name that a tensor of the base has in the base without adapters.

    Args:
        name: Its name in the model.
        places: The model's :func:`adapter_places`.
    """
    parts = name.split(".")
    kept: list[str] = []
    is_base = False  # whether this part is what the place before it calls its base, which may be a place, too
    for index, part in enumerate(parts):
        if not is_base:
            kept.append(part)
        place = places.get(".".join(parts[: index + 1]))
        is_base = place is not None and parts[index + 1 : index + 2] == [place.base]
    return ".".join(kept)
