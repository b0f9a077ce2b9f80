"""Runs on disk, as they are read, listed and shown."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from genlora_lightning import inject_adapters, save_adapter
from genlora_lightning.artifacts.inspection import describe_adapter
from genlora_lightning.callbacks import figures, throughput
from genlora_lightning.cli.main import main
from genlora_lightning.reports.curves import curve
from genlora_lightning.reports.page import run_page
from genlora_lightning.reports.record import SPECTRA_FILE
from genlora_lightning.reports.runs import find_run, find_runs
from genlora_lightning.reports.spectra import SpectrumPoint, header_line, kept_places, point_line
from tests.conftest import perturb, small_config
from tests.models import tiny_llama
from tests.reports.browser import dom_of, needs_browser

FINISHED = "epoch,fit_seconds,fit_tokens_per_second,lr,step,train_loss,val_loss\n"
FINISHED += "0,,,0.1,1,4.0,\n0,,,0.2,3,2.0,\n0,,,0.1,5,3.0,\n0,,,,5,,2.5\n,125.0,88.0,,6,,\n"


def make_run(
    folder: Path,
    text: str | None = FINISHED,
    *,
    adapter: dict[str, Any] | None = None,
    place: Path | None = None,
    run: str | None = None,
    **config: Any,
) -> Path:
    """A run's folder as the command line leaves it; its adapter has the facts given, its checkpoint a run's name."""
    folder.mkdir(parents=True)
    if text is not None:
        (folder / "metrics.csv").write_text(text)
    settings = {
        "seed_everything": 7,
        "trainer": {"strategy": "auto"},
        "model": {"class_path": "a.CausalLMModule", "init_args": {"model": "org/base", "optimizer": {"lr": 0.004}}},
        "data": {"class_path": "b.Chats", "init_args": {"train_file": "chats.jsonl", "val_file": None}},
        "adapter": {"kind": None, "rank": 4},
        "ckpt_path": None,
        **config,
    }
    (folder / "config.yaml").write_text("# lightning.pytorch==2.6.6\n" + yaml.safe_dump(settings))
    if run is not None:
        (folder / "checkpoints").mkdir()
        torch.save({"state_dict": {}, "genlora": {"run": run}}, folder / "checkpoints/last.ckpt")
    if adapter is not None:
        model = tiny_llama()
        inject_adapters(model, small_config(rank=4, exclude_modules=["lm_head"]))
        perturb(model)
        save_adapter(model, place or folder / "adapter", training=adapter)
    return folder


def embedded(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    panels: list[dict[str, Any]] = json.loads(found[1])["panels"]
    return panels


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs/support/logs/version_0", adapter={"run": "abc", "global_step": 6})


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_read_with_all_its_figures(run):
    found = find_run(run).to_dict()
    assert (
        found
        | {
            "state": "finished",
            "model": "org/base",
            "kind": "genlora",
            "rank": 4,
            "learning_rate": 0.004,
            "steps": 6,
            "best_val_loss": 2.5,
            "best_val_step": 5,
            "last_train_loss": 3.0,
            "tokens_per_second": 88.0,
            "seconds": 125.0,
            "adapter": str(run / "adapter"),
            "run": "abc",
            "starts": 1,
        }
        == found
    )
    for place in (run.parents[1], run / "metrics.csv"):
        assert find_run(place).folder == run


def test_states_of_runs(tmp_path):
    unfinished = "step,train_loss\n1,4.0\n"
    make_run(tmp_path / "a/logs/version_0", adapter={"run": "a"})
    make_run(tmp_path / "b/logs/version_0", unfinished)
    stopped = make_run(tmp_path / "c/logs/version_0", unfinished)
    shutil.copytree(tmp_path / "a/logs/version_0/adapter", stopped / "adapter-interrupted")
    make_run(tmp_path / "d/logs/version_0")
    make_run(tmp_path / "e/logs/version_0", "step,test_loss\n0,1.0\n")  # of `genlora test`
    make_run(tmp_path / "f/logs/version_0", None, run="f")  # killed before Lightning wrote any figures
    states = {run.folder.relative_to(tmp_path).parts[0]: run.state for run in find_runs(tmp_path)}
    assert states == {"a": "finished", "b": "interrupted", "c": "interrupted", "d": "no adapter", "f": "interrupted"}
    assert find_run(stopped).adapter == stopped / "adapter-interrupted"


def test_starts_of_one_run_are_joined_and_other_runs_are_not(tmp_path):
    logs = tmp_path / "logs"
    make_run(logs / "version_0", "step,train_loss\n1,9.0\n", run="other")
    make_run(logs / "version_9", "step,train_loss\n1,5.0\n2,4.0\n3,9.0\n", run="same")
    make_run(logs / "version_10", "step,train_loss\n3,3.0\n4,2.0\n", ckpt_path="auto", adapter={"run": "same"})
    runs = {run.run: run for run in find_runs(tmp_path)}
    assert set(runs) == {"other", "same"}
    assert [folder.name for folder in runs["same"].folders] == ["version_9", "version_10"]
    assert runs["same"].curves["train_loss"].values == (5.0, 4.0, 3.0, 2.0)
    assert find_run(logs / "version_9") == find_run(logs / "version_10")


def test_a_run_that_started_anew_opens_no_checkpoints(tmp_path):
    for number in range(2):
        folder = make_run(tmp_path / f"logs/version_{number}")
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints/last.ckpt").write_bytes(b"no checkpoint")
    assert len(find_runs(tmp_path)) == 2


def test_an_adapter_in_a_folder_of_its_own_is_found_unless_it_is_another_runs(tmp_path):
    own = make_run(
        tmp_path / "runs/a/logs/version_0",
        run="a",
        adapter={"run": "a"},
        place=tmp_path / "adapters/x",
        adapter_dir="adapters/x",
        trainer={"default_root_dir": "runs/a"},
    )
    other = make_run(
        tmp_path / "runs/b/logs/version_0",
        run="b",
        adapter_dir="adapters/x",
        trainer={"default_root_dir": "runs/b"},
    )
    assert find_run(own).adapter == tmp_path / "adapters/x"
    assert find_run(other).state == "no adapter"


def test_what_cannot_be_read_is_told_and_the_rest_is_shown(run, capsys):
    (run / "config.yaml").write_text("a: !!python/object:os.system [")
    weights = run / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["show", str(run)]) == 0
    out = capsys.readouterr().out
    assert "Note: The configuration" in out
    assert re.search(r"Note: .*adapter_model.safetensors.*damaged", out)
    assert "train_loss" in out


@pytest.mark.parametrize(("path", "message"), [("nowhere", "There is no"), (".", "holds no run")])
def test_a_place_without_runs_is_named(tmp_path, monkeypatch, capsys, path, message):
    monkeypatch.chdir(tmp_path)
    assert main(["show", path]) == 1
    assert message in capsys.readouterr().err


def test_names_of_figures_are_those_that_are_logged():
    from genlora_lightning.reports import page, runs

    assert {*figures.FIGURES, throughput.RATE} <= set(page._TITLES)
    assert {f"fit_{throughput.RATE}", throughput.FIT_SECONDS} == set(runs._OF_FIT)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_show_prints_a_run_and_writes_its_report(run, capsys):
    assert main(["show", str(run.parents[1])]) == 0
    out = capsys.readouterr().out
    for text in ("finished", "org/base", "chats.jsonl", "genlora, rank 4, lr 0.004", "6 steps in 2 min 05 s", "seed 7"):
        assert text in out
    assert re.search(r"^train_loss +4 +3 +2 at 3 +4 at 1$", out, re.MULTILINE)
    assert str(run / "report.html") in out
    assert len(out.splitlines()) < 40
    assert (run / "report.html").is_file()


def test_run_of_named_adapters_is_shown_with_the_sum_of_their_sizes(run, capsys):
    one = run / "adapter"
    values = describe_adapter(one).parameters
    one.rename(run / "support")
    one.mkdir()
    shutil.copytree(run / "support", one / "legal")
    (run / "support").rename(one / "support")
    found = find_run(run)
    assert found.adapter == one
    assert found.state == "finished"
    assert found.num_bytes == sum(path.stat().st_size for path in one.rglob("*") if path.is_file())
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"{2 * values:,} values" in shown
    page = (run / "report.html").read_text()
    assert "legal.model.layers.0" in page


def test_runs_are_listed_and_drawn_together(tmp_path, capsys):
    for name in ("a/logs/version_0", "b/logs/version_0", "b/logs/version_1"):
        make_run(tmp_path / name)
    assert main(["runs", str(tmp_path), "--html", str(tmp_path / "all.html")]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"logs/version_. .* org/base +genlora +4 +6 +2.5 +3 +- +no adapter", out)) == 3
    panels = embedded((tmp_path / "all.html").read_text())
    assert [panel["title"] for panel in panels] == ["train_loss", "val_loss", "Learning rate"]
    names = ["a", "b/logs/version_0", "b/logs/version_1"]
    assert {series["name"] for series in panels[0]["series"]} == {str(tmp_path / name) for name in names}
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [found["state"] for found in json.loads(capsys.readouterr().out)] == ["no adapter"] * 3


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page_holds_every_point_and_every_effective_rank(run):
    assert main(["show", str(run)]) == 0
    page = (run / "report.html").read_text()
    loss, rate = embedded(page)
    assert {series["name"]: (series["x"], series["y"]) for series in loss["series"]} == {
        "train_loss": ([1, 3, 5], [4.0, 2.0, 3.0]),
        "val_loss": ([5], [2.5]),
    }
    assert rate["series"] == [{"name": "lr", "x": [1, 3, 5], "y": [0.1, 0.2, 0.1]}]
    layers = describe_adapter(run / "adapter").layers
    assert layers
    for layer in layers:
        assert f"title='{layer.module}: {layer.effective_rank:.2f} of {layer.rank}'" in page
    assert f"{describe_adapter(run / 'adapter').parameters:,} values" in page


def test_page_fetches_nothing(run):
    assert main(["show", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href|srcset|action|data)\s*=\s*["']?(?!")\S*//|@import|url\(""", page)
    assert set(re.findall(r"https?://[^\s)]+", page)) == {"https://github.com/leeoniya/uPlot"}  # its licence
    assert "Permission is hereby granted" in page


