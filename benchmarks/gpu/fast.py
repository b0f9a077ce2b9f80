"""How fast: training steps, memory, kernels, and decoding one token at a time, beside PEFT's LoRA and the frozen base.

The models are Llama's shapes with random bfloat16 weights, made on the device. All arms share them and take turns.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.speed.counts import Operators
from benchmarks.speed.models import Arm, base_of, load_base, make_arm, targets
from benchmarks.speed.plan import Cell
from benchmarks.speed.timing import Options, generator_task, interleave, measure_inference
from genlora_lightning import GenLoRAConfig
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.backbone.architectures import repeated_blocks
from genlora_lightning.planning.budget import fit_budget

from .rows import Rows

LIKE_LORA_RANKS = (1.05, 1.5, 2.0)  # budgets for which groups are proposed
STEP_ARMS = ("floor", "lora", "lora-bf16", "genlora", "our-lora")
DECODE_ARMS = ("base", "lora", "lora-bf16", "genlora", "genlora-merged")


@dataclass(frozen=True)
class Setting:
    """A cell, and what is done with it.

    Args:
        cell: Model, rank, tokens and arms.
        compiled: Whether each block is compiled.
        groups: Whether there is an arm for each number of groups that is proposed for the model.
    """

    cell: Cell
    compiled: bool = False
    groups: bool = False

    @property
    def name(self) -> str:
        """Its name in the tables."""
        return self.cell.key + (" compiled" if self.compiled else "")


def plan(tiny: bool) -> list[Setting]:
    """What is measured, the most worth knowing first."""
    if tiny:
        step = Cell(kind="step", model="tiny", precision="bf16", rank=4, batch=1, tokens=8, arms=STEP_ARMS)
        decode = replace(step, kind="generate", arms=DECODE_ARMS, new_tokens=2)
        return [Setting(step, groups=True), Setting(decode), Setting(replace(step, checkpointing=True))]

    def step(size: str, rank: int, *, groups: bool = False, compiled: bool = False, checkpointing: bool = False) -> Any:
        is_short = compiled or checkpointing or rank > 64
        arms = tuple(arm for arm in STEP_ARMS if not (is_short and arm in ("lora-bf16", "our-lora")))
        cell = Cell(
            kind="step",
            model=f"random-{size}",
            precision="bf16",
            rank=rank,
            batch=1,
            tokens=2048,
            arms=arms,
            checkpointing=checkpointing,
        )
        return Setting(cell, compiled, groups)

    def decode(size: str, rank: int) -> Setting:
        cell = replace(step(size, rank).cell, kind="generate", tokens=64, new_tokens=16, arms=DECODE_ARMS)
        return Setting(cell)

    return [
        step("8b", 16, groups=True),
        step("8b", 64, groups=True),
        decode("8b", 16),
        step("8b", 256),
        step("8b", 64, checkpointing=True),
        step("1b", 16),
        step("1b", 64, groups=True),
        decode("1b", 64),
        step("smollm2", 16),
        step("smollm2", 64, groups=True),
        decode("smollm2", 16),
        step("1b", 256),
        step("1b", 64, checkpointing=True),
        # Last, because to compile takes long.
        step("1b", 64, compiled=True),
        step("8b", 64, compiled=True),
        step("smollm2", 64, compiled=True),
    ]


def run(rows: Rows, *, tiny: bool) -> bool:
    """Measure all that is missing; whether all was measured."""
    rounds, warmup = (2, 1) if tiny else (7, 2)
    options = Options(rounds=rounds, warmup=warmup, repeats=1, threads=torch.get_num_threads(), device=rows.device)
    done = True
    before = ""
    for setting in plan(tiny):
        if before != setting.cell.model:
            load_base.cache_clear()
        before = setting.cell.model
        given = {**asdict(setting), "rounds": rounds, "warmup": warmup}
        done &= rows.measure("fast", setting.name, given, lambda setting=setting: _measure(setting, options))
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return done


def _measure(setting: Setting, options: Options) -> dict[str, Any]:
    if setting.cell.kind == "generate":
        return {name: {"seconds": arm["seconds"]} for name, arm in measure_inference(setting.cell, options).items()}
    cell = setting.cell
    if setting.groups:
        cell = replace(cell, arms=(*cell.arms, *(f"genlora-g{n}" for n in proposed_groups(cell, options.device))))
    arms = {name: make_arm(name, cell, options.device) for name in cell.arms}
    if setting.compiled:
        for arm in arms.values():
            for block in repeated_blocks(arm.model) or ():
                block.compile()
    found: dict[str, dict[str, Any]] = {name: {} for name in arms}
    for arm in arms.values():
        arm.step()  # so that the optimizer has its state
    for name, arm in arms.items():
        others = sum(own_bytes(other) for other in arms.values() if other is not arm)
        found[name]["peak_bytes"] = _peak_bytes(arm, others, options.device)
        found[name]["own_bytes"] = own_bytes(arm)
    tasks: dict[str, Any] = {name: arm.step for name, arm in arms.items()}
    if not setting.compiled:  # there each layer generates for itself, in its own graph
        tasks["generator"] = generator_task(arms["genlora"])
    for name, seconds in interleave(tasks, options).items():
        found.setdefault(name, {})["seconds"] = seconds
    for name, arm in arms.items():
        found[name]["launches"] = _launches(arm, options.device)
    return found


def proposed_groups(cell: Cell, device: str) -> Iterator[int]:
    """Numbers of groups that a budget gives on a model's linears, besides the default."""
    base = base_of("base", cell, device)
    linears = [base.get_submodule(name) for name in targets(base)]
    shapes = [MatrixShape(linear.out_features, linear.in_features) for linear in linears]
    unit = sum(map(sum, shapes))
    config = GenLoRAConfig()
    found = {fit_budget(config, shapes, round(like * unit)).config.num_groups_b for like in LIKE_LORA_RANKS}
    yield from sorted(found - {config.num_groups_b})


def own_bytes(arm: Arm) -> int:
    """Bytes of what an arm trains and of its optimizer's state."""
    tensors = [parameter for parameter in arm.model.parameters() if parameter.requires_grad]
    if arm.optimizer is not None:
        tensors += [v for state in arm.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _peak_bytes(arm: Arm, others: int, device: str) -> int | None:
    """Peak of a step as it would be without the other arms; unknown on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    arm.step()
    return torch.cuda.max_memory_allocated() - others


def _launches(arm: Arm, device: str) -> int | None:
    """Kernels of a step (on a CPU operators); unknown where nothing can be profiled."""
    if torch.device(device).type != "cuda":
        with Operators() as operators:
            arm.step()
        return operators.total
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        arm.step()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None
