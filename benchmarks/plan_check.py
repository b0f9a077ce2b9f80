"""What ``genlora plan`` says, beside what is measured: peak resident memory, and values in collectives.

Each case runs in processes of its own, one or two: libraries are imported (this much is subtracted), the quickstart's
model is loaded and adapted, and sharded where there are two; the kernel's record of the peak is reset, some AdamW steps
are made, and the peak is read. Collectives are counted in the last step. With two processes the larger peak is shown.
The sharding is plain torch's, as the strategies do it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data/quickstart/model"
OUTPUT = ROOT / "runs/benchmarks/plan_check.json"
BATCH, TOKENS, STEPS = 4, 256, 3
RANKS = 2
_PLAIN = {"dtype": "float32", "autocast": False, "checkpointing": False}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32", "autocast": False, "checkpointing": False},
    "fp32, checkpointing": {"dtype": "float32", "autocast": False, "checkpointing": True},
    "bf16": {"dtype": "bfloat16", "autocast": True, "checkpointing": False},
    "bf16, checkpointing": {"dtype": "bfloat16", "autocast": True, "checkpointing": True},
    "fp32, 2 x ddp": {**_PLAIN, "strategy": "ddp"},
    "fp32, 2 x fsdp2, replicate": {**_PLAIN, "strategy": "fsdp2", "sharding": "replicate"},
    "fp32, 2 x fsdp2, shard": {**_PLAIN, "strategy": "fsdp2", "sharding": "shard"},
}


def resident(field: str) -> int:
    """A memory figure of this process (``VmRSS``: now, ``VmHWM``: the peak), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def measure(case: dict[str, Any], model_folder: str, rank: int, store: str) -> dict[str, Any]:
    """Train some steps; the peak, what the interpreter and the libraries took before, and what the last step sent."""
    import torch
    import torch.distributed as dist
    import transformers
    from torch.distributed.fsdp import fully_shard
    from torch.nn import functional as F
    from torch.nn.parallel import DistributedDataParallel

    from genlora_lightning import GenLoRAConfig, inject_adapters
    from genlora_lightning.backbone.architectures import enable_gradient_checkpointing, repeated_blocks
    from genlora_lightning.injection.inject import adapter_parameters
    from genlora_lightning.training.optim import OptimizerConfig, build_optimizer

    transformers.LlamaForCausalLM  # noqa: B018  (imported here, for the interpreter's share)
    warm = torch.nn.Linear(64, 64)
    warm(torch.ones(64, 64)).sum().backward()
    strategy = case.get("strategy")
    if strategy is not None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        dist.barrier()
        fully_shard(torch.nn.Linear(8, 8))  # what it imports when it is first called
    before = resident("VmRSS")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, case["dtype"]))
    torch.manual_seed(0)
    inject_adapters(model, GenLoRAConfig())
    model.train()
    if case["checkpointing"]:
        enable_gradient_checkpointing(model)
    runner = model
    reduced: list[torch.nn.Parameter] = []
    if strategy == "ddp":
        runner = DistributedDataParallel(model)
    elif strategy == "fsdp2":
        if case["sharding"] == "replicate":
            reduced = list(adapter_parameters(model).values())
        for block in repeated_blocks(model) or []:
            fully_shard(block, ignored_params=set(reduced))
        fully_shard(model, ignored_params=set(reduced))
    optimizer = build_optimizer(model, OptimizerConfig())
    ids = torch.randint(0, model.config.vocab_size, (BATCH, TOKENS))
    Path("/proc/self/clear_refs").write_text("5")
    for step in range(STEPS):
        with collectives(step == STEPS - 1) as counted:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["autocast"]):
                logits = runner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.flatten(
                    0, 1
                )
                answer = logits.index_select(0, torch.arange(ids.numel()))
                loss = F.cross_entropy(answer.float(), ids.flatten(), reduction="sum")
            del logits, answer
            loss.backward()
            if reduced:
                flat = torch.cat([p.grad.flatten() for p in reduced if p.grad is not None])
                dist.all_reduce(flat)
                del flat
        optimizer.step()
        optimizer.zero_grad()
    if strategy is not None:
        dist.barrier()
        dist.destroy_process_group()
    return {"peak": resident("VmHWM") - before, "interpreter": before, "collectives": counted}


@contextmanager
def collectives(wanted: bool) -> Iterator[dict[str, int]]:
    """Count the values in collectives."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    names = {"allreduce_": "all_reduced", "_allgather_base_": "gathered", "_reduce_scatter_base_": "reduce_scattered"}
    counted: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.__name__.partition(".")[0]
            if func.namespace == "c10d" and name in names:
                tensors = args[1] if name == "_reduce_scatter_base_" else args[0]
                size = sum(t.numel() for t in tree_leaves(tensors) if isinstance(t, Tensor))
                counted[names[name]] = counted.get(names[name], 0) + size
            return func(*args, **(kwargs or {}))

    with Counter() if wanted else nullcontext():
        yield counted


def planned(case: dict[str, Any], model_folder: str) -> dict[str, Any]:
    """What the plan says of a case."""
    import torch

    from genlora_lightning import GenLoRAConfig
    from genlora_lightning.backbone.architectures import read_config
    from genlora_lightning.planning.plan import make_plan
    from genlora_lightning.planning.traffic import Setup

    setup = Setup(
        strategy=case.get("strategy", "single"),
        adapter_sharding=case.get("sharding", "replicate"),
        gpus=RANKS if "strategy" in case else 1,
        batch=BATCH,
        tokens=TOKENS,
        autocast=case["autocast"],
        gradient_checkpointing=case["checkpointing"],
    )
    dtype = getattr(torch, case["dtype"])
    return make_plan(read_config(model_folder), "model", "causal-lm", GenLoRAConfig(), setup, dtype=dtype).to_dict()


def main() -> None:
    """Run the cases, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="model folder (default: the quickstart's)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    parser.add_argument("--only", choices=list(CASES), nargs="+", default=list(CASES), help="default: all cases")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, rank, store = options.case
        print(json.dumps(measure(CASES[name], options.model, int(rank), store)))
        return
    # Memory that was freed goes back to the kernel, so that the peak is the program's and not the allocator's reserve.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    results = {}
    print(f"{'case':28}{'measured MiB':>14}{'planned MiB':>14}{'planned/measured':>18}  values in collectives")
    for name in options.only:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, "--model", options.model, "--case", name, str(rank), f"{folder}/store"],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
                for rank in range(RANKS if "strategy" in case else 1)
            ]
            outputs = [process.communicate(timeout=1800)[0] for process in processes]
        measured = max((json.loads(output.splitlines()[-1]) for output in outputs), key=lambda found: found["peak"])
        plan = planned(case, options.model)
        ratio = plan["memory"]["total"] / measured["peak"]
        said = plan["traffic"][f"genlora {case.get('sharding', 'replicate')}"]
        expected = {
            "all_reduced": said["all_reduced"],
            "gathered": said["gathered"] + said["base_gathered"],
            "reduce_scattered": said["reduce_scattered"],
        }
        expected = {key: value for key, value in expected.items() if value}
        verdict = f"{expected}, as counted" if expected == measured["collectives"] else f"{expected}, {measured}"
        print(
            f"{name:28}{measured['peak'] / 2**20:14.0f}{plan['memory']['total'] / 2**20:14.0f}{ratio:18.3f}  {verdict}",
            flush=True,
        )
        results[name] = {**measured, "planned": plan["memory"], "planned_collectives": expected, "ratio": ratio}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
