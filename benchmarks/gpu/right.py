"""Whether it is right: the device against float64 on the CPU, and each fast path against the plain one.

An error is ``‖x − reference‖ / ‖reference‖`` in float64. A check is right if each error is within its tolerance.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.speed.memory import ROOT
from genlora_lightning import (
    GenLoRAConfig,
    GenLoRAFinetuning,
    export_lora,
    inject_adapters,
    merge_adapters,
    unmerge_adapters,
)
from genlora_lightning.injection.inject import adapter_layers, adapter_parameters
from genlora_lightning.layers.sharing import set_fused

from .rows import Rows

# By what is compared and the dtype; bfloat16 has 8 bits, and what is merged is rounded to it once more.
TOLERANCES = {
    "float32": {"forward": 1e-5, "gradients": 1e-4, "merged": 1e-5, "unmerged": 0.0, "exported": 1e-6},
    "bfloat16": {"forward": 2e-2, "gradients": 6e-2, "merged": 3e-2, "unmerged": 0.0, "exported": 1e-6},
    "fused": {"loss": 1e-5, "gradients": 1e-4},
    "compiled": {"loss": 1e-4, "gradients": 1e-3},
    "resumed": {"adapters": 0.0},
    "alone": {"adapters": 1e-5},
}
Values = dict[str, Any]
_STEPS = 8


def run(rows: Rows, *, tiny: bool) -> bool:
    """Measure all that is missing; whether all was measured."""
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "genlora_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    given: dict[str, Any] = {"tiny": tiny}
    checks: list[tuple[str, Callable[[], Values]]] = [
        ("float32", partial(_numbers, rows.device, torch.float32, tiny)),
        ("bfloat16", partial(_numbers, rows.device, torch.bfloat16, tiny)),
        ("fused", partial(_fused, rows.device, tiny)),
        ("resumed run", partial(_resumed, rows.device, tiny)),
        ("waits", partial(_waits, rows.device, tiny)),
        ("ddp, one process", partial(_alone, rows.device, tiny, "ddp")),
        ("fsdp2, one process", partial(_alone, rows.device, tiny, "fsdp2")),
        ("marked tests", partial(_marked_tests, tiny)),
        ("compiled", partial(_compiled, rows.device, tiny)),
    ]
    done = [rows.measure("right", name, given, task) for name, task in checks]
    return all(done)


# --- the model and its numbers ----------------------------------------------------------------------------------------


def _make_model(tiny: bool, dtype: torch.dtype = torch.float32, *, adapted: bool = True, **changes: Any) -> Any:
    """A small Llama with adapters that are not at zero, on the CPU; always the same."""
    sizes = (32, 48) if tiny else (256, 688)
    given: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": sizes[0],
        "intermediate_size": sizes[1],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_implementation": "eager",
    }
    config = transformers.LlamaConfig(**given | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    if adapted:
        inject_adapters(model, GenLoRAConfig(rank=8 if tiny else 64), generator=torch.Generator().manual_seed(0))
        _move(model)
    return model


@torch.no_grad()
def _move(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(model).values():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _ids(tiny: bool, rows: int = 2) -> Tensor:
    shape = (rows, 16 if tiny else 64)
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(2))


def _pass(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Logits, loss and the adapters' gradients, one after the other in one vector."""
    ids = ids.to(model.device)
    output = model(input_ids=ids, labels=ids, use_cache=False)
    parameters = [p for p in adapter_parameters(getattr(model, "_orig_mod", model)).values() if p.requires_grad]
    gradients = torch.autograd.grad(output.loss, parameters)
    return {
        "forward": output.logits.detach(),
        "loss": output.loss.detach(),
        "gradients": torch.cat([gradient.flatten() for gradient in gradients]),
    }


def error(found: Tensor, reference: Tensor) -> float:
    """``‖found − reference‖ / ‖reference‖``, on the CPU in float64."""
    found, reference = found.detach().cpu().double(), reference.detach().cpu().double()
    return float((found - reference).norm() / reference.norm())