def test_names_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>'\"&"
    header = f'step,"{evil.replace(chr(34), chr(34) * 2)}"\n'
    config = {"data": {"class_path": "x", "init_args": {"train_file": evil}}}
    folder = make_run(tmp_path / "<script>alert(2)<script>/logs/version_0", header + "1,2.0\n2,nan\n", **config)
    page = run_page(find_run(folder), None)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script") == 3 == page.count("</script>")
    assert embedded(page)[0]["series"][0]["name"] == evil
    assert "NaN or infinite at 1 of the logged steps, first at 2" in page


def long_run(folder: Path, *, steps: int = 100_000, layers: int = 210, rank: int = 16) -> Path:
    """A run of many steps and layers, whose adapter is not there."""
    names = ["train_loss", "lr", "grad_norm", "tokens_per_second", "memory_gib"]
    lines = [
        ",".join(["step", *names]),
        *(",".join([str(i), *[f"{(i * 7919) % 1000 + 0.123456789}"] * 5]) for i in range(steps)),
    ]
    make_run(folder, "\n".join([*lines, ""]))
    places = kept_places(rank)
    with (folder / SPECTRA_FILE).open("w") as file:
        file.write(header_line([f"model.layers.{n // 7}.linear{n % 7}" for n in range(layers)], [rank] * layers))
        for number in range(80):
            row = tuple(math.exp(-place * (1 + number / 40)) for place in places)
            effective = tuple(1 + (number * layer) % (rank - 1) + 0.123 for layer in range(layers))
            step = number * (steps // 80)
            file.write(
                point_line(
                    SpectrumPoint(step=step, effective=effective, largest=(0.123456,) * layers, ratios=(row,) * layers)
                )
            )
    return folder


def test_a_run_of_a_hundred_thousand_steps_makes_a_page_of_a_megabyte(tmp_path):
    page = run_page(find_run(long_run(tmp_path / "logs/version_0")), None)
    assert all(1000 <= len(series["x"]) <= 2000 for panel in embedded(page) for series in panel["series"])
    assert len(page) < 1_200_000


def test_a_curve_for_each_of_hundreds_of_layers_makes_a_page_below_five_megabytes(tmp_path):
    steps, names = range(0, 100_000, 50), [f"norm/{layer}" for layer in range(210)]
    values = {name: curve((step, (step * 7919) % 1000 + 0.1234567) for step in steps) for name in names}
    run = replace(find_run(make_run(tmp_path / "logs/version_0")), curves=values)
    page = run_page(run, None)
    assert all(len(series["x"]) > 900 for panel in embedded(page) for series in panel["series"])
    assert len(page) < 5_000_000


def test_page_shows_what_the_run_has_kept_of_itself(run, capsys):
    start = {"command": "genlora fit", "machine": {"cpu": "A CPU"}, "data": {"train": {"examples": 12345}}}
    (run / "run.json").write_text(json.dumps([{**start, "cost": {"tokens": 777, "memory_gib": 2.5}}]))
    answers = [(0, "not that"), (3, "nearly <that>"), (6, "")]
    samples = [{"step": s, "index": 0, "prompt": "What?", "reference": "that", "answer": a} for s, a in answers]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    assert main(["show", str(run)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^machine +A CPU$", out, re.MULTILINE)
    assert "777 tokens, 88 tokens per second, 2.5 GiB at most" in out
    page = (run / "report.html").read_text()
    assert "<td>12,345</td>" in page
    assert "<dt>before</dt><dd>not that</dd><dt>after 6 steps</dt><dd><i>nothing</i></dd>" in page
    assert "in between (1)</summary><dl><dt>after 3 steps</dt><dd>nearly &lt;that&gt;</dd>" in page
    lora_8 = sum(8 * (layer.out_features + layer.in_features) for layer in describe_adapter(run / "adapter").layers)
    assert re.search(rf"LoRA of rank 8</th>.*<td>{lora_8:,} values", page)


def test_seconds_of_a_start_that_failed_are_those_that_it_noted(tmp_path):
    folder = make_run(tmp_path / "logs/version_0", "step,train_loss\n1,4.0\n")
    (folder / "run.json").write_text('[{"cost": {"seconds": 12.5}}]')
    run = find_run(folder)
    assert (run.state, run.seconds, run.seconds_exact) == ("interrupted", 12.5, True)


# --- in a browser -----------------------------------------------------------------------------------------------------


@needs_browser
def test_a_browser_draws_every_point_without_an_error(run, tmp_path):
    assert main(["show", str(run)]) == 0
    dom = dom_of(run / "report.html", tmp_path)
    assert 'data-points="4,3"' in dom
    assert dom.count("<canvas") == 2


# Fingers 100 pixels apart go to 200 pixels.
GESTURES = """
const area = document.querySelector(".u-over");
const touch = (name, id, x) => area.dispatchEvent(new PointerEvent(name, {pointerId: id, pointerType: "touch",
  clientX: area.getBoundingClientRect().left + x}));
touch("pointerdown", 1, 100); touch("pointerdown", 2, 200);
touch("pointermove", 1, 50); touch("pointermove", 2, 250);
touch("pointerup", 1, 50); touch("pointerup", 2, 250);
setTimeout(() => {
  document.documentElement.dataset.zoomed = [...document.querySelectorAll("[data-reset]")].every((one) => !one.hidden);
  document.querySelectorAll("[data-reset]")[1].click();
  setTimeout(() => {
    document.documentElement.dataset.whole = [...document.querySelectorAll("[data-reset]")].every((one) => one.hidden);
  }, 100);
}, 100);
"""


@needs_browser
def test_two_fingers_zoom_into_all_curves(run, tmp_path):
    assert main(["show", str(run)]) == 0
    dom = dom_of(run / "report.html", tmp_path, GESTURES)
    assert 'data-zoomed="true"' in dom
    assert 'data-whole="true"' in dom


CHOOSE = """
const map = document.querySelectorAll("#rank-maps canvas")[1], box = map.getBoundingClientRect();
const at = {clientX: box.left + box.width - 1, clientY: box.top + box.height / 30 * 4.5, bubbles: true};
map.dispatchEvent(new PointerEvent("pointermove", at));
map.dispatchEvent(new MouseEvent("click", at));
document.documentElement.dataset.ms = Math.round(performance.now());
"""


@needs_browser
def test_ranks_of_a_long_run_are_drawn_and_a_layer_can_be_chosen(tmp_path, record_property):
    folder = long_run(tmp_path / "logs/version_0", steps=8000)
    page = tmp_path / "report.html"
    page.write_text(run_page(find_run(folder), None))
    dom = dom_of(page, tmp_path, CHOOSE)
    assert f'data-cells="{80 * 210}"' in dom
    assert 'data-curves="5"' in dom
    assert dom.count("<canvas") == 5 + 7 + 1
    assert "model.layers.4.linear1, step 7,900: 12.12 of 16</p>" in dom
    record_property("milliseconds", re.search(r'data-ms="(\d+)"', dom)[1])  # told, and no matter of pass or fail
