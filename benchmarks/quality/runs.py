"""One run: a method, a rate and a seed on a task; its result is one row."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import genlora_lightning
from genlora_lightning.adapters.steps import hook_steps
from genlora_lightning.injection.inject import adapter_layers

from .batches import on_device
from .methods import METHODS, deltas, linear_shapes, lora_unit
from .ranks import mean_ranks
from .tasks import make_task
from .variants import BATCHES, mean_gradients, start_at

WARMUP_SHARE = 0.06
CALIBRATION_SEED = 10_000
get_task = functools.cache(make_task)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What decides a run's numbers.

    Args:
        task: Name of the task.
        method: Key of `METHODS`.
        settings: The method's settings, all of them.
        lr: Peak learning rate; of a group of parameters times its factor. The head's rate is the task's, except for the
            frozen base, where this is the head's rate.
        seed: Decides the initial values of adapter and head, and the batches.
        steps: Optimizer steps.
        stage: "tuning" evaluates on validation data alone, "final" on test data too.
        weight_decay: AdamW's, on the adapter.
        trace: At how many points of training the effective rank is measured.
    """

    task: str
    method: str
    settings: dict[str, Any]
    lr: float
    seed: int
    steps: int
    stage: str
    weight_decay: float = 0.0
    trace: int = 0

    @property
    def key(self) -> str:
        """A digest, the run's name in the table."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def execute(spec: Spec, experiment: str, arm: str, device: str = "cpu") -> dict[str, object]:
    """Train and evaluate; returns the row. A loss that is not finite ends the run and is a result like others.

    Initial values are drawn on the CPU, whatever the device.
    """
    warnings.filterwarnings("ignore")
    started = time.perf_counter()
    task = get_task(spec.task)
    method = METHODS[spec.method]
    torch.manual_seed(spec.seed)
    model = task.build(spec.seed, full=method.full)
    shapes = linear_shapes(model.base)
    before = {name: model.base.get_submodule(name).weight.float().clone() for name in shapes} if method.full else None
    by_gradient = spec.settings.get("start") == "mean gradient"
    if by_gradient:
        batches = task.batches(spec.seed + CALIBRATION_SEED, BATCHES)
        gradients = mean_gradients(model.base, [functools.partial(task.loss, model, batch) for batch in batches])
    groups = method.apply(model.base, spec.settings, spec.seed)
    if by_gradient:
        start_at(gradients, adapter_layers(model.base))
    head = list(model.head.parameters()) if model.head is not None else []
    head_lr = spec.lr if spec.method == "frozen" else task.head_lr
    adapter_parameters = sum(p.numel() for group in groups for p in group["params"])
    model.to(device)
    before = before and {name: weight.to(device) for name, weight in before.items()}

    optimizer_groups = [
        {"params": g["params"], "peak": spec.lr * g["factor"], "weight_decay": spec.weight_decay} for g in groups
    ]
    if head:
        optimizer_groups.append({"params": head, "peak": head_lr, "weight_decay": 0.0})
    losses: list[float] = []
    trace: list[list[float]] = []
    points = {round(spec.steps * (i + 1) / spec.trace) for i in range(spec.trace)}
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=method.full)
    if on_gpu := torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    train_started = time.perf_counter()
    if optimizer_groups:
        optimizer = torch.optim.AdamW(optimizer_groups, lr=0.0, fused=True)
        hook_steps(model.base, optimizer)
        for step, batch in enumerate(task.batches(spec.seed, spec.steps)):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step, spec.steps)
            with autocast:
                loss = task.loss(model, on_device(batch, device))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step + 1 in points:
                trace.append([step + 1, *(round(value, 4) for value in mean_ranks(deltas(model.base, before)))])
    train_seconds = time.perf_counter() - train_started
    peak_bytes = torch.cuda.max_memory_allocated(device) if on_gpu else ""

    diverged = bool(losses) and not math.isfinite(losses[-1])
    empty = {"loss": "", "accuracy": ""}
    val, test = dict(empty), dict(empty)
    general_rise: float | str = ""
    ranks: tuple[Any, Any] = ("", "")
    shares: list[list[float]] = []
    if not diverged:
        with autocast:
            val = task.evaluate(model, "val")
            if spec.stage == "final":
                test = task.evaluate(model, "test")
            if hasattr(task, "general_loss"):
                general_rise = task.general_loss(model) - _general_loss_of_base(spec.task, device)
        diverged = not math.isfinite(val["loss"])
    if not diverged:
        ranks = mean_ranks(deltas(model.base, before))
        if spec.stage == "final" and getattr(task, "shares", ()):
            shares = _of_shares(task, dict(deltas(model.base, before)), _general_loss_of_base(spec.task, device))
    last = losses[-max(1, spec.steps // 3) :]
    dtype = f"{str(getattr(task, 'base_dtype', torch.bfloat16)).removeprefix('torch.')} base, float32 adapter"
    if method.full:
        dtype = "float32 weights, bfloat16 autocast"
    return {
        "key": spec.key,
        "experiment": experiment,
        "arm": arm,
        "task": spec.task,
        "method": spec.method,
        "settings": json.dumps(spec.settings | ({"weight_decay": spec.weight_decay} if spec.weight_decay else {})),
        "budget": adapter_parameters / lora_unit(shapes),
        "adapter_parameters": adapter_parameters,
        "head_parameters": sum(p.numel() for p in head),
        "lr": spec.lr,
        "head_lr": head_lr if head else "",
        "seed": spec.seed,
        "steps": spec.steps,
        "batch_size": task.batch_size,
        "dtype": dtype,
        "stage": spec.stage,
        "status": "diverged" if diverged else "ok",
        "train_loss": sum(last) / len(last) if last else "",
        "val_loss": val["loss"],
        "val_accuracy": val["accuracy"],
        "test_loss": test["loss"],
        "test_accuracy": test["accuracy"],
        "general_rise": general_rise,
        "entropy_rank": ranks[0],
        "stable_rank": ranks[1],
        "rank_trace": json.dumps(trace) if trace else "",
        "saved_bytes": getattr(model.base, "saved_bytes", ""),
        "peak_bytes": peak_bytes,
        "train_seconds": train_seconds,
        "seconds": time.perf_counter() - started,
        "versions": versions(device),
        "fresh_loss": (test if spec.stage == "final" else val).get("fresh_loss", ""),
        "repeated_loss": (test if spec.stage == "final" else val).get("repeated_loss", ""),
        "shares": json.dumps(shares) if shares else "",
    }


@torch.no_grad()
def _of_shares(task: Any, changes: dict[str, Tensor], general_before: float) -> list[list[float]]:
    """What is learned and what is forgotten if a share of each ΔW is added to the base."""
    base = task.build(0)
    weights = {name: base.base.get_submodule(name).weight for name in changes}
    before = {name: weight.clone() for name, weight in weights.items()}
    found = []
    for share in task.shares if changes else ():  # of Lily there is no ΔW
        for name, weight in weights.items():
            weight.copy_(before[name] + share * changes[name].to(weight))
        learned, general = task.evaluate(base, "test")["loss"], task.general_loss(base)
        found.append([share, round(learned, 5), round(general - general_before, 5)])
    return found


@functools.cache
def _general_loss_of_base(task_name: str, device: str) -> float:
    task = get_task(task_name)
    loss: float = task.general_loss(task.build(0).to(device))
    return loss


def start_worker() -> None:
    """Keep a worker process to one thread, and end it soon after the command, also where that was killed."""
    # Here and not in the command's module: a spawned process does not import a package's `__main__`.
    torch.set_num_threads(1)
    end_with_parent()


def end_with_parent() -> None:
    """End this process soon after the one that started it."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # in the middle of a run, whose row nobody would write


def schedule(step: int, steps: int) -> float:
    """Factor on the rate: a linear warm-up, then linear decay to zero."""
    warmup = max(1, int(WARMUP_SHARE * steps))
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


@functools.cache
def versions(device: str = "cpu") -> str:
    """Versions of what the numbers depend on, and the card if they come from one."""
    ours = f"genlora-lightning {genlora_lightning.__version__}"  # which need not be installed
    others = [f"{name} {version(name)}" for name in ("torch", "transformers", "peft")]
    card = [torch.cuda.get_device_name(device)] if torch.device(device).type == "cuda" else []
    return " ".join([f"python {platform.python_version()}", ours, *others, *card])