def judged(errors: dict[str, float], kind: str, **others: Any) -> Values:
    """The errors beside their tolerances."""
    tolerances = {name: TOLERANCES[kind][name] for name in errors}
    right = all(errors[name] <= tolerances[name] for name in errors)  # a NaN is not
    return {"errors": errors, "tolerances": tolerances, "right": right, **others}


def _numbers(device: str, dtype: torch.dtype, tiny: bool) -> Values:
    ids = _ids(tiny)
    model = _make_model(tiny, dtype)
    exact = copy.deepcopy(model).double()
    expected = _pass(exact, ids)
    model.to(device)
    found = _pass(model, ids)
    errors = {name: error(found[name], expected[name]) for name in ("forward", "gradients")}
    before = [layer.base_layer.weight.clone() for layer in adapter_layers(model).values()]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", category=UserWarning)  # of what bfloat16 rounds away, which is measured here
        merge_adapters(model)
        merged = model(input_ids=ids.to(device), use_cache=False).logits
        unmerge_adapters(model)
    errors["merged"] = error(merged, expected["forward"])
    after = [layer.base_layer.weight for layer in adapter_layers(model).values()]
    errors["unmerged"] = float(not all(map(torch.equal, before, after)))
    with tempfile.TemporaryDirectory() as folder:
        export_lora(model, Path(folder) / "lora")
        errors["exported"] = _export_error(load_file(Path(folder) / "lora" / "adapter_model.safetensors"), exact)
    return judged(errors, str(dtype).removeprefix("torch."))


