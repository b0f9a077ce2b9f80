"""Count the values in the collectives of an optimizer step from parameter shapes (formulas: ``plan``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import nn

from genlora_lightning.distributed.collectives import transformer_blocks
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.layers.adapted import AdaptedLayer

Strategy = Literal["auto", "single", "ddp", "fsdp1", "fsdp2"]
Sharding = Literal["replicate", "shard"]
Shape = tuple[int, ...]
FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run is spread over GPUs, and what a step of it holds.

    Args:
        strategy: ``"single"``, ``"ddp"``, ``"fsdp1"`` or ``"fsdp2"``; ``"auto"`` leaves it to :func:`make_plan`: the
            simplest that fits, which is a single GPU, else DDP, else FSDP2.
        adapter_sharding: With FSDP: whether the adapters are replicated or sharded.
        gpus: Number of GPUs.
        gpu_memory: Memory of each, GiB.
        batch: Sequences in a micro-batch of one GPU.
        tokens: Length of a sequence.
        accumulate: Micro-batches of an optimizer step.
        autocast: Matrix products in bfloat16 (``precision: bf16-mixed``).
        gradient_checkpointing: Whether activations are computed again in the backward pass.

    Raises:
        ValueError: A value is out of its range, or does not fit the strategy.
    """

    strategy: Strategy = "auto"
    adapter_sharding: Sharding = "replicate"
    gpus: int = 1
    gpu_memory: float = 80.0
    batch: int = 1
    tokens: int = 2048
    accumulate: int = 1
    autocast: bool = True
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "gpu_memory", "batch", "tokens", "accumulate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be greater than 0, got {getattr(self, name)}.")
        if self.strategy == "single" and self.gpus > 1:
            raise ValueError(f"The strategy 'single' is for one GPU, got {self.gpus}. Choose ddp, fsdp1 or fsdp2.")
        if self.adapter_sharding == "shard" and not self.is_sharded and self.strategy != "auto":
            raise ValueError(f"Adapters are sharded by fsdp1 and fsdp2, not by {self.strategy!r}. Choose replicate.")

    @property
    def is_sharded(self) -> bool:
        """Whether the base is sharded."""
        return self.strategy in ("fsdp1", "fsdp2")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The parameter shapes of a model with adapters, by FSDP unit: one list per layer, the root's first.

    ``base_saved`` are the bytes that a quantized base takes less than its shapes say.
    """

    base: list[list[Shape]]
    adapters: list[list[Shape]]
    trainable: list[list[Shape]]
    lora: list[list[Shape]]
    base_itemsize: int
    base_saved: int = 0

    @property
    def num_base(self) -> int:
        """P."""
        return count_values(self.base)

    @property
    def num_trainable(self) -> int:
        """T."""
        return count_values(self.trainable)

    @property
    def num_lora(self) -> int:
        """What LoRA of the same rank would train, with the modules trained in full."""
        return count_values(self.lora)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one optimizer step: values in them, and the bytes that each GPU sends.

    Args:
        all_reduced: Values in all-reduces.
        reduce_scattered: Values that reduce-scatters start from, padding included.
        gathered: Adapter values that all-gathers result in, padding included.
        base_gathered: The same of the frozen base.
        sent: Bytes that each GPU sends for the adapters, with ring algorithms.
        base_sent: The same for the frozen base.
    """

    all_reduced: int = 0
    reduce_scattered: int = 0
    gathered: int = 0
    base_gathered: int = 0
    sent: int = 0
    base_sent: int = 0


def model_sizes(model: nn.Module) -> Sizes:
    """Collect the parameter shapes of a model with adapters by FSDP unit."""
    blocks = transformer_blocks(model)  # as `shard_with_fsdp2` and FSDP1's strategy ask for them
    unit_of = {id(m): index for index, block in enumerate(blocks, 1) for m in block.modules()}
    layers = list(adapter_layers(model).values())
    full = {id(p): p for module in trained_modules(model).values() for p in module.parameters()}
    rows = [layer for layer in layers if layer.config.is_derived]
    full |= {id(p): p for layer in rows for p in layer.adapter_parameters().values()}
    own = {id(p) for layer in layers for p in layer.adapter_parameters().values()} | set(full)
    count = len(blocks) + 1
    base: list[list[Shape]] = [[] for _ in range(count)]
    adapters: list[list[Shape]] = [[] for _ in range(count)]
    trainable: list[list[Shape]] = [[] for _ in range(count)]
    lora: list[list[Shape]] = [[] for _ in range(count)]
    seen: set[int] = set()
    itemsize = 0
    for module in model.modules():
        unit = unit_of.get(id(module), 0)
        if isinstance(module, AdaptedLayer) and module not in rows:
            rank, several = module.config.rank, module.shape.sizes[:-2]
            lora[unit] += [(*several, rank, module.in_features), (*several, module.out_features, rank)]
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            shape = tuple(parameter.shape)
            if id(parameter) not in own:
                base[unit].append(shape)
                itemsize = max(itemsize, parameter.element_size())
                continue
            adapters[unit].append(shape)
            if parameter.requires_grad:
                trainable[unit].append(shape)
            if id(parameter) in full:
                lora[unit].append(shape)
    return Sizes(base=base, adapters=adapters, trainable=trainable, lora=lora, base_itemsize=itemsize)


def plan_traffic(sizes: Sizes, setup: Setup, *, lora: bool = False, sharding: Sharding | None = None) -> Traffic:
    """Collectives of one optimizer step.

    Args:
        sizes: The model's.
        setup: Strategy, GPUs, accumulation.
        lora: For LoRA of the same rank in place of GenLoRA.
        sharding: In place of the setup's ``adapter_sharding``.
    """
    n, steps = setup.gpus, setup.accumulate
    if n == 1:
        return Traffic()
    adapters, trainable = (sizes.lora, sizes.lora) if lora else (sizes.adapters, sizes.trainable)
    base_gathered = 0
    if setup.is_sharded:
        root, *blocks = (_padded(unit, n) for unit in sizes.base)
        base_gathered = steps * (root + 2 * sum(blocks))
    share = (n - 1) / n
    base_sent = round(share * base_gathered * sizes.base_itemsize)
    if (sharding or setup.adapter_sharding) == "replicate" or not setup.is_sharded:
        reduced = count_values(trainable)
        sent = round(2 * share * reduced * FLOAT32)
        return Traffic(all_reduced=reduced, base_gathered=base_gathered, sent=sent, base_sent=base_sent)
    root, *blocks = (_padded(unit, n) for unit in adapters)
    gathered = steps * (root + 2 * sum(blocks))
    scattered = steps * sum(_padded(unit, n) for unit in trainable)
    return Traffic(
        reduce_scattered=scattered,
        gathered=gathered,
        base_gathered=base_gathered,
        sent=round(share * (gathered + scattered) * FLOAT32),
        base_sent=base_sent,
    )


def count_values(units: Iterable[Iterable[Shape]]) -> int:
    """The number of values in parameters of these shapes."""
    return sum(prod(shape) for unit in units for shape in unit)


def _padded(unit: Iterable[Shape], n: int) -> int:
    """Values of a unit with each first dimension padded to a multiple of ``n``, as FSDP2 has them."""
    return sum(-(-shape[0] // n) * n * prod(shape[1:]) for shape in unit)
