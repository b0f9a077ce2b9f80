"""From a number of parameters to the latents, groups and rank of an adapter."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from genlora_lightning.config import GenLoRAConfig

ALLOWANCE = 1.05
_RANK, _FEW_GROUPS, _MANY_GROUPS = 16, 8, 48
# The fields that a budget decides.
SIZES = ("rank", "num_latents_a", "num_latents_b", "num_groups", "num_centers")


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

    1. Up to rank 16 with 8 groups, rank and groups grow together, with one latent each.
    2. A latent more as soon as it fits at that size. B gets them first, up to twice A's: 1 and 1, 1 and 2, 2 and 3, 2
       and 4, 3 and 5, … One latent is as much as a unit of LoRA's rank.
    3. What is left goes into groups, at rank 16 up to 48 of them, then into rank and groups together.

    Args:
        config: What all of them have in common.
        linears: ``(in_features, out_features)`` of each adapted linear.
        parameters: The budget, which decides the latents.
    """
    largest = min(min(shape) for shape in linears)
    rank, groups = min(_RANK, largest), min(_FEW_GROUPS, largest)
    latents = (1, 1)
    for b in itertools.count(1):
        a = (b + 1) // 2
        wider = replace(config, rank=rank, num_latents_a=a, num_latents_b=b, num_groups=groups, num_centers=1)
        if count(wider, linears) > parameters:
            break
        latents = (a, b)
    base = replace(config, num_latents_a=latents[0], num_latents_b=latents[1], num_centers=1)
    if latents == (1, 1):
        for small in range(1, rank):
            yield replace(base, rank=small, num_groups=(small + 1) // 2)
    most = min(_MANY_GROUPS, largest)
    for number in range(groups, most + 1):
        yield replace(base, rank=rank, num_groups=number)
    for larger in range(rank + 1, largest + 1):
        yield replace(base, rank=larger, num_groups=max(most, min(largest, most * larger // rank)))


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
