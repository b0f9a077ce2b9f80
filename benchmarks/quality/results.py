"""What the tables of results say: trials, best rates and final scores per arm and task."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from .experiments import EXPERIMENTS, LANGUAGE_TASKS, NEW_TAIL_TASKS, SENTIMENT_TASKS, TAIL_TASKS, VISION_TASKS
from .rows import Row, read_rows
from .stats import paired

AVERAGE = "average"
# What scores are averaged over, besides all tasks.
GROUPS = {"encoders": (*SENTIMENT_TASKS, *VISION_TASKS), "language model": LANGUAGE_TASKS}
ARM_ORDER = [arm.name for arm in EXPERIMENTS["main"].arms]
TASK_ORDER = [*SENTIMENT_TASKS, *LANGUAGE_TASKS, *VISION_TASKS, *NEW_TAIL_TASKS, *TAIL_TASKS]


@dataclass
class Cell:
    """An arm on a task.

    Args:
        trials: Validation loss by rate and seed; infinite where the run diverged.
        finals: Rows of the final runs by seed, at the rate they were made with.
    """

    trials: dict[float, dict[int, float]] = field(default_factory=dict)
    finals: dict[int, Row] = field(default_factory=dict)

    def scores(self, column: str) -> dict[int, float]:
        """A column of the final runs that have it by seed; a run that diverged counts as not finite."""
        found = {
            seed: row[column] or "nan" for seed, row in self.finals.items() if row[column] or row["status"] != "ok"
        }
        return {seed: float(value) for seed, value in found.items()}

    @property
    def best_rate(self) -> float | None:
        """The rate with the lowest mean validation loss."""
        means = self.means()
        return min(means, key=lambda rate: means[rate]) if means else None

    def means(self) -> dict[float, float]:
        """Mean validation loss by rate, of the rates that were tried with the most seeds: others would not compare."""
        most = max(map(len, self.trials.values()), default=0)
        return {rate: sum(losses.values()) / most for rate, losses in self.trials.items() if len(losses) == most}

    @property
    def is_at_edge(self) -> str:
        """Which end of the rates tried the best one is: "lowest" or "highest", or empty."""
        best, tried = self.best_rate, sorted(self.means())
        if best is None or len(tried) < 2 or best not in (tried[0], tried[-1]):
            return ""
        return "lowest" if best == tried[0] else "highest"

    def range_width(self, tolerance: float = 0.01) -> tuple[float, bool] | None:
        """Width in factors of 2 of the rates whose loss is within `tolerance` of the best, and whether an end was hit.

        Between two rates the loss is taken as linear in the logarithm of the rate.
        """
        points = sorted((math.log2(rate), mean) for rate, mean in self.means().items())
        if len(points) < 3:
            return None
        best = min(range(len(points)), key=lambda i: points[i][1])
        limit = points[best][1] * (1 + tolerance)
        ends, open_end = [], False
        for direction in (-1, 1):
            i = best
            while 0 <= i + direction < len(points) and points[i + direction][1] <= limit:
                i += direction
            if not 0 <= i + direction < len(points):
                ends.append(points[i][0])
                open_end = True
                continue
            (x0, y0), (x1, y1) = points[i], points[i + direction]
            ends.append(x0 + (x1 - x0) * ((limit - y0) / (y1 - y0) if math.isfinite(y1) else 0.0))
        return ends[1] - ends[0], open_end


@dataclass
class Results:
    """All cells, in the order of the main experiment's arms and tasks; others follow as they appear."""

    cells: dict[str, dict[str, Cell]]  # arm, task
    parameters: dict[str, dict[str, int]]  # arm, task: adapter parameters
    budgets: dict[str, float]
    methods: dict[str, str]
    settings: dict[str, dict[str, object]]
    runs: int
    diverged: int
    seconds: float
    versions: list[str]

    def arms(self, task: str | None = None) -> list[str]:
        """Arms with final runs, on the task or on any."""
        found = [
            arm for arm, tasks in self.cells.items() if any(c.finals for t, c in tasks.items() if task in (None, t))
        ]
        return sorted(found, key=lambda arm: ARM_ORDER.index(arm) if arm in ARM_ORDER else len(ARM_ORDER))

    def tasks(self) -> list[str]:
        """Tasks with final runs."""
        found = {task: None for tasks in self.cells.values() for task, cell in tasks.items() if cell.finals}
        return sorted(found, key=lambda task: TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER))

    def samples(self, arm: str, task: str, column: str) -> list[list[float]]:
        """Final scores of a task; of the average or a group those of each task, or nothing unless all have some."""
        found = [list(self._scores(arm, name, column).values()) for name in self._tasks_of(task)]
        return found if all(found) else []

    def differences(self, arm: str, other: str, task: str, column: str) -> dict[str, list[float]]:
        """By task an arm's final scores minus another's, paired by seed; of an average all that both have."""
        found = {
            name: paired(self._scores(arm, name, column), self._scores(other, name, column))
            for name in self._tasks_of(task)
        }
        return {name: values for name, values in found.items() if values}

    def _tasks_of(self, name: str) -> list[str]:
        if name != AVERAGE and name not in GROUPS:
            return [name]
        return [task for task in self.tasks() if task in GROUPS.get(name, (task,))]

    def _scores(self, arm: str, task: str, column: str) -> dict[int, float]:
        cell = self.cells.get(arm, {}).get(task)
        return cell.scores(column) if cell else {}


