"""Prune a model to several sparsities and measure its loss; then train a pruned one, with its zeros kept and without.

Losses are in nats a token: ``loss`` of the answers in a file of examples, ``text_loss`` of all their tokens. LoRA of
rank 16 on all linears is trained at the last sparsity, once with ``keep_zeros`` and once without, on the same batches
in the same order. The share of zeros is measured in the merged weights. Seconds a step are the median, and of a machine
that other work may share.

    OMP_NUM_THREADS=1 python -m benchmarks.sparse data/quickstart
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from genlora_lightning import CausalLMModule, InstructionDataModule, LoRAConfig, inject_adapters, merge_adapters
from genlora_lightning.backbone.pruning import prune_model
from genlora_lightning.injection.inject import adapter_layers, remove_adapters

BATCH = 8


def main() -> None:
    """Prune, train, measure, and print the figures as JSON, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="has `model`, `train.jsonl` and `val.jsonl`, as `make quickstart`")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.0, 0.3, 0.6, 0.5])
    parser.add_argument("--samples", type=int, default=32, help="to calibrate with (default: %(default)s)")
    parser.add_argument("--val", type=int, default=64, help="examples to measure on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=24, help="of a training; 0: none (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    options = parser.parse_args()
    model = str(options.folder / "model")
    files = {name: str(options.folder / f"{name}.jsonl") for name in ("train", "val")}
    data = InstructionDataModule(model, files["train"], val_file=files["val"], batch_size=BATCH, seed=0)
    data.prepare_data()
    data.setup("fit")
    batches = [batch for _, batch in zip(range(options.val // BATCH), data.val_dataloader(), strict=False)]
    data.batch_size = options.samples
    calibration = next(iter(data.train_dataloader()))
    module = CausalLMModule(model, dtype="float32")
    module.configure_model()
    module.eval()
    dense = copy.deepcopy(module.model.state_dict())
    for sparsity in options.sparsities:
        module.model.load_state_dict(dense)
        report = prune_model(module.model, {**calibration, "use_cache": False}, sparsity)
        shown(sparsity=sparsity, reached=report.sparsity, **losses(module, batches))
    pruned = copy.deepcopy(module.model.state_dict())
    data.batch_size = BATCH
    training = [batch for _, batch in zip(range(options.steps), data.train_dataloader(), strict=False)]
    for keep_zeros in (True, False) if options.steps else ():
        module.model.load_state_dict(pruned)
        shown(sparsity=sparsity, keep_zeros=keep_zeros, **train(module, training, batches, options.rate, keep_zeros))
        remove_adapters(module.model)


def train(module: Any, training: list[Any], batches: list[Any], rate: float, keep_zeros: bool) -> dict[str, float]:
    """Train an adapter, merge it, and say what it has come to."""
    torch.manual_seed(0)
    inject_adapters(module.model, LoRAConfig(rank=16, alpha=32, keep_zeros=keep_zeros))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=rate)
    seconds = []
    for batch in training:
        start = time.perf_counter()
        optimizer.zero_grad()
        logits, labels = module.answer_logits(batch)
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    found = {**losses(module, batches), "seconds_a_step": statistics.median(seconds)}
    merge_adapters(module.model)
    weights = [layer.weight for layer in adapter_layers(module.model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    return {**found, "merged_sparsity": zeros, "merged_loss": losses(module, batches)["loss"]}


@torch.no_grad()
def losses(module: Any, batches: list[Any]) -> dict[str, float]:
    """The mean losses of the answers' tokens and of all."""
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = module.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        each = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none").double()
        for row, counted in zip(sums, (batch["labels"][:, 1:] != -100, mask[:, 1:] != 0), strict=True):
            row += torch.stack([each[counted].sum(), counted.sum()])
    return {"loss": float(sums[0, 0] / sums[0, 1]), "text_loss": float(sums[1, 0] / sums[1, 1])}


def shown(**figures: Any) -> None:
    """Print figures as they come."""
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
