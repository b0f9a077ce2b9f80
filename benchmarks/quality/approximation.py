"""Measure how much of an unrestricted update each family of updates can hold.

The linears of a language model's last blocks are trained without restriction, which gives an update ΔW of each. What
counts of it is what it does to inputs x, so errors are weighed by ``C = E[x xᵀ]``. A family holds of ΔW the share

    1 − min over D of ‖(ΔW − D) C^½‖² / ‖ΔW C^½‖²

For LoRA the best D has a closed form: the singular value decomposition of ``ΔW C^½``, cut to the rank (Eckart and
Young). For generated factors it is fitted by AdamW. D is then put in the place of ΔW, and the model's loss is measured.

    python -m benchmarks.quality.approximation        # a quarter of an hour on one core
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genlora_lightning.adapters.base import FactorPair, MatrixShape
from genlora_lightning.adapters.genlora.config import GenLoRAConfig

from .arms import GENLORAS
from .methods import linear_shapes, lora_unit
from .runs import CALIBRATION_SEED, get_task, schedule

RATE = 2e-4  # of the unrestricted training
RANKS = (1, 2, 4, 8, 32)
FIT_RATES = (3e-3, 1e-2, 3e-2)  # the best one counts, for each linear
FIT_STEPS = 500
_USUAL = 0.01  # the root mean square of the entries of an update after a training of usual length
_RIDGE = 1e-4  # of the mean of C's diagonal: directions in which no input goes do not count, and must not divide by 0


@dataclass(frozen=True)
class Target:
    """An update, and what weighs its errors.

    Args:
        delta: ``(out, in)``.
        root: ``C^½ (in, in)``.
    """

    delta: Tensor
    root: Tensor

    @property
    def weighed(self) -> Tensor:
        """``ΔW C^½``."""
        return self.delta @ self.root


def unrestricted(task_name: str, seed: int, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train the linears' weights.

    Returns:
        By name their updates ``(out, in)``, and ``E[x xᵀ] (in, in)`` of the base's inputs.
    """
    task = get_task(task_name)
    model = task.build(seed)
    linears = {name: model.base.get_submodule(name) for name in linear_shapes(model.base)}
    moments = second_moments(
        linears, (lambda b=batch: task.loss(model, b) for batch in task.batches(CALIBRATION_SEED, 8))
    )
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    weights = [linear.weight.requires_grad_() for linear in linears.values()]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    for step, batch in enumerate(task.batches(seed, steps)):
        optimizer.param_groups[0]["lr"] = RATE * schedule(step, steps)
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {name: linears[name].weight.detach() - before[name] for name in linears}, moments


@torch.no_grad()
def second_moments(linears: Mapping[str, nn.Module], forwards: Iterable[object]) -> dict[str, Tensor]:
    """Sum ``x xᵀ`` over the inputs of some linears in forwards, divided by their number."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        sums[name] = sums.get(name, torch.zeros(())) + rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, linear in linears.items()
    ]
    for forward in forwards:
        forward()  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def root_of(moment: Tensor) -> Tensor:
    """``C^½`` of a symmetric matrix, with a small ridge."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=0) + _RIDGE * values.mean()
    return ((vectors * values.sqrt()) @ vectors.T).float()


def best_of_rank(target: Target, rank: int) -> Tensor:
    """The matrix of a rank at most that holds most of a target: ``[ΔW C^½]_r C^-½``."""
    U, S, Vh = torch.linalg.svd(target.weighed, full_matrices=False)
    cut = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return torch.linalg.solve(target.root.double(), cut.double(), left=False).float()


def fitted(update: FactorPair, target: Target, lr: float, steps: int = FIT_STEPS) -> Tensor:
    """What a new update comes to when AdamW makes it hold as much of a target as it can."""
    weighed = target.weighed
    total = weighed.square().sum()
    scale = target.delta.square().mean().sqrt().item() / _USUAL  # of the target, so that the rates suit it
    optimizer = torch.optim.AdamW([p for p in update.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps)
        A, B = update.factors()
        left = scale * update.scaling * (B @ (A @ target.root)) - weighed
        (left.square().sum() / total).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return scale * update.delta_weight()


def squares(target: Target, found: Tensor) -> tuple[float, float]:
    """``‖(ΔW − D) C^½‖²`` and ``‖ΔW C^½‖²``."""
    left = (target.delta - found) @ target.root
    return left.square().sum().item(), target.weighed.square().sum().item()


def best_generated(target: Target, config: GenLoRAConfig) -> Tensor:
    """The best of the fits at all rates."""
    shape = MatrixShape(*target.delta.shape)
    found = []
    for lr in FIT_RATES:
        update = config.make(shape, generator=torch.Generator().manual_seed(0))
        assert isinstance(update, FactorPair)
        found.append(fitted(update, target, lr))
    return min(found, key=lambda one: squares(target, one)[0])


def measure(task_name: str, steps: int | None = None, seed: int = 0) -> str:
    """The table, in Markdown."""
    task = get_task(task_name)
    steps = steps or task.steps
    deltas, moments = unrestricted(task_name, seed, steps)
    targets = {name: Target(delta, root_of(moments[name])) for name, delta in deltas.items()}
    shapes = linear_shapes(task.skeleton())
    settings = GENLORAS[2].settings(shapes)
    config = GenLoRAConfig(**settings)
    families: dict[str, tuple[float, dict[str, Tensor]]] = {"nothing": (0.0, {n: 0 * d for n, d in deltas.items()})}
    for rank in RANKS:
        families[f"LoRA r{rank}"] = rank, {name: best_of_rank(target, rank) for name, target in targets.items()}
    size = sum(config.count_parameters(MatrixShape(n_out, n_in)) for n_in, n_out in shapes.values()) / lora_unit(shapes)
    families[GENLORAS[2].name] = size, {name: best_generated(target, config) for name, target in targets.items()}
    families["all of it"] = sum(d.numel() for d in deltas.values()) / lora_unit(shapes), deltas
    lines = [
        "| family | size, of LoRA rank 1's | share of the update | validation loss with it |",
        "| --- | --- | --- | --- |",
    ]
    for name, (budget, found) in families.items():
        parts = [squares(targets[linear], delta) for linear, delta in found.items()]
        held = 1 - sum(left for left, _ in parts) / sum(whole for _, whole in parts)
        lines.append(f"| {name} | {budget:.2f} | {held:.3f} | {_loss_with(task_name, found):.4f} |")
    return "\n".join(lines)


@torch.no_grad()
def _loss_with(task_name: str, found: Mapping[str, Tensor]) -> float:
    task = get_task(task_name)
    model = task.build(0)
    for name, delta in found.items():
        model.base.get_submodule(name).weight.add_(delta)
    loss: float = task.evaluate(model, "val")["loss"]
    return loss


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, and write it with what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="new-french-tail", help="a text for the last blocks (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the unrestricted training (default: the task's)")
    given = parser.parse_args(arguments)
    started = time.perf_counter()
    table = measure(given.task, given.steps)
    print(f"{given.task}, {time.perf_counter() - started:.0f} s\n\n{table}")


if __name__ == "__main__":
    main()
