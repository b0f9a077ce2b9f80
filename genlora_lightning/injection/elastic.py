"""Choose with how many rows of their matrices elastic adapters compute, and draw it for a step of the training."""

from __future__ import annotations

import random
from collections.abc import Mapping

from torch import nn

from genlora_lightning.adapters.base import FactorPair
from genlora_lightning.adapters.config import matches
from genlora_lightning.fields import check_integer
from genlora_lightning.injection.inject import require_adapters
from genlora_lightning.injection.places import plain_name
from genlora_lightning.layers.adapted import AdaptedLayer


def set_active_rank(model: nn.Module, rank: int | Mapping[str, int] | None) -> None:
    """Have a model's elastic adapters compute with the first rows of A and B alone: ``ΔW = s · B[:, :r] A[:r]``.

    Forwards, merging, exporting and effective ranks go by it; what is saved is always the whole. The scaling s stays
    that of the whole.

    Args:
        model: A model with adapters that were made with ``elastic``.
        rank: r for all layers, of which those of a lower rank stay whole; or r by names of layers, as in
            ``rank_pattern``, all others being whole; ``None`` for the whole of all.

    Raises:
        TypeError: A rank is no integer.
        ValueError: The model has no adapters, one to be cut is not elastic, one is merged at another rank, a name
            matches nothing, or r is less than 1 or more than there are rows. Nothing is changed then.
    """
    layers = {name: layer for name, layer in require_adapters(model).items() if not layer.config.is_derived}
    ranks = {name: layer.config.rank for name, layer in layers.items()}
    chosen = {} if rank is None else ranks_by_name(ranks, rank)
    for name, layer in layers.items():
        wanted = chosen.get(name, ranks[name])
        if layer.config.elastic is None and wanted < ranks[name]:
            raise ValueError(not_elastic(name, wanted, ranks[name]))
        if layer.merged and wanted != layer.active_config.rank:
            raise ValueError(f"{name} is merged at another rank: call `unmerge_adapters(model)` first.")
    for name, layer in layers.items():
        _set(layer, chosen.get(name, ranks[name]))


def not_elastic(name: str, wanted: int, rank: int) -> str:
    """Say that a layer's adapter cannot be cut, and what can be done."""
    return (
        f"{name} was not made with `elastic`, so that its first {wanted} rows of {rank} are no adapter. "
        "`export_lora(model, folder, rank=…)` and `genlora export-lora --rank` lower the rank of any adapter by a "
        "singular value decomposition."
    )


def whole_ranks(model: nn.Module) -> None:
    """Have all elastic layers of a model compute with all rows of A and B."""
    for layer in elastic_layers(model):
        _set(layer, layer.config.rank)


def ranks_by_name(ranks: Mapping[str, int], wanted: int | Mapping[str, int]) -> dict[str, int]:
    """The ranks to which layers are to be cut, of those that are concerned.

    Args:
        ranks: What layers have, by name.
        wanted: One for all layers that have more; or by names, as in ``rank_pattern``.

    Raises:
        TypeError: One is no integer.
        ValueError: One is less than 1 or more than there are rows, or a name matches nothing.
    """
    if not isinstance(wanted, Mapping):
        check_integer("rank", wanted, least=1)
        highest = max(ranks.values())
        if wanted > highest:
            raise ValueError(f"`rank` is {wanted}, and the adapter has {highest} rows at most.")
        return {name: min(wanted, rank) for name, rank in ranks.items()}
    found: dict[str, int] = {}
    for pattern, rank in wanted.items():
        check_integer(f"rank[{pattern!r}]", rank, least=1)
        names = [name for name in ranks if matches(pattern, name, plain_name(name))]
        if not names:
            raise ValueError(f"{pattern!r} matches no adapted layer. They are {', '.join([*ranks][:5])}, …")
        for name in names:
            found.setdefault(name, rank)
    above = [name for name, rank in found.items() if rank > ranks[name]]
    if above:
        raise ValueError(f"{above[0]} is to have rank {found[above[0]]}, and has {ranks[above[0]]} rows.")
    return found


def elastic_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The layers of a model whose adapters were made with ``elastic``, in the model's order."""
    return [m for m in model.modules() if isinstance(m, AdaptedLayer) and m.config.elastic is not None]


def draw_ranks(model: nn.Module, step: int, seed: int | str = 0) -> None:
    """Draw, for an optimizer step, how many rows of A and B each elastic layer computes with.

    Each layer draws for itself, uniformly from ``elastic``: what is drawn depends on the seed, the step and the layer's
    place alone. It is therefore the same on all ranks of a process group, in all micro-batches of the step, and in a
    run that was resumed. :func:`whole_ranks` ends it.

    Args:
        model: A model with adapters, or without any that are elastic, for which it does nothing.
        step: The number of the step.
        seed: Of the run.
    """
    numbers = random.Random(f"{seed} {step}")  # of a text it is the same on every machine
    for layer in elastic_layers(model):
        ranks = layer.config.elastic
        assert ranks is not None
        _set(layer, ranks[int(numbers.random() * len(ranks))])


def _set(layer: AdaptedLayer, rank: int) -> None:
    update = layer.update
    if isinstance(update, FactorPair):
        update.active_rank = None if rank == layer.config.rank else rank
