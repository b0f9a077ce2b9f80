"""Let the adapters of one model share what their kind has once for all layers."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

from genlora_lightning.adapters.base import AdapterModule
from genlora_lightning.layers.adapted import AdaptedLayer


class Ties:
    """Puts modules of one ``tie_key`` into the layers of an adapter as one: the first layer's.

    All layers refer to it, as tied weights do, so that each finds it where its own was; what lists parameters lists it
    once, by its name in the first layer, under which it is saved.

    Args:
        stored: Names of an adapter's tensors, if they are known: parts of a model that were adapted one by one have a
            module each, and a layer with a stored one of its own begins a new group.
    """

    def __init__(self, stored: Collection[str] = ()) -> None:
        self._stored = stored
        self._first: dict[Hashable, AdapterModule] = {}

    def tie(self, name: str, layer: AdaptedLayer) -> None:
        """Give a layer the modules that the layers before it have.

        Args:
            name: The layer's, in the names of the tensors.
            layer: The layer.
        """
        for path, owner in list(layer.update.named_modules(prefix=f"{name}.update")):
            for own_name, module in owner._modules.items():
                if not isinstance(module, AdapterModule) or module.tie_key is None:
                    continue
                if any(f"{path}.{own_name}.{parameter}" in self._stored for parameter in module.roles):
                    self._first[module.tie_key] = module
                owner._modules[own_name] = self._first.setdefault(module.tie_key, module)


def tie_modules(layers: Mapping[str, AdaptedLayer], stored: Collection[str] = ()) -> None:
    """Tie the layers of an adapter, by their names, in the order of the model's modules; see :class:`Ties`."""
    ties = Ties(stored)
    for name, layer in layers.items():
        ties.tie(name, layer)
