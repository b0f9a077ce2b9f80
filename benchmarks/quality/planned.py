"""The runs of an experiment, in which order: trials of the learning rate, then fresh seeds at the best one.

Fair by construction: on a task every arm has the same steps, the same batches for a seed, the same head, and the same
number of trials of the learning rate, a factor of 2 apart, judged by validation loss, at as many seeds as the task asks
for. Then fresh seeds at the best rate, and only there the test data are looked at.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .arms import Arm
from .experiments import TUNING_SEED, Experiment
from .methods import Shapes, linear_shapes
from .rows import Row
from .runs import Spec, get_task


@dataclass(frozen=True)
class Planned:
    """A run that is still to be made."""

    arm: str
    spec: Spec


def rates(arm: Arm, experiment: Experiment, task: str) -> list[float]:
    """The rates that are tried, in ascending order."""
    lowest = arm.lr * get_task(task).lr_factor
    return [float(f"{lowest * 2**i:.6g}") for i in range(experiment.trials)]


def tuning_specs(experiment: Experiment, arm: Arm, task: str) -> list[Spec]:
    """One run per rate and tuning seed; none where there is nothing to choose for the final runs."""
    if experiment.final and experiment.trials == 1:
        return []
    settings = arm.settings(_shapes(task))
    return [
        _spec(arm, task, settings, lr, seed, "tuning", experiment.steps)
        for seed in _tuning_seeds(experiment, task)
        for lr in rates(arm, experiment, task)
    ]


def final_specs(experiment: Experiment, arm: Arm, task: str, done: dict[str, Row]) -> list[Spec] | None:
    """Fresh seeds at the best rate; ``None`` while the trials are not complete or all have diverged."""
    if not experiment.final:
        return []
    seeds = range(_num_seeds(experiment, arm, task))
    settings = arm.settings(_shapes(task))
    if experiment.trials == 1:
        (only,) = rates(arm, experiment, task)
        return [_spec(arm, task, settings, only, seed, "final", experiment.steps) for seed in seeds]
    trials = tuning_specs(experiment, arm, task)
    if any(spec.key not in done for spec in trials):
        return None
    losses: dict[float, float] = defaultdict(float)  # over the tuning seeds, of which all rates have the same
    for spec in trials:
        losses[spec.lr] += _score(done[spec.key])
    best = min(losses, key=lambda lr: losses[lr])
    if not math.isfinite(losses[best]):
        return []
    return [replace(trials[0], lr=best, seed=seed, stage="final", trace=experiment.trace) for seed in seeds]


def pending(experiment: Experiment, done: dict[str, Row], skip: Iterable[str] = ()) -> list[Planned]:
    """The runs that can start now: all trials first, then the final runs, in the order of the arms.

    Args:
        experiment: The experiment, its arms and tasks narrowed down as wanted.
        done: Rows by key, of all experiments: a run that another one made is not made again.
        skip: Keys of runs that are under way, or have failed.
    """
    out = {*done, *skip}
    cells = [(arm, task) for arm in experiment.arms for task in experiment.tasks]
    trials = [Planned(arm.name, spec) for arm, task in cells for spec in tuning_specs(experiment, arm, task)]
    finals = [Planned(arm.name, spec) for arm, task in cells for spec in final_specs(experiment, arm, task, done) or ()]
    return [planned for planned in (*trials, *finals) if planned.spec.key not in out]


def total_runs(experiment: Experiment) -> int:
    """How many runs the experiment has."""
    trials = experiment.trials * sum(len(_tuning_seeds(experiment, task)) for task in experiment.tasks)
    if experiment.final and experiment.trials == 1:
        trials = 0
    cells = [(arm, task) for arm in experiment.arms for task in experiment.tasks] if experiment.final else []
    return len(experiment.arms) * trials + sum(_num_seeds(experiment, arm, task) for arm, task in cells)


def narrowed(experiment: Experiment, tasks: Sequence[str], arms: Sequence[str]) -> Experiment:
    """The experiment with the named tasks and arms only; all where nothing is named.

    Raises:
        ValueError: A name is not known; the message lists those that are.
    """
    known_arms = [arm.name for arm in experiment.arms]
    for wanted, known, what in ((tasks, list(experiment.tasks), "tasks"), (arms, known_arms, "methods")):
        if unknown := sorted(set(wanted) - set(known)):
            raise ValueError(f"Unknown {what} {unknown}; the experiment has {known}.")
    return replace(
        experiment,
        tasks=[task for task in experiment.tasks if not tasks or task in tasks],
        arms=[arm for arm in experiment.arms if not arms or arm.name in arms],
    )


def _tuning_seeds(experiment: Experiment, task: str) -> Sequence[int]:
    if experiment.tuning_seeds is not None:
        return experiment.tuning_seeds
    return range(TUNING_SEED, TUNING_SEED + get_task(task).num_tuning_seeds)


def _num_seeds(experiment: Experiment, arm: Arm, task: str) -> int:
    wanted: int = get_task(task).num_seeds
    return min([wanted, *(most for most in (experiment.most_seeds, arm.most_seeds) if most is not None)])


_SHAPES: dict[str, Shapes] = {}


def _shapes(task: str) -> Shapes:
    if task not in _SHAPES:
        _SHAPES[task] = linear_shapes(get_task(task).skeleton())
    return _SHAPES[task]


def _spec(
    arm: Arm, task: str, settings: dict[str, Any], lr: float, seed: int, stage: str, steps: int | None = None
) -> Spec:
    return Spec(
        task=task,
        method=arm.method,
        settings=settings,
        lr=lr,
        seed=seed,
        steps=steps or get_task(task).steps,
        stage=stage,
        weight_decay=arm.weight_decay,
    )


def _score(row: Row) -> float:
    return float(row["val_loss"]) if row["status"] == "ok" else math.inf
