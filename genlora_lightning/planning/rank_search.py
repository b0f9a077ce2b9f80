"""Search ranks, layer by layer, at which an elastic adapter is best within a number of parameters."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from torch import nn

from genlora_lightning.injection.elastic import set_active_rank, whole_ranks
from genlora_lightning.injection.inject import require_adapters


def search_ranks(
    model: nn.Module,
    evaluate: Callable[[], float],
    *,
    budget: int,
    groups: Sequence[Sequence[str]] | None = None,
    evaluations: int = 50,
    seed: int = 0,
) -> dict[str, int]:
    """Search the ranks of an elastic adapter's layers by climbing hills; nothing is trained.

    It begins with the middle one of each layer's elastic ranks, or with lower ones where these are above the budget.
    Then it proposes to raise the rank of one group of layers, lowering others, drawn at random, until the budget is
    met; where there is nothing to raise, to lower one. What has a lower loss is kept.

    Args:
        model: A model with adapters that were trained with ``elastic``. They are whole again afterwards.
        evaluate: Gives the model's loss on validation data, as it computes at the moment.
        budget: The number of parameters of all adapters, at most.
        groups: Names of layers that have one rank, or what of their own is next to it; each layer for itself if
            ``None``. Layers in no group stay at the beginning's.
        evaluations: How often ``evaluate`` is called, at most.
        seed: Of the proposals.

    Returns:
        The rank of each elastic layer, as ``rank_pattern``, ``set_active_rank`` and ``slice_adapter`` take it.

    Raises:
        ValueError: The model has no elastic adapters, a name is none of them, or the lowest ranks are above the budget.
    """
    layers = {name: layer for name, layer in require_adapters(model).items() if layer.config.elastic}
    if not layers:
        raise ValueError("There is nothing to search: the model's adapters were not made with `elastic`.")
    groups = [[name] for name in layers] if groups is None else groups
    unknown = sorted({name for group in groups for name in group} - set(layers))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no elastic layer of the model. They are {', '.join([*layers][:5])}, …")
    ladders = {name: layer.config.elastic or [] for name, layer in layers.items()}
    fixed = sum(layer.config.count_all(layer.shape) for n, layer in require_adapters(model).items() if n not in layers)

    def size(places: dict[str, int]) -> int:
        configs = {name: layer.config.of_first_rows(ladders[name][places[name]]) for name, layer in layers.items()}
        return fixed + sum(configs[name].count_all(layer.shape) for name, layer in layers.items())

    def moved(places: dict[str, int], group: Sequence[str], by: int) -> dict[str, int]:
        return places | {name: min(max(places[name] + by, 0), len(ladders[name]) - 1) for name in group}

    def loss_at(places: dict[str, int]) -> float:
        set_active_rank(model, _pattern({name: ladders[name][place] for name, place in places.items()}))
        return evaluate()

    places = {name: (len(ladder) - 1) // 2 for name, ladder in ladders.items()}
    while size(places) > budget:
        lower = moved(places, [*layers], -1)
        if lower == places:
            raise ValueError(f"At the lowest ranks there are {size(places):,} parameters, more than {budget:,}.")
        places = lower
    numbers = random.Random(seed)
    tried = {tuple(places.values())}
    try:
        best = loss_at(places)
        left = evaluations - 1
        for _ in range(20 * evaluations):  # proposals that were tried before cost nothing
            if left <= 0:
                break
            raised = groups[int(numbers.random() * len(groups))]
            proposal = moved(places, raised, 1)
            if proposal == places:
                proposal = moved(places, raised, -1)
            others = sorted((g for g in groups if g is not raised), key=lambda _: numbers.random())
            for other in others:
                if size(proposal) <= budget:
                    break
                proposal = moved(proposal, other, -1)
            if size(proposal) > budget or tuple(proposal.values()) in tried:
                continue
            tried.add(tuple(proposal.values()))
            left -= 1
            loss = loss_at(proposal)
            if loss < best:
                best, places = loss, proposal
    finally:
        whole_ranks(model)
    return _pattern({name: ladders[name][place] for name, place in places.items()})


def _pattern(ranks: dict[str, int]) -> dict[str, int]:
    """Ranks by expressions that match one layer each."""
    return {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
