r"""What a run takes on each GPU, and what it sends, before there is a GPU: from a model's configuration alone.

Notation: N GPUs; P values of the frozen base, of b bytes each (2 for bfloat16); T trainable values and A ≥ T values of
the adapters (fixed centres and widths too) and of modules trained in full, all float32; m micro-batches per optimizer
step. A *unit* is what FSDP shards and gathers at once: each of the model's repeated layers, and the root, which holds
all else (embedding, head, norm). U is the largest layer's bytes, E the root's, in the base's dtype.

Memory of one GPU:

=====================  ======================================================================================
base                   b·P, or b·P/N with FSDP
base, gathered         FSDP: E + 2·U: the root from its forward to its backward, a layer, and the next one, which is
                       fetched while the first computes
adapters               4·A, or 4·A/N with ``shard``
gradients              4·T, or 4·T/N; the base has none
optimizer              8·T, or 8·T/N: AdamW's two moments
buckets                DDP and ``replicate``: 4·T, the flat buffer in which gradients are averaged; one GPU: 0
activations            counted by running a step on fake tensors (:mod:`genlora_lightning.activations`), all
                       positions predicted; with gradient checkpointing and without
=====================  ======================================================================================

Values in collectives, per optimizer step:

=====================  ======================================================================================
adapters               ``replicate`` and DDP: one all-reduce of T. ``shard``: in each unit an all-gather of A in forward
                       and backward of each micro-batch, and a reduce-scatter of T in each backward
base                   FSDP only: all-gathers in the forward and the backward of each micro-batch: 2·P, except that the
                       root stays whole in between (1 × its part)
=====================  ======================================================================================

FSDP2 pads the first dimension of each parameter to a multiple of N; the values counted are the padded ones, exactly.
FSDP1 pads units and aligns parameters, which is not counted: a few values per parameter more. *Sent* bytes are those
that each GPU puts on the wire with ring algorithms: 2·(N−1)/N of an all-reduce's bytes, (N−1)/N of what an all-gather
results in or a reduce-scatter starts from. LoRA's figures are those of the same rank on the same linears, with the same
strategies; its base is gathered as ours is.

Not counted: the device's context, buffers inside kernels and in the communication library, what a memory allocator
keeps in reserve. A tenth of the GPU's memory is left for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import nn

from genlora_lightning.activations import count_step
from genlora_lightning.architectures import build_on_meta, enable_gradient_checkpointing, repeated_blocks
from genlora_lightning.config import GenLoRAConfig
from genlora_lightning.full_training import trained_modules
from genlora_lightning.injection import adapter_layers, inject_adapters
from genlora_lightning.layers import GenLoRALinear
from genlora_lightning.tables import text_table

Strategy = Literal["single", "ddp", "fsdp1", "fsdp2"]
Sharding = Literal["replicate", "shard"]
Shape = tuple[int, ...]
FLOAT32 = 4
USABLE = 0.9  # of a GPU's memory; the rest is for what is not counted
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run is spread over GPUs, and what a step of it holds.

    Args:
        strategy: ``"single"``, ``"ddp"``, ``"fsdp1"`` or ``"fsdp2"``.
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

    strategy: Strategy = "single"
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
        if self.adapter_sharding == "shard" and not self.is_sharded:
            raise ValueError(f"Adapters are sharded by fsdp1 and fsdp2, not by {self.strategy!r}. Choose replicate.")

    @property
    def is_sharded(self) -> bool:
        """Whether the base is sharded."""
        return self.strategy in ("fsdp1", "fsdp2")


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


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU; the module's docstring has the formulas. ``factors`` is a part of ``activations``."""

    base: int
    base_gathered: int
    adapters: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    activations_other_way: int
    factors: int

    @property
    def total(self) -> int:
        """The sum."""
        parts = (self.base, self.base_gathered, self.adapters, self.gradients, self.optimizer, self.buckets)
        return sum(parts) + self.activations


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The parameter shapes of a model with adapters, by FSDP unit: one list per layer, the root's first."""

    base: list[list[Shape]]
    adapters: list[list[Shape]]
    trainable: list[list[Shape]]
    lora: list[list[Shape]]
    base_itemsize: int

    @property
    def num_base(self) -> int:
        """P."""
        return _values(self.base)

    @property
    def num_trainable(self) -> int:
        """T."""
        return _values(self.trainable)

    @property
    def num_lora(self) -> int:
        """What LoRA of the same rank would train, with the modules trained in full."""
        return _values(self.lora)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run takes and sends; ``print`` it for a table.

    Args:
        model: The model's name and class.
        config: The adapters' configuration.
        setup: The GPUs and the step.
        linears: Number of adapted linears.
        total_parameters: Of the model with adapters.
        trainable_parameters: T.
        lora_parameters: What LoRA of the same rank would train.
        memory: Bytes on one GPU.
        traffic: By name (``"genlora replicate"``, …): what is sent per optimizer step.
        layers: The number of FSDP units beside the root.
    """

    model: str
    config: GenLoRAConfig
    setup: Setup
    linears: int
    total_parameters: int
    trainable_parameters: int
    lora_parameters: int
    memory: Memory
    traffic: dict[str, Traffic]
    layers: int

    @property
    def fits(self) -> bool:
        """Whether the sum stays below 90 % of a GPU's memory."""
        return self.memory.total <= USABLE * self.setup.gpu_memory * GIB

    @property
    def overlay(self) -> str | None:
        """The configuration file to add for the strategy; ``None`` for one GPU."""
        return None if self.setup.strategy == "single" else f"configs/strategy/{self.setup.strategy}.yaml"

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; memory in bytes."""
        return {
            **dataclasses.asdict(self),
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
            "overlay": self.overlay,
        }

    def __str__(self) -> str:
        return _text(self)


def model_sizes(model: nn.Module) -> Sizes:
    """Collect a model's parameter shapes by FSDP unit."""
    blocks = list(repeated_blocks(model) or [])
    unit_of = {id(m): index for index, block in enumerate(blocks, 1) for m in block.modules()}
    layers = list(adapter_layers(model).values())
    full = {id(p): p for module in trained_modules(model).values() for p in module.parameters()}
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
        if isinstance(module, GenLoRALinear):
            rank = module.config.rank
            lora[unit] += [(rank, module.in_features), (module.out_features, rank)]
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
        reduced = _values(trainable)
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


