"""From a number of parameters to rank, groups and centres of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from genlora_lightning.config import GenLoRAConfig

ALLOWANCE = 1.05
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


def ladder(config: GenLoRAConfig, linears: Sequence[tuple[int, int]]) -> Iterator[GenLoRAConfig]:
    """Configurations of growing size, each one a little larger than the one before.

    This is the one place that decides what grows first. Rank and groups grow together, two units of rank for each
    group, as in the defaults (rank 16, 8 groups): in our measurements groups are what quality came from, and rank
    beyond that cost parameters and brought little. Centres grow when the rank has reached the smallest linear's size.

    Args:
        config: What all of them have in common.
        linears: ``(in_features, out_features)`` of each adapted linear.
    """
    largest = min(min(shape) for shape in linears)
    for rank in range(1, largest + 1):
        yield replace(config, rank=rank, num_groups=(rank + 1) // 2, num_centers=1)
    for centers in range(2, largest + 1):
        yield replace(config, rank=largest, num_groups=(largest + 1) // 2, num_centers=centers)


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
    for candidate in ladder(config, linears):
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
