"""Say which adapters of a set act, and make the layers that compute with them: one, a weighted sum, or one by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from genlora_lightning.adapters.combined import combine_updates
from genlora_lightning.fields import check_number, shown
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.linear import AdaptedLinear
from genlora_lightning.layers.routed import RoutedLinear, Routing, with_update
from genlora_lightning.layers.sharing import generate_for_good

Which = str | Sequence[str] | Mapping[str, float] | None
Layers = dict[str, AdaptedLayer]

# Bytes that the modules of one adapted layer take beside its tensors; counted so that small adapters are bounded, too.
_BYTES_OF_MODULES = 16 << 10


@dataclass(frozen=True)
class Active:
    """What a model computes with.

    Args:
        weights: The adapters that all rows have, with their weights.
        rows: The adapter of each row, instead.
    """

    weights: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, each once."""
        if self.rows is None:
            return tuple(name for name, _ in self.weights)
        return tuple(sorted({name for name in self.rows if name is not None}))

    @property
    def one(self) -> str | None:
        """The adapter that acts alone, as it is."""
        return self.weights[0][0] if len(self.weights) == 1 and self.weights[0][1] == 1 else None

    @property
    def key(self) -> tuple[Any, ...]:
        """What other rows of the same adapters have in common."""
        return ("sum", self.weights) if self.rows is None else ("rows", self.names)

    @classmethod
    def of(cls, which: Which, rows: Sequence[str | None] | None) -> Active:
        """Read what :meth:`AdapterSet.activate` is given.

        Raises:
            ValueError: Both are given, or a name twice, or a weight is not finite.
        """
        if rows is not None:
            if which is not None:
                raise ValueError("Give either what all rows have, or `rows`, not both.")
            if isinstance(rows, str) or not rows:
                raise ValueError(f"`rows` must be a list with a name for each row (None: the base), got {shown(rows)}.")
            wanted = Active(rows=tuple(rows))
        elif which is None:
            wanted = Active()
        else:
            if isinstance(which, str):
                which = [which]
            if not which:
                raise ValueError(f"{shown(which)} names no adapter; None is the base alone.")
            if not isinstance(which, Mapping):
                if len(set(which)) < len(which):
                    raise ValueError(f"{shown(list(which))} names an adapter twice; give weights: {{name: 2.0}}.")
                which = dict.fromkeys(which, 1.0)
            for name, weight in which.items():
                check_number(f"weight of {name}", weight)
                if not math.isfinite(weight):
                    raise ValueError(f"The weight of {name!r} must be finite, got {weight}.")
            wanted = Active(tuple((name, float(weight)) for name, weight in which.items()))
        return wanted


@dataclass
class Made:
    """The layers that stand in the model while something is active.

    Args:
        layers: By the names of the places.
        names: The adapters in them.
        num_bytes: Of what was generated for them, and of their modules.
        routing: Common to them, if rows have adapters of their own.
    """

    layers: Layers
    names: tuple[str, ...]
    num_bytes: int
    routing: Routing | None = None


def make_layers(parts: Mapping[str, Layers], wanted: Active, *, is_fixed: bool) -> Made:
    """Make the layers for what is to act.

    Args:
        parts: The layers of each of its adapters.
        wanted: What is to act.
        is_fixed: Whether none of them is trained, so that matrices are generated once and kept.

    Raises:
        ValueError: They cannot be combined.
    """
    routing = Routing() if wanted.rows is not None else None
    if routing is not None:
        layers = _routed(parts, routing)
    elif wanted.one is not None:
        layers = parts[wanted.one]
    else:
        layers = _summed(parts, dict(wanted.weights))
    num_bytes = len(layers) * _BYTES_OF_MODULES
    if layers and is_fixed:
        routed = {place: layer for place, layer in layers.items() if isinstance(layer, RoutedLinear)}
        joined = {place: layer.join_generated() for place, layer in routed.items()}
        num_bytes += sum(joined.values())
        num_bytes += generate_for_good(layer for place, layer in layers.items() if not joined.get(place))
    return Made(layers, wanted.names, num_bytes, routing)


def _by_place(parts: Mapping[str, Layers]) -> dict[str, dict[str, AdaptedLayer]]:
    """For each place its layers by the adapters' names."""
    found: dict[str, dict[str, AdaptedLayer]] = {}
    for name, layers in parts.items():
        for place, layer in layers.items():
            found.setdefault(place, {})[name] = layer
    return found


def _summed(parts: Mapping[str, Layers], weights: Mapping[str, float]) -> Layers:
    result: Layers = {}
    for place, layers in _by_place(parts).items():
        first = next(iter(layers.values()))
        if any("update" not in layer._modules for layer in layers.values()):
            raise ValueError(f"{place} ({type(first).__name__}) takes one adapter at a time.")
        if len({layer.config.keep_zeros for layer in layers.values()}) > 1:
            raise ValueError(
                f"Of the adapters {', '.join(layers)} some keep the base's zeros (`keep_zeros`) and some do not: their "
                f"updates of {place} have no sum that is one of either."
            )
        update = combine_updates([layer.update for layer in layers.values()], [weights[name] for name in layers])
        result[place] = with_update(first, update)
    return result


def _routed(parts: Mapping[str, Layers], routing: Routing) -> Layers:
    result: Layers = {}
    for place, layers in _by_place(parts).items():
        other = next((layer for layer in layers.values() if type(layer) is not AdaptedLinear), None)
        if other is not None:
            raise ValueError(
                f"{place} ({type(other).__name__}) takes one adapter for all rows: only linears are computed by row."
            )
        masked = next((name for name, layer in layers.items() if layer.config.keep_zeros), None)
        if masked is not None:
            raise ValueError(
                f"{masked!r} keeps the base's zeros (`keep_zeros`), and such updates are not computed by row: activate "
                "one adapter for all rows."
            )
        result[place] = RoutedLinear(layers, routing)
    return result


class CountedBatches:
    """Has a model's forwards say how many rows their batch has."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def put_on(self, model: nn.Module) -> list[Any]:
        """Do so from now on; what is to be removed in the end."""
        return [
            model.register_forward_pre_hook(self.begin, with_kwargs=True),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the forward: the first tensor of rows has the batch as its first dimension.

        `generate` of transformers 4 gives the positions, one dimension for all rows, before the tokens.
        """
        given = [*args, *kwargs.values()]
        given += [value for item in given if isinstance(item, Mapping) for value in item.values()]
        tensors = [item for item in given if isinstance(item, Tensor) and item.ndim]
        size = next((tensor.shape[0] for tensor in sorted(tensors, key=lambda tensor: tensor.ndim == 1)), None)
        if size is not None:
            self.routing.check_batch(size)
        self.routing.batch_size = size

    def end(self, *_: Any) -> None:
        """After it, also if it failed."""
        self.routing.batch_size = None