def make_plan(
    model_config: Any,
    name: str,
    task: str,
    config: GenLoRAConfig,
    setup: Setup,
    *,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plan a run; the model is built on the meta device.

    Args:
        model_config: The model's transformers configuration.
        name: What to call it.
        task: ``"causal-lm"`` or ``"sequence-classification"``.
        config: The adapters.
        setup: The GPUs and the step.
        dtype: Of the frozen base; the configuration's if ``None``.

    Raises:
        ValueError: The adapters' configuration does not fit the model.
    """
    model = build_on_meta(model_config, task, dtype)
    report = inject_adapters(model, config)
    sizes = model_sizes(model)
    labels = model_config.num_labels if task == "sequence-classification" else None
    model.train()
    counts = {}
    for checkpointing in (False, True):
        if checkpointing:
            enable_gradient_checkpointing(model)
        step = count_step(model, setup.batch, setup.tokens, autocast=setup.autocast, num_labels=labels)
        counts[checkpointing] = step
    here = counts[setup.gradient_checkpointing]
    cases: list[tuple[str, bool, Sharding]] = [
        ("genlora replicate", False, "replicate"),
        ("lora replicate", True, "replicate"),
    ]
    if setup.is_sharded:
        cases += [("genlora shard", False, "shard"), ("lora shard", True, "shard")]
    return Plan(
        model=f"{name} ({type(model).__name__})",
        config=config,
        setup=setup,
        linears=len(report.adapted),
        total_parameters=report.total_parameters,
        trainable_parameters=report.trainable_parameters,
        lora_parameters=sizes.num_lora,
        memory=_memory(
            sizes, setup, here.activations, here.factors, counts[not setup.gradient_checkpointing].activations
        ),
        traffic={label: plan_traffic(sizes, setup, lora=lora, sharding=kind) for label, lora, kind in cases},
        layers=len(sizes.base) - 1,
    )


def _memory(sizes: Sizes, setup: Setup, activations: int, factors: int, other_way: int) -> Memory:
    size, n = sizes.base_itemsize, setup.gpus if setup.is_sharded else 1
    whole = setup.adapter_sharding == "replicate" or not setup.is_sharded
    root, *blocks = (_values([unit]) for unit in sizes.base)

    def share(values: int) -> int:
        return values if whole else -(-values // n)

    trainable = share(sizes.num_trainable)
    return Memory(
        base=size * -(-sizes.num_base // n),
        base_gathered=size * (root + sum(sorted(blocks)[-2:])) if n > 1 else 0,
        adapters=FLOAT32 * share(_values(sizes.adapters)),
        gradients=FLOAT32 * trainable,
        optimizer=2 * FLOAT32 * trainable,
        buckets=FLOAT32 * sizes.num_trainable if setup.gpus > 1 and whole else 0,
        activations=activations,
        activations_other_way=other_way,
        factors=factors,
    )


def _values(units: Iterable[Iterable[Shape]]) -> int:
    return sum(prod(shape) for unit in units for shape in unit)


def _padded(unit: Iterable[Shape], n: int) -> int:
    """Values of a unit with each first dimension padded to a multiple of ``n``, as FSDP2 has them."""
    return sum(-(-shape[0] // n) * n * prod(shape[1:]) for shape in unit)


def _text(plan: Plan) -> str:
    setup, memory = plan.setup, plan.memory
    sharded = setup.is_sharded
    other = "without gradient checkpointing" if setup.gradient_checkpointing else "with gradient checkpointing"
    rows = [
        (f"base{f', 1/{setup.gpus} of it' if sharded and setup.gpus > 1 else ''}", memory.base),
        ("base, gathered: root and two layers", memory.base_gathered),
        (f"adapters{', sharded' if setup.adapter_sharding == 'shard' else ''}", memory.adapters),
        ("gradients (adapters only)", memory.gradients),
        ("optimizer: AdamW's two moments", memory.optimizer),
        ("buckets of the all-reduce", memory.buckets),
        (f"activations, {setup.batch} x {setup.tokens} tokens", memory.activations),
        ("  of these, generated factors", memory.factors),
        ("total", memory.total),
    ]
    kind = setup.strategy + (f", adapters {setup.adapter_sharding}d".replace("shardd", "sharded") if sharded else "")
    lines = [
        f"{plan.model}: {plan.total_parameters:,} parameters. GenLoRA of rank {plan.config.rank} trains "
        f"{plan.trainable_parameters:,} on {plan.linears} linears; LoRA of that rank {plan.lora_parameters:,}.",
        f"{setup.gpus} GPU{'s' * (setup.gpus > 1)}, {kind}; "
        f"{'bfloat16 autocast' if setup.autocast else 'no autocast'}; "
        f"{'with' if setup.gradient_checkpointing else 'without'} gradient checkpointing.",
        "",
        text_table(("each GPU holds", "GiB"), [(label, f"{value / GIB:.3f}") for label, value in rows]),
        f"({other} activations take {memory.activations_other_way / GIB:.3f} GiB)",
        "",
    ]
    if setup.gpus > 1:
        lines += [
            text_table(
                ("each GPU sends per optimizer step (MB, ring)", "adapters", "frozen base"),
                [(label, f"{t.sent / 1e6:,.3f}", f"{t.base_sent / 1e6:,.1f}") for label, t in plan.traffic.items()],
            ),
            "adapters: replicate, one all-reduce of the gradients; shard, gathered and reduce-scattered per micro-batch.",
            "frozen base: gathered in forward and backward of each micro-batch; the same for LoRA.",
            "",
        ]
    limit = USABLE * setup.gpu_memory
    verdict = "It fits" if plan.fits else "It does not fit"
    lines.append(
        f"{verdict}: {memory.total / GIB:.1f} of {limit:.1f} GiB (90 % of {setup.gpu_memory:g}; the rest is for what "
        "is not counted)."
    )
    if plan.overlay:
        sizes = "devices * num_nodes" + (" = data_parallel_size" if setup.strategy == "fsdp2" else "")
        lines.append(f"Configuration: add --config {plan.overlay}, with {sizes} = {setup.gpus}.")
    return "\n".join(lines)
