r"""Plan what a run takes on each GPU, and what it sends, from a model's configuration alone.

Notation: N GPUs; P values of the frozen base, of b bytes each (2 for bfloat16); T trainable values and A ≥ T values of
the adapters (fixed centres and widths too) and of modules trained in full, all float32; m micro-batches per optimizer
step. A *unit* is what FSDP shards and gathers at once: each of the model's repeated layers (of the encoder and of the
decoder, if it has both), and the root, which holds all else (embedding, head, norm). U is the largest layer's bytes, E
the root's, in the base's dtype.

Memory of one GPU:

=====================  ======================================================================================
base                   b·P, or b·P/N with FSDP
base, gathered         FSDP: E + 2·U: the root from its forward to its backward, a layer, and the next one, which is
                       fetched while the first computes
adapters               4·A, or 4·A/N with ``shard``
gradients              4·T, or 4·T/N; the base has none
optimizer              8·T, or 8·T/N: AdamW's two moments
buckets                DDP and ``replicate``: 4·T, the flat buffer in which gradients are averaged; one GPU: 0
activations            counted by running a step on fake tensors (:mod:`genlora_lightning.planning.activations`), all
                       positions predicted; with gradient checkpointing and without. The generated A and B of all layers
                       are among them, and live through the step with gradient checkpointing, too
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.backbone.architectures import build_on_meta, enable_gradient_checkpointing
from genlora_lightning.backbone.quantization import Quantization, quantized_bytes, quantized_linears
from genlora_lightning.injection.inject import inject_adapters
from genlora_lightning.planning.activations import count_generation, count_step
from genlora_lightning.planning.traffic import (
    FLOAT32,
    Setup,
    Sharding,
    Sizes,
    Strategy,
    Traffic,
    count_values,
    model_sizes,
    plan_traffic,
)
from genlora_lightning.text import text_table

USABLE = 0.9  # of a GPU's memory; the rest is for what is not counted
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU; the module's docstring has the formulas.

    ``factors`` is a part of ``activations``. ``activations_other_way`` is ``None`` for a model that does not support
    gradient checkpointing.
    """

    base: int
    base_gathered: int
    adapters: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    activations_other_way: int | None
    factors: int

    @property
    def total(self) -> int:
        """The sum."""
        parts = (self.base, self.base_gathered, self.adapters, self.gradients, self.optimizer, self.buckets)
        return sum(parts) + self.activations


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
        traffic: By kind and policy (``"genlora replicate"``, …): what is sent per optimizer step.
        layers: The number of FSDP units beside the root.
        remedy: If it does not fit: what would.
        quantization: Of the frozen base.
    """

    model: str
    config: AdapterConfig
    setup: Setup
    linears: int
    total_parameters: int
    trainable_parameters: int
    lora_parameters: int
    memory: Memory
    traffic: dict[str, Traffic]
    layers: int
    remedy: str | None = None
    quantization: Quantization | None = None

    @property
    def fits(self) -> bool:
        """Whether the sum stays below 90 % of a GPU's memory."""
        return _fits(self.memory, self.setup)

    @property
    def overlay(self) -> str | None:
        """The configuration file to add for the strategy; ``None`` for one GPU."""
        return None if self.setup.strategy == "single" else f"genlora:strategy/{self.setup.strategy}"

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


