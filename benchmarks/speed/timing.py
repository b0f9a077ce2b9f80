"""Times, interleaved: in each round every arm does its task once, in an order that rotates."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genlora_lightning import merge_adapters
from genlora_lightning.layers.sharing import generated

from .models import Arm, autocast, make_arm, make_batches, make_model
from .plan import Cell


@dataclass(frozen=True, kw_only=True)
class Options:
    """How it is measured.

    Args:
        rounds: Interleaved rounds that count.
        warmup: Rounds before them.
        repeats: Processes for each figure of memory.
        threads: Of torch.
        device: Name of torch's device; counts are a CPU's.
        folder: Of SmolLM2-135M; the quickstart's if ``None``.
    """

    rounds: int
    warmup: int
    repeats: int
    threads: int
    device: str
    folder: str | None = None


def measure_steps(cell: Cell, options: Options) -> dict[str, Any]:
    """Seconds of each arm's training steps, and of the generator alone."""
    arms = {name: make_arm(name, cell, options.device) for name in cell.arms}
    tasks = {name: arm.step for name, arm in arms.items()}
    if "genlora" in arms:
        tasks["generator"] = generator_task(arms["genlora"])
    return _seconds(interleave(tasks, options))


def generator_task(arm: Arm) -> Callable[[], Any]:
    """What generation adds to a forward and its backward, without these."""
    parameters = [parameter for parameter in arm.model.parameters() if parameter.requires_grad]
    gradients: list[Tensor] = []

    def task() -> None:
        with autocast(arm.cell, arm.batches[0].device), generated(arm.model) as matrices:
            if not gradients:  # in the first warm-up
                gradients.extend(torch.ones_like(matrix) for matrix in matrices)
        torch.autograd.grad(matrices, parameters, gradients)

    return task


def measure_inference(cell: Cell, options: Options) -> dict[str, Any]:
    """Seconds of each arm's forwards, or of generating some tokens."""
    (ids,) = make_batches(cell, options.device)
    tasks = {}
    for name in cell.arms:
        model = make_model(name, cell, options.device).eval()
        if name == "genlora-merged":
            merge_adapters(model)
        tasks[name] = partial(_infer, cell, model, ids)
    return _seconds(interleave(tasks, options))


@torch.no_grad()
def _infer(cell: Cell, model: Any, ids: Tensor) -> None:
    with autocast(cell, ids.device):
        if cell.kind == "generate":
            length = {"max_new_tokens": cell.new_tokens, "min_new_tokens": cell.new_tokens}
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length
            )
        else:
            model(input_ids=ids, use_cache=False)


def interleave(tasks: dict[str, Callable[[], Any]], options: Options) -> dict[str, list[float]]:
    """Seconds of each task in each round."""
    names = [*tasks]
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there stays; collections between tasks are short
    try:
        for number in range(-options.warmup, options.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds = _timed(tasks[name], options.device)
                if number >= 0:
                    found[name].append(seconds)
    finally:
        gc.unfreeze()
    return found


def _timed(task: Callable[[], Any], device: str) -> float:
    gc.collect()
    gc.disable()
    try:
        _wait(device)
        start = time.perf_counter()
        task()
        _wait(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _seconds(found: dict[str, list[float]]) -> dict[str, Any]:
    return {name: {"seconds": seconds} for name, seconds in found.items()}
