"""Find the adapter that meets a number of parameters: of GenLoRA latents, rank and groups, of others the rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.adapters.compacter import CompacterConfig
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.adapters.polar import PoLARConfig

ALLOWANCE = 1.05
_RANK, _HIGHEST_RANK, _GROUPS = 64, 128, 8


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A configuration that meets a budget.

    Args:
        config: The configuration.
        parameters: What it trains.
        wanted: What was asked for.
        lora_parameters_per_rank: What one more unit of LoRA's rank would train on the same linears.
    """

    config: AdapterConfig
    parameters: int
    wanted: int
    lora_parameters_per_rank: int

    @property
    def lora_rank(self) -> float:
        """The rank at which LoRA would train as many parameters."""
        return self.parameters / self.lora_parameters_per_rank


def genlora_ladder(config: GenLoRAConfig, shapes: Sequence[MatrixShape], parameters: int) -> Iterator[GenLoRAConfig]:
    """GenLoRA configurations of growing size, each one larger than the one before, for a budget.

    This is the one place that decides what grows first, after what was measured (docs/method.md):

    1. With one latent each rank and groups of B grow together, up to rank 64 with 8 groups. A has one group throughout.
    2. A latent more as soon as it fits at rank 64, B before A: 1 and 1, 1 and 2, 2 and 2, 2 and 3, … One latent is as
       much as a unit of LoRA's rank on its side.
    3. What is left goes into groups of B, up to 8, then into rank, up to 128, and then into more groups: unlike rank
       they cost no time. Neither has shown a gain there.

    Args:
        config: What all of them have in common.
        shapes: Of each adapted matrix.
        parameters: The budget, which decides the latents.
    """
    narrowest = min(min(shape) for shape in shapes)
    fewest_outputs = min(shape.out_features for shape in shapes)
    rank, groups = min(_RANK, narrowest), min(_GROUPS, fewest_outputs)
    latents = (1, 1)
    for a, b in ((number // 2, (number + 1) // 2) for number in itertools.count(2)):
        wider = replace(
            config, rank=rank, num_latents_a=a, num_latents_b=b, num_groups_a=1, num_groups_b=1, num_centers=1
        )
        if count(wider, shapes) > parameters:
            break
        latents = (a, b)
    base = replace(config, num_latents_a=latents[0], num_latents_b=latents[1], num_groups_a=1, num_centers=1)
    if latents == (1, 1):
        for small in range(1, rank):
            yield replace(base, rank=small, num_groups_b=max(1, groups * small // rank))
    for number in range(groups if latents == (1, 1) else 1, groups + 1):
        yield replace(base, rank=rank, num_groups_b=number)
    highest = min(_HIGHEST_RANK, narrowest)
    for larger in range(rank + 1, highest + 1):
        yield replace(base, rank=larger, num_groups_b=groups)
    for number in range(groups + 1, fewest_outputs + 1):
        yield replace(base, rank=highest, num_groups_b=number)


def rank_ladder(config: AdapterConfig, shapes: Sequence[MatrixShape], parameters: int) -> Iterator[AdapterConfig]:
    """Configurations of growing rank, with the scaling of the given one."""
    sides = [min(shape) for shape in shapes]
    highest = min(sides) if isinstance(config, PoLARConfig) else max(sides)
    for rank in range(config.rank_unit, highest + 1, config.rank_unit):
        alpha = config.alpha * rank / config.rank if config.scaling == "rank" else config.alpha
        yield replace(config, rank=rank, alpha=alpha)


_LADDERS: dict[type[AdapterConfig], Callable[..., Iterator[AdapterConfig]]] = {
    GenLoRAConfig: genlora_ladder,
    LoRAConfig: rank_ladder,
    PoLARConfig: rank_ladder,
    CompacterConfig: rank_ladder,
}


def count(config: AdapterConfig, shapes: Iterable[MatrixShape]) -> int:
    """Count the parameters that a configuration trains on some matrices."""
    return sum(config.count_all(s) for s in shapes) + config.count_shared()


def fit_budget(config: AdapterConfig, shapes: Sequence[MatrixShape], parameters: int) -> Budget:
    """Find the configuration whose parameters are closest to a number, and at most 5 % above it.

    Args:
        config: The kind, and what is not searched: scaling, kernel, initialisation, …
        shapes: Of each adapted matrix.
        parameters: The budget.

    Raises:
        ValueError: There is nothing to adapt, there are ranks or alphas by name or elastic ranks, the kind has no sizes
            to choose from, or the smallest configuration is above the budget; the message says by how much.
    """
    patterns = [name for name in ("rank_pattern", "alpha_pattern", "target_rows", "elastic") if getattr(config, name)]
    if patterns:
        raise ValueError(f"A budget decides one rank for all linears: leave out `{'` and `'.join(patterns)}`.")
    if not shapes:
        raise ValueError("There are no linears to adapt.")
    ladder = _LADDERS.get(type(config))
    if ladder is None:
        known = ", ".join(kind.__name__ for kind in _LADDERS)
        raise ValueError(f"A budget decides the sizes of {known}, and knows none for {type(config).__name__}.")
    per_rank = sum(shape.num_matrices * sum(shape) for shape in shapes)
    best: AdapterConfig | None = None
    best_size = 0
    for candidate in ladder(config, shapes, parameters):
        size = count(candidate, shapes)
        if size > ALLOWANCE * parameters:
            if best is None:
                raise ValueError(
                    f"The smallest {config.title} adapter on these {len(shapes)} linears has {size:,} parameters (LoRA "
                    f"of rank {size / per_rank:.2f} has as many), which is more than {parameters:,}. Adapt fewer "
                    "linears (`target_modules`), or give a larger budget."
                )
            break
        if best is None or abs(size - parameters) <= abs(best_size - parameters):
            best, best_size = candidate, size
    assert best is not None
    return Budget(config=best, parameters=best_size, wanted=parameters, lora_parameters_per_rank=per_rank)
