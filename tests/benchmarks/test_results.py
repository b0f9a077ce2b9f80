"""The quality benchmark's bookkeeping: fair trials, resumable runs, intervals, and the report out of rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest

from benchmarks.quality import planned as plan
from benchmarks.quality.arms import LORAS
from benchmarks.quality.experiments import EXPERIMENTS, Experiment
from benchmarks.quality.pictures import _learned_and_forgotten
from benchmarks.quality.planned import pending
from benchmarks.quality.report import difference, reference, write_report
from benchmarks.quality.results import AVERAGE, Cell, load
from benchmarks.quality.rows import FIELDS, append_row, read_rows
from benchmarks.quality.runs import Spec
from benchmarks.quality.stats import average, estimate, paired

SHAPES = {"a.0.x": (384, 384), "a.0.y": (384, 1536)}


class FakeTask:
    steps, num_seeds, num_tuning_seeds, lr_factor = 10, 3, 1, 1.0


@pytest.fixture(autouse=True)
def without_data(monkeypatch):
    monkeypatch.setattr(plan, "get_task", lambda name: FakeTask)
    monkeypatch.setattr(plan, "_shapes", lambda task: SHAPES)


def row_of(arm: str, spec: Spec, loss: float, experiment: str = "main") -> dict[str, object]:
    is_final = spec.stage == "final"
    return {
        **dict.fromkeys(FIELDS, ""),
        "key": spec.key,
        "experiment": experiment,
        "arm": arm,
        "task": spec.task,
        "method": spec.method,
        "settings": json.dumps(spec.settings),
        "budget": float(arm.rpartition("r")[2]),
        "adapter_parameters": 1000,
        "lr": spec.lr,
        "seed": spec.seed,
        "stage": spec.stage,
        "status": "ok" if math.isfinite(loss) else "diverged",
        "val_loss": loss,
        "test_loss": loss if is_final else "",
        "test_accuracy": 0.5 if is_final else "",
        "entropy_rank": 1.0,
        "stable_rank": 1.0,
        "seconds": 1.0,
    }


def small() -> Experiment:
    return dataclasses.replace(EXPERIMENTS["main"], arms=LORAS[:2], tasks=("movies", "tweets"))


def test_every_arm_has_the_same_number_of_trials_a_factor_of_two_apart():
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms:
            for task in experiment.tasks:
                tried = sorted({spec.lr for spec in plan.tuning_specs(experiment, arm, task)})
                assert len(tried) == (0 if experiment.final and experiment.trials == 1 else experiment.trials)
                assert all(b / a == pytest.approx(2, rel=1e-3) for a, b in itertools.pairwise(tried))


def test_final_runs_follow_at_the_best_rate_and_finished_runs_are_not_made_again(tmp_path):
    experiment = small()
    first = pending(experiment, {})
    assert [p.spec.stage for p in first] == ["tuning"] * 16
    for index, planned in enumerate(first):
        loss = math.inf if index % 4 == 3 else 1.0 - 0.1 * (index % 4)  # the third of four rates is the best
        append_row("main", row_of(planned.arm, planned.spec, loss), tmp_path)
    second = pending(experiment, read_rows(tmp_path))
    assert len(second) == 2 * 2 * 3
    assert all(p.spec.stage == "final" and p.spec.lr == pytest.approx(4e-3) for p in second)
    append_row("main", row_of(second[0].arm, second[0].spec, 0.9), tmp_path)
    assert pending(experiment, read_rows(tmp_path)) == second[1:]


def test_where_one_rate_is_given_final_runs_have_it_at_once_and_an_arm_may_want_fewer_of_them():
    arms = (LORAS[0], dataclasses.replace(LORAS[1], most_seeds=2))
    experiment = dataclasses.replace(small(), arms=arms, trials=1, steps=7)
    runs = [planned.spec for planned in pending(experiment, {})]
    assert len(runs) == plan.total_runs(experiment) == 2 * (3 + 2)
    assert {(spec.stage, spec.lr, spec.steps) for spec in runs} == {("final", 1e-3, 7)}
    assert [p.spec for p in pending(experiment, {runs[0].key: {}})] == runs[1:]


def test_rate_has_the_lowest_mean_over_the_tuning_seeds_that_the_task_asks_for(monkeypatch):
    monkeypatch.setattr(FakeTask, "num_tuning_seeds", 2)
    experiment = dataclasses.replace(small(), tasks=("movies",))
    arm = experiment.arms[0]
    specs = plan.tuning_specs(experiment, arm, "movies")
    assert sorted({spec.seed for spec in specs}) == [100, 101]
    losses = {100: [0.5, 0.7, 0.9, 0.9], 101: [1.1, 0.8, 0.9, 0.9]}  # the best of one seed is not the best of both
    done = {spec.key: {"status": "ok", "val_loss": losses[spec.seed][index % 4]} for index, spec in enumerate(specs)}
    finals = plan.final_specs(experiment, arm, "movies", done)
    assert {spec.lr for spec in finals} == {specs[1].lr}
    assert plan.final_specs(experiment, arm, "movies", dict([*done.items()][:-1])) is None
    assert Cell(trials={1.0: {100: 0.5}, 2.0: {100: 0.7, 101: 0.8}, 4.0: {100: 0.9, 101: 0.7}}).best_rate == 2.0


def test_trial_that_another_experiment_made_counts_where_settings_task_and_seed_are_the_same(tmp_path):
    arm, other = LORAS[0], LORAS[1]
    specs = plan.tuning_specs(small(), arm, "movies")
    for number, spec in enumerate(specs):
        experiment = "main" if number else "search"
        append_row(experiment, row_of(arm.name, spec, 1.0, experiment), tmp_path)
    strangers = [dataclasses.replace(specs[0], seed=7), plan.tuning_specs(small(), other, "movies")[0]]
    for spec in strangers:
        append_row("search", row_of(arm.name, spec, 0.5, "search"), tmp_path)
    cell = load(tmp_path, ("main",)).cells[arm.name]["movies"]
    assert cell.trials == {spec.lr: {spec.seed: 1.0} for spec in specs}


def test_final_runs_of_an_earlier_rate_do_not_mix_with_those_of_the_best(tmp_path):
    arm = LORAS[0]
    spec = plan.tuning_specs(small(), arm, "movies")[0]
    for lr, seeds, loss in ((1e-3, (0, 1, 2), 0.5), (2e-3, (0, 1), 0.9)):
        for seed in seeds:
            append_row(
                "main", row_of(arm.name, dataclasses.replace(spec, lr=lr, seed=seed, stage="final"), loss), tmp_path
            )
    cell = load(tmp_path, ("main",)).cells[arm.name]["movies"]
    assert cell.scores("test_loss") == {0: 0.9, 1: 0.9}


def test_key_depends_on_everything_that_decides_the_numbers():
    spec = Spec(task="movies", method="lora", settings={"r": 1}, lr=1e-3, seed=0, steps=5, stage="final")
    others = [
        dataclasses.replace(spec, **change)
        for change in ({"settings": {"r": 2}}, {"lr": 2e-3}, {"seed": 1}, {"steps": 6}, {"stage": "tuning"})
    ]
    assert len({spec.key, *(other.key for other in others)}) == 6


def test_row_with_another_set_of_fields_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fields differ"):
        append_row("main", {"key": "x"}, tmp_path)


def test_intervals_are_students():
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-4)
    assert estimate([1.0]).half == math.inf
    assert paired({0: 1.0, 1: 2.0}, {1: 1.5, 2: 0.0}) == [0.5]


def test_interval_of_an_average_over_tasks_is_welchs():
    # Equal spreads and numbers: the degrees of freedom add up.
    found = average([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]])
    assert found.mean == 7.0
    assert found.half == pytest.approx(2.776 * math.sqrt(2 / 3) / 2, rel=1e-4)
    # Where one spread is all there is, its own count, and the average halves it.
    alone = average([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert alone.half == pytest.approx(estimate([1.0, 2.0, 3.0]).half / 2)
    assert average([[1.0, 2.0], [3.0]]).half == math.inf
    assert average([[1.0, 1.0]]).half == 0.0


def test_width_of_the_range_is_interpolated_and_says_where_it_is_open():
    cell = Cell(trials={1.0: {0: 1.02}, 2.0: {0: 1.0}, 4.0: {0: 1.005}, 8.0: {0: math.inf}})
    width, is_open = cell.range_width(0.01)
    assert width == pytest.approx(1.5)
    assert not is_open
    assert cell.best_rate == 2.0
    assert cell.is_at_edge == ""
    assert Cell(trials={1.0: {0: 1.0}, 2.0: {0: 1.1}, 4.0: {0: 1.2}}).is_at_edge == "lowest"


def test_report_compares_with_lora_of_the_same_size_and_bears_gaps(tmp_path):
    for arm, offset in (("LoRA r1", 0.0), ("GenLoRA r1", -0.1), ("GenLoRA r2", -0.2)):
        for task in ("movies", "tweets", "siqa"):
            if arm == "GenLoRA r2" and task != "movies":
                continue  # not run yet
            for seed in range(3):
                spec = Spec(
                    task=task,
                    method=arm.split()[0].lower(),
                    settings={"name": arm},
                    lr=1e-3,
                    seed=seed,
                    steps=5,
                    stage="final",
                )
                append_row("main", row_of(arm, spec, 1.0 + 0.01 * seed + offset), tmp_path)
    results = load(tmp_path, ("main",))
    assert reference(results, "GenLoRA r1") == "LoRA r1"
    assert reference(results, "GenLoRA r2") is None
    found = difference(results, "GenLoRA r1", "LoRA r1", AVERAGE)
    assert found.mean == pytest.approx(-0.1)
    assert found.half == pytest.approx(0, abs=1e-9)  # paired: what seeds have in common drops out
    assert results.samples("GenLoRA r2", AVERAGE, "test_loss") == []
    # Compared over the tasks that both have, and the report says which.
    assert list(results.differences("GenLoRA r2", "LoRA r1", AVERAGE, "test_loss")) == ["movies"]
    pytest.importorskip("matplotlib")
    write_report(tmp_path, tmp_path / "REPORT.md", tmp_path / "images")
    text = (tmp_path / "REPORT.md").read_text()
    assert "| 1. GenLoRA r1 better than LoRA r1 on average, worse on no task | yes |" in text
    assert "| average -0.1000 ± 0.0000; encoders -0.1000 ± 0.0000; worse on: none |" in text  # siqa is not an encoder's
    assert list(results.differences("GenLoRA r1", "LoRA r1", "encoders", "test_loss")) == ["movies", "tweets"]
    assert "left out below: LoRA r2" in text
    assert (tmp_path / "images" / "quality-pareto.png").stat().st_size > 5000


def test_report_has_the_last_blocks_apart_with_what_was_forgotten_and_searched(tmp_path):
    def add(arm, experiment, task, seed, lr, loss, stage):
        spec = Spec(
            task=task,
            method=arm.split()[0].lower(),
            settings={"name": arm},
            lr=lr,
            seed=seed,
            steps=5,
            stage=stage,
        )
        row = row_of(arm, spec, loss, experiment)
        row["general_rise"] = 0.25 + loss / 10 if stage == "final" else ""
        row["shares"] = json.dumps([[0.5, loss + 0.2, 0.1]]) if stage == "final" and seed else ""
        if stage == "final" and task == "lisp-tail" and seed < 2:
            row["fresh_loss"], row["repeated_loss"] = loss + 0.1, 2 * loss - 1.9
        append_row(experiment, row, tmp_path)

    for arm, loss in (("LoRA r2", 2.0), ("GenLoRA r2", 1.9)):
        for experiment, task in (("tail", "french-tail"), ("tail", "lisp-tail"), ("new-tail", "messages-tail")):
            for lr, more in ((0.01, 0.1), (0.02, 0.0), (0.04, 0.2)):
                add(arm, experiment, task, 100, lr, loss + more, "tuning")
            for seed in range(3):
                add(arm, experiment, task, seed, 0.02, loss + 0.01 * seed, "final")
    add("Other r2", "tail-search", "french-tail", 100, 0.02, 2.5, "tuning")
    pytest.importorskip("matplotlib")
    write_report(tmp_path, tmp_path / "REPORT.md", tmp_path / "images")
    text = (tmp_path / "REPORT.md").read_text()
    of = "the language model's last blocks"
    assert f"## Rise of the loss on English news (lower is better): {of}" in text
    assert "| GenLoRA r2 | 1,000 | 0.4410 ± 0.0025 | 0.4410 ± 0.0025 | 0.4410 ± 0.0011 |" in text
    assert "| GenLoRA r2 | LoRA r2 | 1.00 | -0.1000 ± 0.0000 | -0.1000 ± 0.0000 | -0.1000 ± 0.0000 |" in text
    assert "| Other r2 | 2.00 | 0.02: 2.5000 | – |" in text
    assert "| LoRA r2 | 2.00 | 0.01: 2.1000, 0.02: 2.0000, 0.04: 2.2000 |" in text
    assert f"## Learning rates: {of}" in text
    assert f"## Test loss (lower is better): {of}, new text\n\n| method | adapter parameters | messages-tail |" in text
    assert f"## Test loss of new and of repeated text: {of}" in text
    loss = "| GenLoRA r2 | lisp-tail | 2 | 2.0050 ± 0.0635 | 1.9100 ± 0.1271 | -0.1000 ± 0.0000 | -0.2000 ± 0.0000 |"
    assert loss in text
    assert "| GenLoRA r2 | french-tail | 3" not in text  # whose runs have no such losses
    assert "(" + str(tmp_path / "images" / "quality-forgetting.png") + ")" in text
    assert (tmp_path / "images" / "quality-forgetting.png").stat().st_size > 5000
    tail = load(tmp_path, ("tail",))
    # Of the two seeds with shares alone, so that the points are of one line.
    expected = [(2.015 + 0.2, 0.1), (2.015, 0.4515)]
    assert _learned_and_forgotten(tail, "LoRA r2", "french-tail") == [pytest.approx(point) for point in expected]
    assert "## Test loss (lower is better)\n" not in text  # there are no rows of the other tasks
