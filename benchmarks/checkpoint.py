"""Bytes and seconds to save, verify and load an adapter, beside PEFT's LoRA of the same rank and of the same bytes.

Two bases: the quickstart's SmolLM2-135M (a random model of its shape where it was not fetched), and linears shaped like
a 7B model's in bfloat16, whose memory is reserved and never written, so that only the adapters are real. Each figure is
the median of some repetitions; the adapters' tensors are random. PEFT flushes nothing to the disk; ours is flushed
before the time is taken. "PEFT + fsync" is PEFT with its files and folder flushed, too. A checkpoint is what Lightning
saves with the adapter: with AdamW's state.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlora_lightning import GenLoRAConfig, inject_adapters, load_adapter, save_adapter, verify_adapter
from genlora_lightning.artifacts.adapter_io import adapter_bytes
from genlora_lightning.artifacts.checkpoint import keep_adapters_only
from genlora_lightning.injection.inject import adapter_parameters
from genlora_lightning.storage.checkpoint_file import write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data/quickstart/model"
OUTPUT = ROOT / "runs/benchmarks/checkpoint.json"


class Layers7B(nn.Module):
    """The linears of a 7B model (32 layers, 4096 wide, 11008 within), never written to."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        width, inner = 4096, 11008
        shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
        shapes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: nn.Linear(*shape, bias=False, device="meta", dtype=torch.bfloat16)
                    for name, shape in shapes.items()
                }
            )
            for _ in range(32)
        )
        self.to_empty(device="cpu")


def smollm2(path: Path) -> nn.Module:
    """The quickstart's model, or a random one of its shape if it is not there."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if path.is_dir():
        return AutoModelForCausalLM.from_pretrained(path)  # type: ignore[no-any-return]
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    config = LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)
    torch.manual_seed(0)  # each call gives the same base
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


@torch.no_grad()
def randomize(parameters: Iterable[Tensor]) -> None:
    """Give adapters values as if they were trained."""
    for parameter in parameters:
        parameter.normal_()


def median_seconds(works: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median times of some repetitions after one that does not count.

    The works take turns, so that whatever else the machine does falls on all of them.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repetitions + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def flush(folder: Path) -> None:
    """Flush a folder and its files."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def genlora(make: Callable[[], nn.Module], rank: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """What there is to measure of a GenLoRA adapter."""
    config = GenLoRAConfig(rank=rank)
    models = [make(), make()]
    for model in models:
        inject_adapters(model, config)
        randomize(adapter_parameters(model).values())
    return {
        "save": lambda: save_adapter(models[0], folder),
        "verify": lambda: verify_adapter(folder),
        "load": lambda: load_adapter(models[1], folder),
    }


def checkpoint(make: Callable[[], nn.Module], rank: int, file: Path) -> tuple[dict[str, int], Callable[[], Any]]:
    """The bytes of a checkpoint of a GenLoRA adapter after a step of AdamW and of its tensors, and how it is saved."""
    module = nn.ModuleDict({"model": make()})
    inject_adapters(module["model"], GenLoRAConfig(rank=rank))
    trained = [p for p in adapter_parameters(module).values() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    randomize(trained)
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    def save() -> None:
        content = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        keep_adapters_only(module, content, [optimizer])
        write_checkpoint(content, file)

    save()
    tensors = [*adapter_parameters(module).values(), *(t for s in optimizer.state.values() for t in s.values())]
    return {"file": file.stat().st_size, "tensors": sum(t.numel() * t.element_size() for t in tensors)}, save


def peft(make: Callable[[], nn.Module], rank: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """What there is to measure of a PEFT LoRA adapter, which has nothing to verify."""
    from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    models = []
    for base in (make(), make()):
        names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
        models.append(get_peft_model(base, LoraConfig(r=rank, target_modules=names)))
        randomize(p for name, p in models[-1].named_parameters() if "lora_" in name)

    def load() -> None:
        result = set_peft_model_state_dict(models[1], load_peft_weights(str(folder), device="cpu"))
        assert not result.unexpected_keys

    return {
        "save": lambda: models[0].save_pretrained(folder),
        "save_fsync": lambda: (models[0].save_pretrained(folder), flush(folder)),
        "load": load,
    }


def rank_of_same_bytes(make: Callable[[], nn.Module], num_bytes: int) -> int:
    """The LoRA rank whose adapter comes nearest to a size."""
    linears = [m for n, m in make().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    per_rank = 4 * sum(m.in_features + m.out_features for m in linears)
    return max(1, round(num_bytes / per_rank))


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The figures as a table."""
    lines = [
        f"{'base':10} {'adapter':18} {'bytes':>12} {'save ms':>9} {'PEFT + fsync':>13} {'verify ms':>10} {'load ms':>8}"
    ]
    for base, rows in results.items():
        for row in rows:
            values = [
                f"{1e3 * row[key]:.1f}" if key in row else "-" for key in ("save", "save_fsync", "verify", "load")
            ]
            lines.append(
                f"{base:10} {row['method']:18} {row['bytes']:12,} {values[0]:>9} {values[1]:>13} {values[2]:>10} "
                f"{values[3]:>8}"
            )
        ours, same = rows[0], rows[-1]
        lines.append(
            f"{'':10} saving takes {ours['save'] / same['save']:.2f} x PEFT's time for the same number of bytes "
            f"({ours['save'] / same['save_fsync']:.2f} x with PEFT's files flushed, too)"
        )
        file, tensors = ours["checkpoint"]["file"], ours["checkpoint"]["tensors"]
        lines.append(
            f"{'':10} a checkpoint of the first has {file:,} bytes, {file / tensors:.2f} x those of its tensors, and "
            f"is saved in {1e3 * ours['save_checkpoint']:.1f} ms"
        )
    return "\n".join(lines)


def run(model_path: Path, rank: int, repetitions: int, where: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Measure both bases."""
    if not model_path.is_dir():
        print(f"{model_path} is not there: a random model of the same shape (`make quickstart` fetches the model).")
    bases: dict[str, Callable[[], nn.Module]] = {"SmolLM2": lambda: smollm2(model_path), "7B-shaped": Layers7B}
    results = {}
    # Not in a memory file system, where there is nothing to flush.
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-benchmark-", dir=where))
    try:
        for name, make in bases.items():
            ours = genlora(make, rank, folder / "ours")
            ours["save"]()
            same = rank_of_same_bytes(make, adapter_bytes(folder / "ours"))
            places = {f"GenLoRA r={rank}": folder / "ours"}
            measured = {f"GenLoRA r={rank}": ours}
            for of_peft in (rank, same):
                places[f"PEFT LoRA r={of_peft}"] = folder / f"peft-{of_peft}"
                measured[f"PEFT LoRA r={of_peft}"] = peft(make, of_peft, folder / f"peft-{of_peft}")
            sizes, measured[f"GenLoRA r={rank}"]["save_checkpoint"] = checkpoint(make, rank, folder / "x.ckpt")
            flat = {f"{m} {what}": work for m, works in measured.items() for what, work in works.items()}
            times = median_seconds(flat, repetitions)
            rows = [
                {"method": m, "bytes": adapter_bytes(places[m]), **{what: times[f"{m} {what}"] for what in works}}
                for m, works in measured.items()
            ]
            rows[0]["checkpoint"] = sizes
            results[name] = rows
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the SmolLM2 model (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=9, help="default: %(default)s")
    parser.add_argument("--where", type=Path, default=None, help="on which disk (default: the temporary folder)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    results = run(options.model, options.rank, options.repetitions, options.where)
    print(table(results))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nThese figures: {options.output}")


if __name__ == "__main__":
    main()
