"""What the examples share: the quickstart's model and data, the configuration, and what is reported."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from genlora_lightning.interop.peft import GenLoraConfig

QUICKSTART = Path("data/quickstart")  # `python examples/quickstart/prepare.py` makes it
ANSWERS = ("positive", "negative")


def arguments(what: str, steps: int, given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--model", default=str(QUICKSTART / "model"), help="folder or name of the base")
    parser.add_argument("--data", default=str(QUICKSTART / "train.jsonl"), help="prompts and completions, JSON lines")
    parser.add_argument("--output", default=f"runs/{Path(parser.prog).stem}", help="folder of the run")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--save-steps", type=int, default=steps, help="steps between checkpoints")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter")
    parser.add_argument("--resume", metavar="CHECKPOINT", help="go on from a checkpoint of the run")
    return parser.parse_args(given)


def rows(path: str) -> list[dict[str, str]]:
    """Read the data."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def adapter(rank: int) -> GenLoraConfig:
    """Configure the adapter."""
    return GenLoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Settings of transformers' trainer, which TRL's take, too."""
    return {
        "output_dir": options.output,
        "max_steps": options.steps,
        "save_steps": options.save_steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 4e-3,  # some ten times LoRA's
        "lr_scheduler_type": "cosine",
        "warmup_steps": options.steps // 10,
        "logging_steps": max(1, options.steps // 10),
        "save_only_model": False,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
    }


def finish(trainer: Any, options: argparse.Namespace) -> None:
    """Train, save the adapter, and say what it is."""
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(options.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained, total = trainer.model.get_nb_trainable_parameters()
    size = (Path(options.output) / "adapter_model.safetensors").stat().st_size
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {trained:,} of {total:,} parameters trained")
    print(f"adapter in {options.output}: {size:,} bytes")
