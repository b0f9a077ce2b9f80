"""The README's table: what fine-tuning Llama shapes takes on 1 to 512 GPUs, by ``genlora plan``. No weights, no GPU.

Of the strategies the first that fits is shown: one GPU or DDP, else FSDP2; where none fits, FSDP2.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from genlora_lightning import GenLoRAConfig
from genlora_lightning.backbone.architectures import read_config
from genlora_lightning.backbone.catalog import SHAPES
from genlora_lightning.planning.plan import GIB, Plan, make_plan
from genlora_lightning.planning.traffic import Setup

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "runs/benchmarks/plan_table.json"
GPUS = (1, 8, 64, 512)
CONFIG = GenLoRAConfig()
SETUP = Setup(batch=1, tokens=2048, gpu_memory=80.0, gradient_checkpointing=True)


def chosen_plan(shape: str, gpus: int) -> Plan:
    """The plan with the simplest strategy that fits."""
    return make_plan(read_config(shape), shape, "causal-lm", CONFIG, replace(SETUP, gpus=gpus))


def row(plan: Plan) -> str:
    """A line of the table."""
    memory, traffic = plan.memory, plan.traffic
    ours, lora = traffic["genlora replicate"], traffic["lora replicate"]
    fits = f"{memory.total / GIB:.1f}" if plan.fits else f"**{memory.total / GIB:.0f}**, does not fit"
    sent = "-" if plan.setup.gpus == 1 else f"{ours.sent / 1e6:.1f}"
    lora_sent = "-" if plan.setup.gpus == 1 else f"{lora.sent / 1e6:,.0f}"
    gathered = f"{ours.base_sent / 1e9:,.1f}" if ours.base_sent else "-"
    size = plan.model.partition(" ")[0].partition("-")[2].upper()
    kind = {"single": "-", "ddp": "DDP", "fsdp2": "FSDP2"}[plan.setup.strategy]
    cells = [size, str(plan.setup.gpus), kind, fits, sent, lora_sent, gathered]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table in Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    options = parser.parse_args()
    print("| model | GPUs | strategy | GiB on each | MB sent, adapters | the same, LoRA | GB sent, base gathered |")
    print("|---|---|---|---|---|---|---|")
    plans = []
    for shape in SHAPES:
        for gpus in GPUS:
            plan = chosen_plan(shape, gpus)
            plans.append(plan.to_dict())
            print(row(plan), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(plans, indent=2) + "\n")


if __name__ == "__main__":
    main()
