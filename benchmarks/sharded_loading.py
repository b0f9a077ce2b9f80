"""Peak resident memory of each of two processes that start a sharded model: read whole first, or each its part.

The quickstart's model in float32, two CPU processes, ``fully_shard`` on each layer and the root. "whole" loads it
with ``from_pretrained`` in each process and shards it; "pieces" builds it without weights, and reads what is kept;
"units" is the same with FSDP1, for which one layer after the other is read whole. What the interpreter and the
libraries take is subtracted. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data/quickstart/model"
OUTPUT = ROOT / "runs/benchmarks/sharded_loading.json"
RANKS = 2


def resident(field: str) -> int:
    """A memory figure of this process (``VmRSS``: now, ``VmHWM``: the peak), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


def rank_main(way: str, model_folder: str, store: str, rank: int) -> None:
    """Start the model as one rank; print the peak before and after sharding."""
    import torch
    import torch.distributed as dist
    import transformers
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from genlora_lightning import GenLoRAConfig, inject_adapters
    from genlora_lightning.backbone.architectures import repeated_blocks
    from genlora_lightning.backbone.low_memory import build_without_weights, weight_source
    from genlora_lightning.injection.inject import adapter_parameters

    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM  # noqa: B018  (imported here, for the interpreter's share)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    dist.barrier()
    fully_shard(torch.nn.Linear(8, 8))  # what it imports when it is first called
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    torch.manual_seed(0)
    if way != "whole":
        model = build_without_weights("AutoModelForCausalLM", model_folder, dtype=torch.float32)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    inject_adapters(model, GenLoRAConfig())
    source = weight_source(model)
    if source is not None:
        source.start_trained()
    adapters = set(adapter_parameters(model).values())
    blocks = repeated_blocks(model)
    assert blocks is not None
    if way == "units":
        assert source is not None
        model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(blocks[0])}),
            ignored_states=adapters,
            param_init_fn=source.for_fsdp1("cpu"),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
    else:
        for block in blocks:
            fully_shard(block, ignored_params=adapters)
        fully_shard(model, ignored_params=adapters)
        if source is not None:
            source.load("cpu")
    started = resident("VmHWM") - before
    kept = resident("VmRSS") - before
    ids = torch.arange(64)[None]
    loss = float(model(input_ids=ids, labels=ids).loss.detach())
    print(json.dumps({"peak": started, "kept": kept, "interpreter": before, "loss": loss}))
    dist.destroy_process_group()


def main() -> None:
    """Run both ways, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="model folder (default: the quickstart's)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        way, store, rank = options.rank
        rank_main(way, options.model, store, int(rank))
        return
    results = {}
    for way in ("whole", "pieces", "units"):
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                subprocess.Popen(
                    [sys.executable, __file__, "--model", options.model, "--rank", way, f"{folder}/store", str(rank)],
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                for rank in range(RANKS)
            ]
            outputs = [process.communicate(timeout=600)[0] for process in processes]
        results[way] = [json.loads(output.splitlines()[-1]) for output in outputs]
        for rank, result in enumerate(results[way]):
            print(
                f"{way:7} rank {rank}: peak {result['peak'] / 2**20:6.0f} MiB, kept {result['kept'] / 2**20:6.0f} MiB, "
                f"loss {result['loss']:.6f}",
                flush=True,
            )
    whole = min(result["peak"] for result in results["whole"])
    ratios = {way: max(result["peak"] for result in results[way]) / whole for way in ("pieces", "units")}
    for way, ratio in ratios.items():
        print(f"peak, {way} / whole: {ratio:.3f}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**results, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