def load(folder: Path, experiments: tuple[str, ...]) -> Results:
    """Read the rows of some experiments; an arm is known by its name.

    Where an arm was changed and run again, the final runs of its latest settings count, and of those the ones with the
    latest rate. A trial that another experiment made is not made again; it is found by its settings, task and seed.
    """
    results = Results({}, {}, {}, {}, {}, 0, 0, 0.0, [])
    rows = [*read_rows(folder).values()]
    for row in rows:
        results.runs += 1
        results.diverged += row["status"] != "ok"
        results.seconds += float(row["seconds"])
        if row["versions"] not in results.versions:
            results.versions.append(row["versions"])
        if row["experiment"] not in experiments:
            continue
        arm, task = row["arm"], row["task"]
        settings = json.loads(row["settings"])
        cell = results.cells.setdefault(arm, {}).setdefault(task, Cell())
        if results.settings.get(f"{arm}/{task}", settings) != settings:
            cell = results.cells[arm][task] = Cell()
        results.settings[f"{arm}/{task}"] = settings
        results.parameters.setdefault(arm, {})[task] = int(row["adapter_parameters"])
        results.budgets[arm] = float(row["budget"])
        results.methods[arm] = _kind(row, settings)
        if row["stage"] == "tuning":
            loss = float(row["val_loss"]) if row["status"] == "ok" else math.inf
            cell.trials.setdefault(float(row["lr"]), {})[int(row["seed"])] = loss
        else:
            if any(earlier["lr"] != row["lr"] for earlier in cell.finals.values()):
                cell.finals.clear()  # more trials have found another rate since
            cell.finals[int(row["seed"])] = row
    for row in rows:
        if row["experiment"] not in experiments and row["stage"] == "tuning" and row["status"] == "ok":
            _add_trial(results, row)
    return results


def _kind(row: Row, settings: dict[str, object]) -> str:
    """The method; GenLoRA without signs is one of its own, a form that lost."""
    return "grouped" if settings.get("entry_signs") is False else str(row["method"])


def _add_trial(results: Results, row: Row) -> None:
    settings = json.loads(row["settings"])
    for arm, tasks in results.cells.items():
        cell = tasks.get(row["task"])
        is_same = results.methods[arm] == _kind(row, settings)
        if cell is None or not is_same or results.settings[f"{arm}/{row['task']}"] != settings:
            continue
        if any(int(row["seed"]) in losses for losses in cell.trials.values()):
            cell.trials.setdefault(float(row["lr"]), {}).setdefault(int(row["seed"]), float(row["val_loss"]))
