"""What a command says: on the terminal, in the run's folder, as text and as JSON lines."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path

import pytest

from genlora_lightning.cli.log import run_logs
from genlora_lightning.cli.train import main
from genlora_lightning.reports.record import read_samples, read_starts
from genlora_lightning.reports.spectra import read_spectra
from tests.cli.test_train import config, models  # noqa: F401 - fixtures

LINE = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 (?P<level>[A-Z]+) +(?P<module>\S+): (?P<text>.*)$")
LOGGERS = ("genlora_lightning", "lightning.pytorch", "lightning.fabric", "transformers", "py.warnings")


def settings_of_logging() -> list[object]:
    found = [logging.getLogger(name) for name in LOGGERS]
    return [(one.handlers[:], one.level, one.propagate) for one in found]


def log_of(folder: Path) -> str:
    return next(folder.glob("out/logs/version_*/run.log")).read_text()


def test_a_run_keeps_messages_environment_answers_and_spectra(config, tmp_path, capsys):  # noqa: F811
    before = settings_of_logging()
    main(["fit", "--config", str(config)])
    assert settings_of_logging() == before
    captured = capsys.readouterr()
    assert re.search(r"^epoch 1/1 \| step 2/2 \(100%\)", captured.out, re.MULTILINE)
    assert captured.err.count("The adapter is saved in ") == 1
    assert "GPU available" in log_of(tmp_path)  # what Lightning says is kept
    assert "💡" not in log_of(tmp_path)  # but for what it advertises
    lines = [found for found in map(LINE.match, log_of(tmp_path).splitlines()) if found]
    modules = [(line["module"], line["level"]) for line in lines]
    for name in ("data._records", "training.callback", "callbacks.progress", "training.outcome", "cli.train"):
        assert (name, "INFO") in modules
    assert captured.out.splitlines() == [line["text"] for line in lines if line["module"] == "callbacks.progress"]
    run = tmp_path / "out/logs/version_0"
    (start,) = read_starts([run])
    assert start["data"]["train"]["examples"] == 3
    assert start["cost"]["tokens"] == 30
    assert {sample.step for sample in read_samples([run])} == {0, 2}
    assert read_spectra([run]).points[-1].step == 2
    assert "Answers before and after" in (run / "report.html").read_text()


def test_json_lines_are_all_there_is_on_the_terminal(config, tmp_path, capsys):  # noqa: F811
    main(["fit", "--config", str(config), "--log-format", "json", "--samples", "0", "--spectra", "false"])
    captured = capsys.readouterr()
    progress = [json.loads(line) for line in captured.out.splitlines()]
    assert progress[-1]["figures"].keys() >= {"val_loss", "step"}
    assert {"time", "level", "logger", "message"} <= progress[0].keys()
    said = [json.loads(line) for line in captured.err.splitlines() if line.startswith("{")]
    assert "Data of this run" in " ".join(line["message"] for line in said)
    kept = [json.loads(line) for line in log_of(tmp_path).splitlines()]
    assert [line for line in kept if line["logger"].endswith("progress")] == progress
    assert {path.name for path in (tmp_path / "out/logs/version_0").glob("*.jsonl")} == set()


def test_a_level_leaves_out_what_is_below_it(config, tmp_path, capsys):  # noqa: F811
    main(["fit", "--config", str(config), "--log_level", "warning", "--report", "false"])
    assert capsys.readouterr().out == ""
    assert "INFO" not in log_of(tmp_path)


@pytest.mark.parametrize(("log_format", "is_line"), [("text", False), ("json", True)])
def test_errors_are_in_the_file_and_once_on_the_terminal(config, tmp_path, capsys, log_format, is_line):  # noqa: F811
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        too_much = ["--model.optimizer.lr", "1e30", "--trainer.max_steps", "50", "--trainer.max_epochs", "50"]
        with pytest.raises(SystemExit, match="1"):
            main(["fit", "--config", str(config), "--log_format", log_format, *too_much])
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1
    assert said[0].startswith("{") == is_line
    if is_line:
        assert json.loads(said[0])["level"] == "error"
    assert log_of(tmp_path).count("error: ") == 1


def test_warnings_reach_the_file_and_stay_warnings(tmp_path):
    with pytest.warns(UserWarning, match="beware"), run_logs() as logs:  # noqa: PT031
        logs.begin()
        warnings.warn("beware\n  of this", stacklevel=1)
        logs.write_to(tmp_path / "run.log")
        warnings.warn("beware again", stacklevel=1)
    lines = [LINE.match(line) for line in (tmp_path / "run.log").read_text().splitlines()]
    texts = [(line["level"], line["text"]) for line in lines]
    assert texts == [("WARNING", "beware of this"), ("WARNING", "beware again")]


def test_a_second_start_in_a_folder_appends(tmp_path):
    for text in ("first", "second"):
        with run_logs() as logs:
            logs.begin("json")
            logging.getLogger("genlora_lightning.x").info("%s", text, extra={"figures": {"loss": float("nan")}})
            logs.write_to(tmp_path / "folder/run.log")
    lines = [json.loads(line) for line in (tmp_path / "folder/run.log").read_text().splitlines()]
    assert [(line["message"], line["figures"]) for line in lines] == [
        ("first", {"loss": "nan"}),
        ("second", {"loss": "nan"}),
    ]
