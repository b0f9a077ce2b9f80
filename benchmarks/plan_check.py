"""Peak resident memory of a training process, beside what ``genlora plan`` says of it.

Each case runs in a process of its own: libraries are imported (this much is subtracted), the quickstart's model is
loaded and adapted, the kernel's record of the peak is reset, some AdamW steps are made, and the peak is read. The plan
is for one process, without data. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data/quickstart/model"
OUTPUT = ROOT / "runs/benchmarks/plan_check.json"
BATCH, TOKENS, STEPS = 4, 256, 3
CASES = {
    "fp32": {"dtype": "float32", "autocast": False, "checkpointing": False},
    "fp32, checkpointing": {"dtype": "float32", "autocast": False, "checkpointing": True},
    "bf16": {"dtype": "bfloat16", "autocast": True, "checkpointing": False},
    "bf16, checkpointing": {"dtype": "bfloat16", "autocast": True, "checkpointing": True},
}


def resident(field: str) -> int:
    """A memory figure of this process (``VmRSS``: now, ``VmHWM``: the peak), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def measure(case: dict[str, Any], model_folder: str) -> dict[str, int]:
    """Train some steps; the peak, and what the interpreter and the libraries took before."""
    import torch
    import transformers
    from torch.nn import functional as F

    from genlora_lightning import GenLoRAConfig, inject_adapters
    from genlora_lightning.architectures import enable_gradient_checkpointing
    from genlora_lightning.optim import OptimizerConfig, build_optimizer

    transformers.LlamaForCausalLM  # noqa: B018  (imported here, for the interpreter's share)
    warm = torch.nn.Linear(64, 64)
    warm(torch.ones(64, 64)).sum().backward()
    before = resident("VmRSS")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, case["dtype"]))
    inject_adapters(model, GenLoRAConfig())
    model.train()
    if case["checkpointing"]:
        enable_gradient_checkpointing(model)
    optimizer = build_optimizer(model, OptimizerConfig())
    ids = torch.randint(0, model.config.vocab_size, (BATCH, TOKENS))
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(STEPS):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["autocast"]):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.flatten(0, 1)
            answer = logits.index_select(0, torch.arange(ids.numel()))
            loss = F.cross_entropy(answer.float(), ids.flatten(), reduction="sum")
        del logits, answer
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"peak": resident("VmHWM") - before, "interpreter": before}


def planned(case: dict[str, Any], model_folder: str) -> dict[str, Any]:
    """What the plan says of a case."""
    import torch

    from genlora_lightning import GenLoRAConfig
    from genlora_lightning.architectures import read_config
    from genlora_lightning.planning import make_plan
    from genlora_lightning.traffic import Setup

    setup = Setup(batch=BATCH, tokens=TOKENS, autocast=case["autocast"], gradient_checkpointing=case["checkpointing"])
    dtype = getattr(torch, case["dtype"])
    return make_plan(read_config(model_folder), "model", "causal-lm", GenLoRAConfig(), setup, dtype=dtype).to_dict()


def main() -> None:
    """Run the cases, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="model folder (default: the quickstart's)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(CASES[options.case], options.model)))
        return
    # Memory that was freed goes back to the kernel, so that the peak is the program's and not the allocator's reserve.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    results = {}
    print(f"{'case':22}{'measured MiB':>14}{'planned MiB':>14}{'planned/measured':>18}")
    for name, case in CASES.items():
        command = [sys.executable, __file__, "--case", name, "--model", options.model]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        measured = json.loads(done.stdout.splitlines()[-1])
        plan = planned(case, options.model)
        ratio = plan["memory"]["total"] / measured["peak"]
        print(
            f"{name:22}{measured['peak'] / 2**20:14.0f}{plan['memory']['total'] / 2**20:14.0f}{ratio:18.3f}", flush=True
        )
        results[name] = {**measured, "planned": plan["memory"], "ratio": ratio}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