def _export_error(stored: dict[str, Tensor], exact: Any) -> float:
    """The largest error of an exported ΔW."""
    worst = 0.0
    for name, layer in adapter_layers(exact).items():
        A, B = (stored[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        worst = max(worst, error(B @ A, layer.delta_weight()))
    return worst


def _fused(device: str, tiny: bool) -> Values:
    model, ids = _make_model(tiny).to(device), _ids(tiny)
    found = _pass(model, ids)
    set_fused(model, False)
    expected = _pass(model, ids)
    return judged({name: error(found[name], expected[name]) for name in TOLERANCES["fused"]}, "fused")


def _compiled(device: str, tiny: bool) -> Values:
    """Compiled as one graph: a break is an error."""
    model, ids = _make_model(tiny, num_hidden_layers=1).to(device), _ids(tiny)
    expected = _pass(model, ids)
    backend = "inductor" if torch.device(device).type == "cuda" else "eager"
    found = _pass(torch.compile(model, fullgraph=True, backend=backend), ids)
    return judged({name: error(found[name], expected[name]) for name in TOLERANCES["compiled"]}, "compiled")


# --- runs of a trainer ------------------------------------------------------------------------------------------------


class Module(LightningModule):
    """A language model as a user has it, which knows nothing of adapters.

    Args:
        tiny: Whether the model is a tiny one.
        head: Whether its head is trained, without any adapters.
    """

    def __init__(self, tiny: bool, head: bool = False) -> None:
        super().__init__()
        self.model = _make_model(tiny, adapted=False).requires_grad_(not head)
        if head:
            self.model.lm_head.requires_grad_(True)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss, not looked at."""
        (ids,) = batch
        loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trained."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def _fit(device: str, tiny: bool, folder: Path, *callbacks: Callback, head: bool = False, **settings: Any) -> Module:
    module = Module(tiny, head)
    ckpt_path = settings.pop("ckpt_path", None)
    adapter = GenLoRAFinetuning(GenLoRAConfig(rank=8), adapter_dir=str(folder / "adapter"), overwrite=True)
    given: dict[str, Any] = {
        "accelerator": "cuda" if torch.device(device).type == "cuda" else "cpu",
        "devices": 1,
        "max_steps": _STEPS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "callbacks": [*callbacks, *([] if head else [adapter])],
        "use_distributed_sampler": False,  # it shuffles
        **settings,
    }
    loader = DataLoader(TensorDataset(_ids(tiny, rows=2 * _STEPS)), batch_size=2)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(does not have many workers|used to create the checkpoint)")
        Trainer(**given).fit(module, loader, ckpt_path=ckpt_path)
    return module


def _trained(module: nn.Module) -> Tensor:
    found = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in adapter_parameters(module).values())
    return torch.cat([parameter.detach().cpu().flatten() for parameter in found])


def _resumed(device: str, tiny: bool) -> Values:
    """A run that was saved in the middle of an epoch, and went on from there in another trainer."""
    was = torch.are_deterministic_algorithms_enabled()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            whole = _trained(_fit(device, tiny, folder / "whole", deterministic="warn"))
            saving = ModelCheckpoint(dirpath=folder, filename="middle", every_n_train_steps=_STEPS // 2, save_top_k=-1)
            _fit(device, tiny, folder / "first", saving, max_steps=_STEPS // 2, deterministic="warn")
            path = str(folder / "middle.ckpt")
            resumed = _trained(_fit(device, tiny, folder / "second", deterministic="warn", ckpt_path=path))
    finally:
        torch.use_deterministic_algorithms(was)
    return judged({"adapters": float((whole - resumed).abs().max())}, "resumed", values=whole.numel())


def _alone(device: str, tiny: bool, kind: str) -> Values:
    """Adapters after a run of one process in a process group, against a run without."""
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    strategy: Any = DDPStrategy(process_group_backend=backend)
    if kind == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=1,
            tensor_parallel_size=1,
            process_group_backend=backend,
            save_distributed_checkpoint=False,
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "one"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = _trained(_fit(device, tiny, folder / "plain"))
        kept = dict(os.environ)
        os.environ.update({key: str(value) for key, value in variables.items()})
        try:
            found = _trained(_fit(device, tiny, folder / kind, strategy=strategy))
            used = torch.distributed.get_backend()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            os.environ.clear()
            os.environ.update(kept)
    return judged({"adapters": error(found, expected)}, "alone", backend=used)


class CountWaits(Callback):
    """Counts, from the third step on, where the host waits for the device."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.steps = 0
        self._catch: Any = None
        self._caught: list[warnings.WarningMessage] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin at the third, and from there on count to the end of the last."""
        if batch_idx == 2:
            self._catch = warnings.catch_warnings(record=True)
            self._caught = self._catch.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End with the last."""
        if batch_idx >= 2:
            self.steps += 1
        if batch_idx == _STEPS - 1:
            torch.cuda.set_sync_debug_mode("default")
            self._catch.__exit__(None, None, None)
            for one in self._caught:
                if "called a synchronizing" in str(one.message):  # and not that the mode is a prototype
                    self.places.append(f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}")


def _waits(device: str, tiny: bool) -> Values:
    """Waits per step with adapters, and without in the user's own run, which trains the head."""
    if torch.device(device).type != "cuda":
        return {"waits": None, "own": None}
    counts = {}
    with tempfile.TemporaryDirectory() as name:
        for head in (True, False):
            counts[head] = CountWaits()
            _fit(device, tiny, Path(name), counts[head], head=head)
    found, own = ({place: c.places.count(place) / c.steps for place in c.places} for c in (counts[False], counts[True]))
    return {"waits": sum(found.values()), "own": sum(own.values()), "places": found, "own_places": own}


# --- the package's tests ----------------------------------------------------------------------------------------------


def _marked_tests(tiny: bool) -> Values:
    """The tests that are marked to need a GPU, by pytest; those that need two are skipped where there is one."""
    mark = re.compile(r"^@pytest\.mark\.gpu$|^pytestmark.*\.gpu", re.MULTILINE)
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if mark.search(path.read_text())]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += files[-1:] if tiny else files
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    right = done.returncode == 0
    return {"right": right, "counts": counts, "failures": failures, "output": "" if right else done.stdout[-4000:]}
