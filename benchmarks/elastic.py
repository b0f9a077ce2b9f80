"""Compare one elastic training with a training at each rank: loss on held-out text, over several seeds.

A byte-level decoder of 2 layers and 64 features is trained on the English of Python's language reference
(``pydoc_data.topics``), once. Then adapters on all its linears are trained on Python code (modules of the standard
library), at each rank by itself, elastic with a draw for each layer (the library's), and elastic with one draw for all.
The elastic ones are measured at every rank, and so is the training at full rank alone, cut by a singular value
decomposition, which is what ``genlora export-lora --rank`` does. All have the same steps and rate.

    OMP_NUM_THREADS=1 python -m benchmarks.elastic --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import pydoc_data.topics
import random
import statistics
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.stats import estimate
from genlora_lightning import GenLoRAConfig, LoRAConfig, inject_adapters
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.low_rank import truncate_factors
from genlora_lightning.injection.elastic import draw_ranks, set_active_rank, whole_ranks
from genlora_lightning.injection.inject import adapter_layers, remove_adapters

TOKENS, BATCH = 64, 8
CODE = ["argparse", "ast", "configparser", "csv", "dataclasses", "difflib", "inspect", "logging/__init__", "tarfile"]
HELD_OUT = ["mailbox", "optparse"]
KINDS: dict[str, tuple[AdapterConfig, list[int]]] = {
    "lora": (LoRAConfig(rank=16, alpha=32, target_modules="all-linear"), [2, 4, 8, 16]),
    "genlora": (GenLoRAConfig(rank=64), [8, 16, 32, 64]),
}


def main() -> None:
    """Train, measure, and print the figures as JSON, losses in nats a byte."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200, help="of an adapter's training (default: %(default)s)")
    parser.add_argument("--base-steps", type=int, default=600, help="of the base's (default: %(default)s)")
    parser.add_argument("--rates", default='{"lora": 0.005, "genlora": 0.008}', help="JSON (default: %(default)s)")
    parser.add_argument("--only", choices=["full"], help="the trainings at full rank alone, to choose the rates")
    options = parser.parse_args()
    rates = json.loads(options.rates)
    lib = Path(sysconfig.get_paths()["stdlib"])
    code, held_out = (
        as_bytes("\n".join((lib / f"{name}.py").read_text(encoding="utf-8") for name in names))
        for names in (CODE, HELD_OUT)
    )
    base = make_base(options.base_steps)
    windows = held_out[: len(held_out) // TOKENS * TOKENS].view(-1, TOKENS)[::8]
    result: dict[str, Any] = {"python": sys.version.split()[0], "steps": options.steps, "rates": rates}
    result["base"] = measure(base, windows)
    for kind, (config, ranks) in KINDS.items():
        found: dict[str, list[float]] = {}
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for name, loss in runs(base, config, ranks, code, windows, rates[kind], seed, options):
                found.setdefault(name, []).append(loss)
        result[kind] = {"mean": {name: statistics.mean(losses) for name, losses in found.items()}, "losses": found}
        if options.seeds > 1:
            result[kind]["more than alone"] = {
                name: estimate([a - b for a, b in zip(losses, found[f"alone {name.split()[-1]}"], strict=True)]).text()
                for name, losses in found.items()
                if not name.startswith("alone")
            }
    print(json.dumps(result, indent=1))


def as_bytes(text: str) -> Tensor:
    """A text as numbers of its UTF-8 bytes."""
    return torch.tensor(list(text.encode()), dtype=torch.long)


def make_base(steps: int) -> nn.Module:
    """The base, trained on English."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=4, **sizes))
    train(model, as_bytes("\n".join(pydoc_data.topics.topics.values())), steps, 3e-3, seed=0)
    return model


def train(model: nn.Module, text: Tensor, steps: int, rate: float, seed: int, draw: Any = None) -> None:
    """Train what needs gradients, with AdamW and a cosine."""
    numbers = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    model.train()
    for step in range(steps):
        starts = torch.randint(len(text) - TOKENS, (BATCH,), generator=numbers)
        ids = text[starts[:, None] + torch.arange(TOKENS)]
        if draw is not None:
            draw(step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model: nn.Module, windows: Tensor) -> float:
    """The mean loss on windows."""
    model.eval()
    losses = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in windows.split(64)]
    return sum(losses) / len(windows)


def runs(
    base: nn.Module,
    config: AdapterConfig,
    ranks: list[int],
    code: Tensor,
    windows: Tensor,
    rate: float,
    seed: int,
    options: Any,
) -> list[tuple[str, float]]:
    """All trainings of one kind and seed: what was trained, and its loss."""
    found = []

    def adapted(own: AdapterConfig) -> nn.Module:
        model = copy.deepcopy(base)
        inject_adapters(model, own, generator=torch.Generator().manual_seed(seed))
        return model

    for rank in ranks[-1:] if options.only else ranks:
        alpha = config.alpha * rank / config.rank if config.scaling == "rank" else config.alpha
        model = adapted(type(config)(rank=rank, alpha=alpha, scaling=config.scaling))
        train(model, code, options.steps, rate, seed)
        found.append((f"alone {rank}", measure(model, windows)))
    if options.only:
        return found
    found += [(f"svd {rank}", measure(truncated(model, rank), windows)) for rank in ranks[:-1]]
    elastic = type(config)(rank=config.rank, alpha=config.alpha, scaling=config.scaling, elastic=ranks)
    for way in ("elastic", "one draw"):
        model = adapted(elastic)
        numbers = random.Random(seed)
        draw = {
            "elastic": lambda step, model=model: draw_ranks(model, step, seed),
            "one draw": lambda step, model=model, numbers=numbers: set_active_rank(model, numbers.choice(ranks)),
        }[way]
        train(model, code, options.steps, rate, seed, draw)
        for rank in ranks:
            set_active_rank(model, rank)
            found.append((f"{way} {rank}", measure(model, windows)))
        whole_ranks(model)
    return found


@torch.no_grad()
def truncated(model: nn.Module, rank: int) -> nn.Module:
    """The base with the best approximation of each update of a rank added to its weight."""
    model = copy.deepcopy(model)
    updates = {}
    for name, layer in adapter_layers(model).items():
        A, B, _ = truncate_factors(*layer.factors(), rank)
        updates[name] = layer.scaling * B @ A
    remove_adapters(model)
    for name, update in updates.items():
        model.get_submodule(name).weight += update
    return model


if __name__ == "__main__":
    main()
