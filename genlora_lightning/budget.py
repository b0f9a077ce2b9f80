"""From a number of parameters to the latents, rank and groups of an adapter."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from genlora_lightning.config import GenLoRAConfig

ALLOWANCE = 1.05
_RANK, _HIGHEST_RANK, _GROUPS = 64, 128, 8
# The fields that a budget decides.
SIZES = ("rank", "num_latents_a", "num_latents_b", "num_groups_a", "num_groups_b", "num_centers")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A configuration that meets a budget.

    Args:
        config: The configuration.
        parameters: What it trains.
        wanted: What was asked for.
        lora_parameters_per_rank: What one more unit of LoRA's rank would train on the same linears.
    """

    config: GenLoRAConfig
    parameters: int
    wanted: int
    lora_parameters_per_rank: int

    @property
    def lora_rank(self) -> float:
        """The rank at which LoRA would train as many parameters."""
        return self.parameters / self.lora_parameters_per_rank


def ladder(config: GenLoRAConfig, linears: Sequence[tuple[int, int]], parameters: int) -> Iterator[GenLoRAConfig]:
    """Configurations of growing size, each one larger than the one before, for a budget.

    This is the one place that decides what grows first, after what was measured (docs/method.md):

    1. With one latent each rank and groups of B grow together, up to rank 64 with 8 groups. A has one group throughout.
    2. A latent more as soon as it fits at rank 64, B before A: 1 and 1, 1 and 2, 2 and 2, 2 and 3, … One latent is as
       much as a unit of LoRA's rank on its side.
    3. What is left goes into groups of B, up to 8, then into rank, up to 128, and then into more groups: unlike rank
       they cost no time. Neither has shown a gain there.

    Args:
        config: What all of them have in common.
        linears: ``(in_features, out_features)`` of each adapted linear.
        parameters: The budget, which decides the latents.
    """
    narrowest = min(min(shape) for shape in linears)
    fewest_outputs = min(outputs for _, outputs in linears)
    rank, groups = min(_RANK, narrowest), min(_GROUPS, fewest_outputs)
    latents = (1, 1)
    for a, b in ((number // 2, (number + 1) // 2) for number in itertools.count(2)):
        wider = replace(
            config, rank=rank, num_latents_a=a, num_latents_b=b, num_groups_a=1, num_groups_b=1, num_centers=1
        )
        if count(wider, linears) > parameters:
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


def count(config: GenLoRAConfig, linears: Iterable[tuple[int, int]]) -> int:
    """Parameters that a configuration trains on some linears."""
    return sum(config.count_parameters(inputs, outputs) for inputs, outputs in linears)


def fit_budget(config: GenLoRAConfig, linears: Sequence[tuple[int, int]], parameters: int) -> Budget:
    """The configuration on the :func:`ladder` whose parameters are closest to a number, and at most 5 % above it.

    Args:
        config: What is not searched: scaling, kernel, initialisation, …
        linears: ``(in_features, out_features)`` of each adapted linear.
        parameters: The budget.

    Raises:
        ValueError: There are no linears, or the smallest configuration is above the budget; the message says by how
            much.
    """
    if not linears:
        raise ValueError("There are no linears to adapt.")
    per_rank = sum(inputs + outputs for inputs, outputs in linears)
    best: GenLoRAConfig | None = None
    best_size = 0
    for candidate in ladder(config, linears, parameters):
        size = count(candidate, linears)
        if size > ALLOWANCE * parameters:
            if best is None:
                raise ValueError(
                    f"The smallest adapter on these {len(linears)} linears has {size:,} parameters (a latent entry for "
                    f"each input and output; LoRA of rank {size / per_rank:.2f} has as many), which is more than "
                    f"{parameters:,}. Adapt fewer linears (`target_modules`), or give a larger budget."
                )
            break
        if best is None or abs(size - parameters) <= abs(best_size - parameters):
            best, best_size = candidate, size
    assert best is not None
    return Budget(config=best, parameters=best_size, wanted=parameters, lora_parameters_per_rank=per_rank)
