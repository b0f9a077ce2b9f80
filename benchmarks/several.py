"""Memory and seconds of a thousand named adapters on one model: ``AdapterSet``.

Adapters of the default configuration with random tensors are written first, by a process of their own: a few folders,
which are added many times under names of their own. Held in memory, each name has its own copy. Some become active one
after another, more than the cache holds, and those that it holds again; a batch of eight rows is computed with eight
adapters, and with one, in turns. Memory is the process's peak (VmHWM), everything in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "data/quickstart/model"
ROWS = 8
# With one thread the process's own seconds, which others on the machine disturb least.
CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def load(model: str, dtype: str) -> Any:
    """The base."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()


def make(model: Any, folder: Path, number: int) -> None:
    """Write adapters of random tensors; those that are there stay."""
    from genlora_lightning import GenLoRAConfig, inject_adapters, save_adapter
    from genlora_lightning.injection.inject import adapter_parameters

    inject_adapters(model, GenLoRAConfig())
    for index in range(number):
        if (folder / str(index)).is_dir():
            continue
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in adapter_parameters(model).values():
                if parameter.requires_grad:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        save_adapter(model, folder / str(index))


def peak_bytes() -> int:
    """The most memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024


def timed(do: Callable[[], Any]) -> float:
    """Seconds that something takes."""
    start = CLOCK()
    do()
    return CLOCK() - start


def interleaved(first: Callable[[], Any], second: Callable[[], Any], times: int) -> tuple[float, float, float]:
    """Medians of the seconds of two things that are done in turns, and of the ratio of the second to the first."""
    pairs = [(timed(first), timed(second)) for _ in range(times)]
    one, other = (statistics.median(values) for values in zip(*pairs, strict=True))
    return one, other, statistics.median(b / a for a, b in pairs)


def measure(model: Any, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Add the adapters, use them, and take what it takes."""
    from genlora_lightning.artifacts.adapter_set import AdapterSet

    results: dict[str, Any] = {"peak of the base alone": peak_bytes()}
    adapters = AdapterSet(model, cache_bytes=arguments.cache_mib << 20)
    names = [str(index) for index in range(arguments.adapters)]

    def add_all() -> None:
        for name in names:
            adapters.add(name, folder / str(int(name) % arguments.folders), held=arguments.held)

    results["add, s each"] = timed(add_all) / len(names)
    results["peak after adding"] = peak_bytes()
    batch = torch.randint(0, model.config.vocab_size, (ROWS, arguments.tokens))
    with torch.no_grad():
        used = names[: arguments.used]
        results["first use, s"] = statistics.median(timed(lambda name=name: adapters.activate(name)) for name in used)
        results["cached bytes"] = adapters.cached_bytes
        again = [*used[-4:], None] * 25
        switches = [timed(lambda name=name: adapters.activate(name)) for name in again]
        results["switch, s, median"], results["switch, s, worst"] = statistics.median(switches), max(switches)
        eight = names[:ROWS]
        results["first use of eight in one batch, s"] = timed(lambda: adapters.activate(rows=eight))

        def run(what: Callable[[], Any], **active: Any) -> Callable[[], Any]:
            def call() -> None:
                adapters.activate(**active)
                what()

            return call

        def generate() -> None:
            model.generate(batch, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)

        for title, what in (("one forward", lambda: model(batch)), ("generate 16 tokens", generate)):
            if not arguments.repeat:
                break
            one, other = run(what, which=names[0]), run(what, rows=eight)
            one(), other()
            a, b, ratio = interleaved(one, other, arguments.repeat)
            results[f"{title}: one adapter, s"], results[f"{title}: eight, s"], results[f"{title}: ratio"] = a, b, ratio
            print(json.dumps(results), file=sys.stderr, flush=True)
    results["peak at the end"] = peak_bytes()
    return results


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--folder", type=Path, help="where the adapters are written, and kept (default: nowhere)")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--folders", type=int, default=24, help="how many are written")
    parser.add_argument("--used", type=int, default=20, help="how many become active one after another")
    parser.add_argument("--held", choices=["disk", "memory"], default="disk")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cache-mib", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7, help="0: only memory, and switching")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(load(arguments.model, arguments.dtype), arguments.folder, arguments.folders)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        again = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--make"]
        subprocess.run(again, check=True)
        print(json.dumps(measure(load(arguments.model, arguments.dtype), folder, arguments), indent=1))


if __name__ == "__main__":
    main()
