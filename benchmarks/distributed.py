"""What adapters cost on two processes: step time against DDP, elements sent per step, memory of a rank.

For each strategy (``ddp``, FSDP1, FSDP2) and policy GenLoRA, and PEFT's LoRA of the same rank wherever it runs, on a
random-weight Llama, two gloo ranks on the CPU::

    python benchmarks/distributed.py [--hidden 512] [--layers 4] [--steps 12] [--output runs/distributed.json]

Memory is the peak of a rank's resident memory less what its interpreter takes with everything imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.filterwarnings("ignore")

# ruff: noqa: E402, D102
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from genlora_lightning import GenLoRAConfig, GenLoRAFinetuning
from genlora_lightning.text import text_table
from tests.distributed.runs import strategy
from tests.distributed.traffic import Traffic
from tests.models import tiny_llama
from tests.plain import trainer
from tests.ranks import RankError, on_ranks

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Peak(threading.Thread):
    """The largest resident memory while it runs, looked at every five milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self.stop = 0, threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.005):
            self.largest = max(self.largest, resident())


class Steps(Callback):
    """Seconds of each step, and the collectives of those after the first two."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic, self.seconds, self.marks = traffic, [], []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()
        self.marks.append(len(self.traffic.calls))

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


class Language(LightningModule):
    """A Llama of random weights; with PEFT's LoRA in it, or as it is for the callback."""

    def __init__(self, sizes: dict[str, int], lora_rank: int = 0, fsdp2: bool = False) -> None:
        super().__init__()
        self.fsdp2 = fsdp2
        self.net = tiny_llama(tie_word_embeddings=False, num_attention_heads=8, num_key_value_heads=8, **sizes)
        if lora_rank:
            from peft import LoraConfig, get_peft_model

            names = "all-linear"
            self.net = get_peft_model(self.net, LoraConfig(r=lora_rank, target_modules=names, task_type="CAUSAL_LM"))

    def configure_model(self) -> None:
        if self.fsdp2:  # as PEFT's users do it: each block, then the root
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.base_model.model.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
            self.fsdp2 = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(input_ids=batch[0], labels=batch[0]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class CPUFSDP(FSDPStrategy):
    """Lightning's FSDP1, but on the CPU, one unit per decoder layer: what a user of PEFT has."""

    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        policy = ModuleWrapPolicy({LlamaDecoderLayer})
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=device)


def measure(kind: str, policy: str, method: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run on this rank, and what it took."""
    sizes = {
        "hidden_size": args.hidden,
        "intermediate_size": 2 * args.hidden,
        "num_hidden_layers": args.layers,
        "vocab_size": 1024,
        "max_position_embeddings": 128,
    }
    ids = torch.randint(3, 1024, (2 * args.steps, 64), generator=torch.Generator().manual_seed(0))
    before = resident()
    peak = Peak()
    peak.start()
    lora = method == "LoRA"
    callbacks: list[Callback] = []
    if not lora:
        adapter = GenLoRAConfig(rank=args.rank)
        callbacks.append(GenLoRAFinetuning(adapter, adapter_sharding=policy, save_adapter=False))
    with Traffic() as traffic, tempfile.TemporaryDirectory() as folder:
        steps = Steps(traffic)
        chosen = CPUFSDP() if lora and kind == "fsdp1" else strategy(kind)
        if kind == "ddp":  # its own reduction, through Python, where it is counted
            chosen = DDPStrategy(process_group_backend="gloo", ddp_comm_hook=allreduce_hook)
        run = trainer(folder, *callbacks, steps, strategy=chosen, devices=2)
        module = Language(sizes, lora_rank=args.rank if lora else 0, fsdp2=lora and kind == "fsdp2")
        run.fit(module, DataLoader(TensorDataset(ids), batch_size=1))
    peak.stop.set()
    counted = traffic.calls[steps.marks[3] : steps.marks[-1]]
    per_step = len(steps.marks) - 4
    return {
        "strategy": kind,
        "policy": policy,
        "method": method,
        "seconds_per_step": statistics.median(steps.seconds[3:]),
        "reduced_elements": sum(n for name, n in counted if "reduce" in name) / per_step,
        "gathered_elements": sum(n for name, n in counted if "gather" in name) / per_step,
        "collectives": len(counted) / per_step,
        "peak_bytes": max(peak.largest, resident()) - before,
    }


def main() -> None:
    """Run all combinations, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 4), ("steps", 12), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=Path("runs/distributed.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for method in ("GenLoRA", "LoRA"):
        for kind in ("ddp", "fsdp1", "fsdp2"):
            policies = ("replicate", "shard") if method == "GenLoRA" and kind != "ddp" else ("replicate",)
            for policy in policies if method == "GenLoRA" or kind == "ddp" else ("shard",):
                try:
                    ranks = on_ranks(lambda k=kind, p=policy, m=method: measure(k, p, m, args), seconds=300)
                except RankError as error:
                    rows.append(
                        {"strategy": kind, "policy": policy, "method": method, "error": str(error).strip()[-300:]}
                    )
                    continue
                largest = max(rank["peak_bytes"] for rank in ranks)
                rows.append({**ranks[0], "peak_bytes": largest})
    baseline = {
        row["method"]: row["seconds_per_step"] for row in rows if row["strategy"] == "ddp" and "error" not in row
    }
    lines = []
    for row in rows:
        name = [row["method"], row["strategy"], row["policy"]]
        if "error" in row:
            lines.append([*name, "does not run: " + row["error"].splitlines()[-1][:80], "", "", "", ""])
            continue
        row["ratio_to_ddp"] = row["seconds_per_step"] / baseline.get(row["method"], float("nan"))
        lines.append(
            [
                *name,
                f"{row['ratio_to_ddp']:.2f}",
                f"{row['reduced_elements']:,.0f}",
                f"{row['gathered_elements']:,.0f}",
                f"{row['collectives']:.0f}",
                f"{row['peak_bytes'] / 2**20:.0f}",
            ]
        )
    header = ["method", "strategy", "adapters", "step / DDP", "reduced", "gathered", "collectives", "peak MiB"]
    print(text_table(header, lines, left=3))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"settings": {**vars(args), "output": str(args.output)}, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