def make_plan(
    model_config: Any,
    name: str,
    task: str,
    config: AdapterConfig,
    setup: Setup,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> Plan:
    """Plan a run; the model is built on the meta device.

    Args:
        model_config: The model's transformers configuration.
        name: What to call it.
        task: ``"causal-lm"`` or ``"sequence-classification"``.
        config: The adapters.
        setup: The GPUs and the step.
        dtype: Of the frozen base; the configuration's if ``None``.
        trust_remote_code: Run the Python code that comes with the model.
        quantization: Of the frozen base, as the modules' argument. Its linears but the head are counted as they are
            stored (:func:`~genlora_lightning.backbone.quantization.quantized_bytes`), and not the numbers that one of
            them is turned into while it computes.

    Raises:
        ValueError: The adapters' configuration does not fit the model, a sharded strategy is to be planned for a
            quantized base, or gradient checkpointing for a model that does not support it.
    """
    if quantization is not None and (setup.is_sharded or setup.adapter_sharding == "shard"):
        raise ValueError(
            f"`quantization` is {quantization!r}, and {setup.strategy} cannot shard a quantized base: plan for "
            "`single` or `ddp`, with which each GPU has the whole base."
        )
    model = build_on_meta(model_config, task, dtype, trust_remote_code=trust_remote_code)
    can_checkpoint = bool(model.supports_gradient_checkpointing)
    if setup.gradient_checkpointing and not can_checkpoint:
        raise ValueError(
            f"`gradient_checkpointing` is True, and transformers' {type(model).__name__} does not support it: plan "
            "without it."
        )
    linears = {} if quantization is None else quantized_linears(model)
    report = inject_adapters(model, config)
    sizes = model_sizes(model)
    if quantization is not None:
        saved = sum(
            sizes.base_itemsize * shape.out_features * shape.in_features - quantized_bytes(quantization, shape)
            for shape in linears.values()
        )
        sizes = dataclasses.replace(sizes, base_saved=saved)
    labels = model_config.num_labels if task == "sequence-classification" else None
    model.train()
    counts = {}
    generation = count_generation(model, setup.autocast)
    for checkpointing in (False, True)[: 1 + can_checkpoint]:
        if checkpointing:
            enable_gradient_checkpointing(model)
        counts[checkpointing] = count_step(
            model, setup.batch, setup.tokens, autocast=setup.autocast, num_labels=labels, generation=generation
        )

    def memory(setup: Setup) -> Memory:
        here, other = (counts.get(on) for on in (setup.gradient_checkpointing, not setup.gradient_checkpointing))
        here = here or counts[False]  # a remedy that there is not, which changes nothing
        other_way = None if other is None else other.activations
        return _memory(sizes, setup, here.activations, here.factors, other_way)

    if setup.strategy == "auto" and quantization is not None:
        setup = dataclasses.replace(setup, strategy="single" if setup.gpus == 1 else "ddp")
    elif setup.strategy == "auto":
        setup = _simplest(setup, memory)
    held = memory(setup)
    cases: list[tuple[str, bool, Sharding]] = [
        (f"{config.kind} replicate", False, "replicate"),
        ("lora replicate", True, "replicate"),
    ]
    if setup.is_sharded:
        cases += [(f"{config.kind} shard", False, "shard"), ("lora shard", True, "shard")]
    return Plan(
        model=f"{name} ({type(model).__name__})",
        config=config,
        setup=setup,
        linears=len(report.adapted),
        total_parameters=report.total_parameters,
        trainable_parameters=report.trainable_parameters,
        lora_parameters=sizes.num_lora,
        memory=held,
        traffic={
            label: plan_traffic(sizes, setup, lora=lora, sharding=kind)
            for label, lora, kind in cases
            if not (lora and config.kind == "lora")  # it is that itself, but for what experts share or rows
        },
        layers=len(sizes.base) - 1,
        remedy=None if _fits(held, setup) else _remedy(setup, memory, can_shard=quantization is None),
        quantization=quantization,
    )


def _fits(memory: Memory, setup: Setup) -> bool:
    return memory.total <= USABLE * setup.gpu_memory * GIB


def _simplest(setup: Setup, memory: Callable[[Setup], Memory]) -> Setup:
    """The simplest strategy that fits; the one that takes least if none does."""
    if setup.gpus == 1 and setup.adapter_sharding == "replicate":
        return dataclasses.replace(setup, strategy="single")
    sharded = dataclasses.replace(setup, strategy="fsdp2")
    if setup.adapter_sharding == "shard":
        return sharded
    whole = dataclasses.replace(setup, strategy="ddp")
    return whole if _fits(memory(whole), whole) else sharded


def _remedy(setup: Setup, memory: Callable[[Setup], Memory], *, can_shard: bool = True) -> str:
    """What would fit: the least change of gradient checkpointing, strategy and number of GPUs."""
    sharded: list[Strategy] = ["fsdp2"] if can_shard else []
    strategies: list[Strategy] = sharded if setup.gpus == 1 else [setup.strategy, *sharded]
    numbers = [setup.gpus, *(n for n in (2**k for k in range(1, 11)) if n > setup.gpus and can_shard)]
    for gpus in numbers:
        choices: list[Strategy] = ["single"] if gpus == 1 else [*dict.fromkeys(strategies)]
        for strategy in choices:
            for checkpointing in dict.fromkeys((setup.gradient_checkpointing, True)):
                other = dataclasses.replace(
                    setup,
                    gpus=gpus,
                    strategy=strategy,
                    gradient_checkpointing=checkpointing,
                )
                held = memory(other)
                if _fits(held, other):
                    where = f"{gpus} GPU{'s' * (gpus > 1)}{'' if gpus == 1 else f' under {strategy}'}"
                    how = f", with{'' if checkpointing else 'out'} gradient checkpointing"
                    return f"It would fit on {where}{how}: {held.total / GIB:.1f} GiB on each."
    if not can_shard:
        return "A quantized base is whole on each GPU: take fewer tokens, a smaller micro-batch or fewer bits."
    held = memory(setup)
    least = min(held.activations, held.activations_other_way or held.activations)
    return (
        f"No number of GPUs changes that: the activations alone take {least / GIB:.1f} GiB. Take fewer tokens or a "
        "smaller micro-batch."
    )


def _memory(sizes: Sizes, setup: Setup, activations: int, factors: int, other_way: int | None) -> Memory:
    size, n = sizes.base_itemsize, setup.gpus if setup.is_sharded else 1
    whole = setup.adapter_sharding == "replicate" or not setup.is_sharded
    root, *blocks = (count_values([unit]) for unit in sizes.base)

    def share(values: int) -> int:
        return values if whole else -(-values // n)

    trainable = share(sizes.num_trainable)
    return Memory(
        base=size * -(-sizes.num_base // n) - sizes.base_saved,
        base_gathered=size * (root + sum(sorted(blocks)[-2:])) if n > 1 else 0,
        adapters=FLOAT32 * share(count_values(sizes.adapters)),
        gradients=FLOAT32 * trainable,
        optimizer=2 * FLOAT32 * trainable,
        buckets=FLOAT32 * sizes.num_trainable if setup.gpus > 1 and whole else 0,
        activations=activations,
        activations_other_way=other_way,
        factors=factors,
    )


def _how(plan: Plan) -> str:
    if plan.quantization is not None:
        return f", quantized: {plan.quantization}"
    return f", 1/{plan.setup.gpus} of it" if plan.setup.is_sharded and plan.setup.gpus > 1 else ""


def _text(plan: Plan) -> str:
    setup, memory = plan.setup, plan.memory
    sharded = setup.is_sharded
    other = "without gradient checkpointing" if setup.gradient_checkpointing else "with gradient checkpointing"
    rows = [
        (f"base{_how(plan)}", memory.base),
        ("base, gathered: root and two layers", memory.base_gathered),
        (f"adapters{', sharded' if setup.adapter_sharding == 'shard' else ''}", memory.adapters),
        ("gradients (adapters only)", memory.gradients),
        ("optimizer: AdamW's two moments", memory.optimizer),
        ("buckets of the all-reduce", memory.buckets),
        (f"activations, {setup.batch} x {setup.tokens} tokens", memory.activations),
        ("  of these, factors A and B", memory.factors),
        ("total", memory.total),
    ]
    kind = setup.strategy + (f", adapters {setup.adapter_sharding}d".replace("shardd", "sharded") if sharded else "")
    is_other = plan.trainable_parameters != plan.lora_parameters
    beside = f"; LoRA of that rank {plan.lora_parameters:,}" if is_other else ""
    ranks = f"rank {plan.config.rank}{' and others by name' if plan.config.rank_pattern else ''}"
    lines = [
        f"{plan.model}: {plan.total_parameters:,} parameters. {plan.config.title} of {ranks} trains "
        f"{plan.trainable_parameters:,} on {plan.linears} linears{beside}.",
        f"{setup.gpus} GPU{'s' * (setup.gpus > 1)}, {kind}; "
        f"{'bfloat16 autocast' if setup.autocast else 'no autocast'}; "
        f"{'with' if setup.gradient_checkpointing else 'without'} gradient checkpointing.",
        "",
        text_table(("each GPU holds", "GiB"), [(label, f"{value / GIB:.3f}") for label, value in rows]),
        "(the model does not support gradient checkpointing)"
        if memory.activations_other_way is None
        else f"({other} activations take {memory.activations_other_way / GIB:.3f} GiB)",
        "",
    ]
    if setup.gpus > 1:
        lines += [
            text_table(
                ("each GPU sends per optimizer step (MB, ring)", "adapters", "frozen base"),
                [(label, f"{t.sent / 1e6:,.3f}", f"{t.base_sent / 1e6:,.1f}") for label, t in plan.traffic.items()],
            ),
            "adapters: replicate, one all-reduce of the gradients; shard, gathered and scattered in each micro-batch",
            "frozen base: gathered in forward and backward of each micro-batch; the same for LoRA",
            "",
        ]
    limit = USABLE * setup.gpu_memory
    verdict = "It fits" if plan.fits else "It does not fit"
    lines.append(
        f"{verdict}: {memory.total / GIB:.1f} of {limit:.1f} GiB (90 % of {setup.gpu_memory:g}; the rest is for what "
        "is not counted)."
    )
    if plan.remedy:
        lines.append(plan.remedy)
    if plan.overlay:
        sizes = "devices * num_nodes" + (" = data_parallel_size" if setup.strategy == "fsdp2" else "")
        lines.append(f"Configuration: add --config {plan.overlay}, with {sizes} = {setup.gpus}.")
    return "\n".join(lines)
