"""The speed benchmark, run as a whole on tiny models: what it counts, that it goes on, its report. No time counts."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
from dataclasses import replace

import pytest
import torch

from benchmarks.speed import __main__ as command
from benchmarks.speed import memory
from benchmarks.speed.counts import saved_bytes
from benchmarks.speed.models import MODELS, adapted_modules, load_base, make_arm, put_on, targets
from benchmarks.speed.plan import EXPERIMENTS, FULL, QUICK
from benchmarks.speed.report import bars, markdown
from benchmarks.speed.results import Results, Spread, spread

CELLS = list(dict.fromkeys(cell for name in EXPERIMENTS for cell in QUICK.cells(name)))


def in_a_fork(cell, arm, options):
    """What a worker measures, in a process that need not import all libraries."""
    request = {"cell": cell.to_dict(), "arm": arm, "threads": options.threads, "device": options.device}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # or what is free already holds all that is measured
            os.write(writing, json.dumps(memory.work(request)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    return json.loads(found)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    worker = memory._in_process

    def measured(cell, arm, options):  # one is enough to start as the benchmark does
        return (worker if arm == "lora" else in_a_fork)(cell, arm, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_in_process", measured)
        # A third of the time, so that rounds are alike; no time counts here.
        for name in ("collect", "freeze", "unfreeze"):
            patch.setattr(gc, name, lambda: None)
        assert command.main(["run", "all", "--quick", "--results", str(path)]) == 0
    return path


@pytest.fixture
def results(path):
    return Results(path)


def counts(results, precision="fp32", rank=4, model=QUICK.language):
    return results.arms(QUICK.cell("counts", precision, rank, model=model))


def test_every_cell_has_all_its_arms_with_a_time_of_each_round(results):
    assert set(results.cells) == {cell.key for cell in CELLS}
    for cell in CELLS:
        arms = results.arms(cell)
        assert set(arms) == {*cell.arms, *(["generator"] if cell.kind == "step" and "genlora" in cell.arms else [])}
        for arm in arms.values():
            if cell.kind in ("step", "forward", "generate"):
                assert len(arm["seconds"]) == 2
                assert min(arm["seconds"]) > 0
                assert arm["median_seconds"] == statistics.median(arm["seconds"])
            elif cell.kind == "memory":
                assert 0 < arm["growth_bytes"][0] < arm["peak_bytes"][0]


def test_arms_cover_what_is_compared():
    arms = {arm for cell in CELLS for arm in cell.arms}
    assert arms > {"floor", "genlora", "genlora-once", "genlora-bf16", "our-lora", "lora", "lora-bf16", "vera", "base"}
    for cell in CELLS:
        assert ("our-lora" in cell.arms) == (cell.kind in ("step", "counts"))
    for name in EXPERIMENTS:
        assert {cell.kind for cell in FULL.cells(name)} == {cell.kind for cell in QUICK.cells(name)}
    assert {cell.rank for cell in FULL.cells("ranks")} == {8, 16, 64, 256}
    assert {cell.tokens for cell in FULL.cells("tokens") if cell.model == "smollm2"} == {128, 256, 512, 1024}


@pytest.mark.parametrize("number", range(len(FULL.sizes)))
def test_arms_of_one_size_train_as_many_parameters_as_the_lora_beside_them(number):
    cell = replace(FULL.size_cell("random-1b-blocks", number), tokens=2, batch=1)
    with torch.device("meta"):
        sizes = {
            name: sum(
                p.numel()
                for p in put_on(name, MODELS[cell.model](torch.float32), cell.rank).parameters()
                if p.requires_grad
            )
            for name in cell.arms
            if name != "floor"
        }
    assert len(sizes) == 5
    assert sizes["our-lora"] == sizes["lora"]
    for size in sizes.values():
        assert size == pytest.approx(sizes["lora"], rel=0.03)


@pytest.mark.parametrize("model", [QUICK.language, QUICK.encoder])
def test_operators_in_a_linear_are_three_and_two_more_than_the_bases_under_autocast(results, model):
    found = {name: arm["operators"]["per_linear"] for name, arm in counts(results, model=model).items()}
    assert (found["floor"], found["genlora"], found["our-lora"], found["lora"]) == (1, 3, 3, 5)
    found = {name: arm["operators"]["per_linear"] for name, arm in counts(results, "bf16-mixed", model=model).items()}
    assert found["genlora"] == pytest.approx(found["floor"] + 2)
    assert found["genlora-bf16"] < found["genlora"]  # no weight is cast


def test_generators_operators_do_not_depend_on_the_number_of_blocks(results):
    for rank in QUICK.ranks:
        for arm in ("genlora", "genlora-bf16"):
            generator = counts(results, "bf16-mixed", rank)[arm]["generator"]
            assert 0 < generator["forward"] == generator["forward_at_half_depth"]
            assert generator["forward"] <= 30 * generator["shapes"]


def test_fewer_bytes_for_the_optimizer_and_fewer_gradients_than_lora(results):
    arms = counts(results)
    for field in ("optimizer_bytes", "gradient_elements", "gradient_bytes"):
        assert arms["floor"][field] == 0 < arms["genlora"][field] < arms["lora"][field]
        assert arms["our-lora"][field] == arms["lora"][field]
    assert arms["lora"]["gradient_elements"] * 4 == arms["lora"]["gradient_bytes"]
    assert counts(results, "bf16-mixed")["lora-bf16"]["gradient_bytes"] * 2 == arms["lora"]["gradient_bytes"]


def test_arms_share_the_bases_weights_and_leave_them_as_they_are():
    cell = QUICK.cell("step", "fp32", 4)
    base = load_base(cell.model, torch.float32, "cpu")
    before = {name: p.clone() for name, p in base.named_parameters()}
    own = {p.data_ptr() for p in base.parameters()}
    for name in ("floor", "genlora", "our-lora", "lora", "vera"):
        arm = make_arm(name, cell, "cpu")
        frozen = {p.data_ptr() for p in arm.model.parameters() if not p.requires_grad}
        assert own <= frozen
        start = {n: p.clone() for n, p in arm.model.named_parameters() if p.requires_grad}
        arm.step()
        moved = [n for n, p in arm.model.named_parameters() if p.requires_grad and not torch.equal(p, start[n])]
        assert bool(moved) == (name != "floor")
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name])


def test_saved_bytes_are_those_of_what_is_made_in_the_forward():
    cell = QUICK.cell("step", "fp32", 4)
    lora, genlora = (saved_bytes(make_arm(name, cell, "cpu")) for name in ("lora", "genlora"))
    trained = sum(p.numel() * 4 for p in make_arm("lora", cell, "cpu").model.parameters() if p.requires_grad)
    # A of the first block's query, key and value is not needed: their input has no gradient.
    assert lora[1] - lora[0] == trained - 3 * 4 * 32 * 4
    assert 0 < genlora[0] < genlora[1]


def test_second_run_measures_nothing_again_unless_settings_differ_or_it_is_told_to(path, capsys, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(command, "measure", lambda cell, options: pytest.fail(f"measured {cell.key}"))
    assert command.main(["run", "all", "--quick", "--results", str(path)]) == 0
    assert capsys.readouterr().out.count("measured before") == len(CELLS)
    assert path.read_bytes() == before
    for change in (["--rounds", "3"], ["--fresh"]):
        with pytest.raises(pytest.fail.Exception, match="measured step"):
            command.main(["run", "steps", "--quick", "--results", str(path), *change])


def test_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch):
    path = tmp_path / "speed.json"
    first, measure = QUICK.cells("counts")[0], command.measure

    def interrupted(cell, options):
        if cell != first:
            raise KeyboardInterrupt
        return measure(cell, options)

    monkeypatch.setattr(command, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main(["run", "counts", "--quick", "--results", str(path)])
    assert set(json.loads(path.read_text())["cells"]) == {first.key}


def test_report_gives_each_bar_with_its_status_and_a_table_of_each_experiment(path, capsys):
    assert command.main(["report", "--results", str(path)]) == 0
    text = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    status = {row[0]: row[-1] for row in rows}
    for bar in bars(QUICK):
        missing = "peak memory" in bar.what and ("bf16" in bar.what or "rank 4" in bar.what)
        expected = {"not measured"} if missing else {"reported"} if bar.most is None else {"met", "not met"}
        assert status[bar.what] in expected, bar.what
    assert status["operators forward in an adapted linear, fp32, rank 2"] == "met"
    assert status["generator's operators, all blocks / half of them, rank 4"] == "met"
    assert status["bytes of optimizer and gradients / PEFT LoRA, rank 4"] == "not met"  # of so small a model
    for name in EXPERIMENTS:
        assert f"## {name.capitalize()}" in text
    nothing = [bar.row(Results(path.with_name("none.json"))) for bar in bars(FULL)]
    assert {row[-1] for row in nothing} == {"not measured"}
    assert len({row[0] for row in nothing}) == len(nothing)


def test_results_without_an_arm_are_reported_and_its_bar_is_not_measured(path, tmp_path):
    content = json.loads(path.read_text())
    for cell in content["cells"].values():
        cell["arms"].pop("our-lora", None)
    older = tmp_path / "older.json"
    older.write_text(json.dumps(content))
    text, full = (markdown(Results(file)) for file in (older, path))
    assert text.count("LoRA by us") == full.count("| LoRA by us / PEFT LoRA, step") == 2 * len(QUICK.main_ranks)
    for line in text.splitlines():
        assert ("LoRA by us" not in line) or line.endswith("| not measured |")
    assert "## Counts" in text


def test_our_lora_computes_what_pefts_does():
    cell = QUICK.cell("step", "fp32", 4)
    ours, theirs = (make_arm(name, cell, "cpu") for name in ("our-lora", "lora"))
    names = targets(load_base(cell.model, torch.float32, "cpu"))
    layers = zip(*(adapted_modules(arm.model, names) for arm in (ours, theirs)), strict=True)
    with torch.no_grad():
        for layer, other in layers:
            for factor in (layer.update.A, layer.update.B):
                factor.matrix.normal_(std=0.1)
            other.lora_A["default"].weight.copy_(layer.update.A.matrix)
            other.lora_B["default"].weight.copy_(layer.update.B.matrix.T)
    torch.testing.assert_close(ours.loss(ours.batches[0]), theirs.loss(theirs.batches[0]))


def test_ratios_are_of_times_of_the_same_round(results):
    cell = QUICK.cell("step", "fp32", 2)
    results.arms(cell)["genlora"]["seconds"] = [1.0, 30.0]
    results.arms(cell)["lora"]["seconds"] = [2.0, 20.0]
    assert results.ratio(cell, "genlora", "lora") == Spread(0.75, 1.0, 1.25)
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)


def test_missing_model_is_one_line_that_tells_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(command.MODEL_VARIABLE, "")  # put back afterwards
    arguments = ["run", "steps", "--model", str(tmp_path), "--results", str(tmp_path / "speed.json")]
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "prepare.py" in error
