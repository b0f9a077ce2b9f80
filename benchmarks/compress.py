"""Compression of a trained LoRA: accuracy before and after, by generator configuration.

PEFT trains a LoRA of SmolLM2-135M-Instruct on film reviews (the quickstart's data); ``compress_lora`` fits generators
of several sizes to it; base, LoRA and compressed adapters classify the same held-out reviews.

    python benchmarks/compress.py --data data/quickstart --lora runs/lora-rank4
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from genlora_lightning import GenLoRAConfig, compress_lora, remove_adapters
from genlora_lightning.lora_export import truncate_factors

CONFIGS = {
    "rank 16, 8 groups": (16, 8, 1),
    "rank 16, 16 groups": (16, 16, 1),
    "rank 16, 16 groups, 2 centers": (16, 16, 2),
    "rank 32, 32 groups": (32, 32, 1),
}


def configuration(rank: int, num_groups: int, num_centers: int) -> GenLoRAConfig:
    """Generators that can be fitted: without signs, and with all of them learned."""
    return GenLoRAConfig(
        rank=rank,
        num_groups_a=num_groups,
        num_groups_b=num_groups,
        num_centers=num_centers,
        entry_signs=False,
        learn_centers=True,
        learn_widths=True,
    )


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read(path: Path, tokenizer) -> list[tuple[list[int], int]]:
    """Token ids of the prompt and the id of the label, for each line."""
    examples = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        label = tokenizer(row["completion"], add_special_tokens=False).input_ids[0]
        examples.append((tokenizer(text, add_special_tokens=False).input_ids, label))
    return examples


def logits_at_the_end(model, examples):
    """Logits of the token after each prompt, and the labels."""
    longest = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in examples])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in examples])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(input_ids=ids, attention_mask=mask).logits
    last = torch.tensor([len(ids) - 1 for ids, _ in examples])
    return hidden[torch.arange(len(examples)), last].float(), torch.tensor([label for _, label in examples])


@torch.no_grad()
def evaluate(model, examples) -> tuple[float, float]:
    """Accuracy between the labels, and the loss over the whole vocabulary."""
    model.eval()
    labels = sorted({label for _, label in examples})
    right, loss = 0, 0.0
    for start in range(0, len(examples), 20):
        logits, target = logits_at_the_end(model, examples[start : start + 20])
        loss += float(F.cross_entropy(logits, target, reduction="sum"))
        right += int((torch.tensor(labels)[logits[:, labels].argmax(1)] == target).sum())
    return right / len(examples), loss / len(examples)


def train(base, examples, folder: Path, rank: int, steps: int) -> None:
    """Train a LoRA with PEFT and save it."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEARS, task_type="CAUSAL_LM"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    random.Random(0).shuffle(examples)
    model.train()
    for step in range(steps):
        logits, target = logits_at_the_end(model, examples[8 * step : 8 * step + 8])
        loss = F.cross_entropy(logits, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            print(f"step {step}: loss {float(loss.detach()):.4f}", flush=True)
    model.save_pretrained(folder)


@torch.no_grad()
def truncated(lora, rank: int):
    """The LoRA cut to its largest singular values, its bytes and its relative error: what compression must beat."""
    lost = total = 0.0
    size = 0
    for module in lora.modules():
        if hasattr(module, "lora_A"):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            low_a, low_b, kept = truncate_factors(A, B, rank)
            energy = float(((A @ A.T) * (B.T @ B)).sum()) * module.scaling["default"] ** 2
            lost, total, size = lost + (1 - kept) * energy, total + energy, size + 4 * (low_a.numel() + low_b.numel())
            A[:rank], A[rank:] = low_a, 0
            B[:, :rank], B[:, rank:] = low_b, 0
    return lora, size, (lost / total) ** 0.5


def main() -> None:
    """Train if there is no LoRA yet, compress, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--lora", type=Path, required=True, help="where the LoRA is, or is to be trained")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--train-steps", type=int, default=60)
    parser.add_argument("--fit-steps", type=int, default=500)
    parser.add_argument("--test-size", type=int, default=500)
    parser.add_argument("--truncate", type=int, nargs="*", default=[1, 2], help="ranks to cut the LoRA to")
    parser.add_argument("--configs", nargs="*", choices=list(CONFIGS), default=list(CONFIGS))
    args = parser.parse_args()
    torch.manual_seed(0)
    model_folder = args.data / "model"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    test = read(args.data / "test.jsonl", tokenizer)[: args.test_size]

    def fresh():
        return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)

    if not args.lora.exists():
        train(fresh(), read(args.data / "train.jsonl", tokenizer), args.lora, args.rank, args.train_steps)
    if not args.test_size:
        return
    print(f"{'adapter':<32}{'bytes':>12}{'rel. error':>12}{'accuracy':>10}{'loss':>8}{'fit s':>8}")

    def show(name: str, size: int, error: float, model, seconds: float = 0.0) -> None:
        accuracy, loss = evaluate(model, test)
        print(f"{name:<32}{size:>12,}{error:>12.4f}{accuracy:>10.3f}{loss:>8.4f}{seconds:>8.1f}", flush=True)

    base = fresh()
    show("none", 0, 1.0, base)
    lora = PeftModel.from_pretrained(fresh(), args.lora)
    size = sum(4 * p.numel() for name, p in lora.named_parameters() if "lora_" in name)
    show(f"LoRA rank {args.rank}", size, 0.0, lora)
    for rank in args.truncate:
        lora, size, error = truncated(PeftModel.from_pretrained(fresh(), args.lora), rank)
        show(f"LoRA cut to rank {rank}", size, error, lora)
    del lora
    for name in args.configs:
        start = time.perf_counter()
        compressed = compress_lora(args.lora, configuration(*CONFIGS[name]), steps=args.fit_steps)
        seconds = time.perf_counter() - start
        compressed.apply(base)
        show(name, sum(row.bytes for row in compressed.rows), compressed.relative_error, base, seconds)
        remove_adapters(base)


if __name__ == "__main__":
    main()
