"""Draw the pictures of sizes: parameters over rank, memory and traffic of GenLoRA beside LoRA. All of it is counted.

`python docs/_pictures.py` writes them to docs/images (extra `plots`; minutes, no GPU).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from genlora_lightning import GenLoRAConfig, LoRAConfig
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.backbone.architectures import read_config
from genlora_lightning.planning.plan import Plan, make_plan
from genlora_lightning.planning.traffic import Setup

IMAGES = Path(__file__).parent / "images"
COLOURS = {"GenLoRA": "#4051b5", "LoRA": "#d1793a"}
CONFIGS = {"GenLoRA": GenLoRAConfig, "LoRA": LoRAConfig}
LINEARS = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]  # of one block of Llama 8B
BLOCKS = 32
RANKS = [1, 2, 4, 8, 16, 32, 64, 128]


def main() -> None:
    """Draw both."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "1"})
    draw_parameters()
    draw_bars()


def draw_parameters() -> None:
    """Draw the parameters of an adapter on all linears of an 8B model, over its rank."""
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for name, config in CONFIGS.items():
        counts = [
            BLOCKS * sum(config(rank=rank).count_parameters(MatrixShape(*shape)) for shape in LINEARS) for rank in RANKS
        ]
        axes.plot(RANKS, counts, "o-", color=COLOURS[name], label=name)
        axes.annotate(
            f"{counts[-1] / 1e6:,.1f}M", (RANKS[-1], counts[-1]), (0, 7), textcoords="offset points", ha="center"
        )
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="trained parameters", xticks=RANKS, xticklabels=RANKS)
    axes.set_title("Adapter on all linears of Llama 8B", loc="left")
    axes.minorticks_off()
    axes.legend(frameon=False)
    save(figure, "parameters")


def draw_bars() -> None:
    """Draw what rank 64 adds to each of 16 GPUs, and what it sends in each step."""
    figure, both = plt.subplots(1, 2, figsize=(8.6, 3.4), layout="constrained")
    models = {"llama-8b": "8B", "llama-70b": "70B"}
    memory: dict[str, list[float]] = {name: [] for name in CONFIGS}
    sent: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for model in models:
        for name, config in CONFIGS.items():
            plan = planned(model, config(rank=64))
            held = plan.memory
            memory[name].append((held.adapters + held.gradients + held.optimizer + held.buckets) / 2**30)
            sent[name].append(plan.traffic[f"{plan.config.kind} replicate"].sent / 1e6)
    what = (
        ("GiB of each GPU for the adapter's training state", memory),
        ("MB that each GPU sends for it in a step", sent),
    )
    for axes, (title, values) in zip(both, what, strict=True):
        for place, (name, heights) in enumerate(values.items()):
            bars = axes.bar(
                [x + 0.38 * place for x in range(len(models))], heights, 0.36, color=COLOURS[name], label=name
            )
            axes.bar_label(
                bars, [f"{height:,.2f}" if height < 100 else f"{height:,.0f}" for height in heights], fontsize=9
            )
        axes.set(xticks=[x + 0.19 for x in range(len(models))], xticklabels=models.values())
        axes.set_title(title, loc="left", fontsize=10)
    both[0].legend(frameon=False)
    save(figure, "memory-traffic")


def planned(model: str, config: Any) -> Plan:
    """Plan a run on 16 GPUs with FSDP2 and replicated adapters."""
    setup = Setup(strategy="fsdp2", gpus=16, gradient_checkpointing=True)
    return make_plan(read_config(model), model, "causal-lm", config, setup)


def save(figure: Any, name: str) -> None:
    """Write a picture without the time of its making."""
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
