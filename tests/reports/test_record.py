"""What a run has noted of itself, as it is read."""

from __future__ import annotations

import json

from genlora_lightning.reports.record import (
    RUN_FILE,
    SAMPLES_FILE,
    Sample,
    cost_of,
    data_rows,
    environment_facts,
    read_samples,
    read_starts,
)

START = {
    "command": "genlora fit --config a.yaml",
    "machine": {"cpu": "A CPU", "cores": 8, "memory_gib": 63.7, "gpus": ["H (80 GiB)"] * 2, "processes": 2},
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "data": {"train": {"examples": 1200, "tokens": 5, "cut": 0}, "val": {"examples": 3}},
    "cost": {"steps": 5, "seconds": 2.5, "tokens": 100, "memory_gib": 3.0},
}


def test_starts_are_read_in_order_and_damaged_files_are_left_out(tmp_path):
    folders = [tmp_path / str(number) for number in range(4)]
    for folder, text in zip(
        folders, (json.dumps([{"a": 1}, 3]), "[{", '{"a": 1}', json.dumps([{"a": 2}])), strict=True
    ):
        folder.mkdir()
        (folder / RUN_FILE).write_text(text)
    assert read_starts([tmp_path / "none", *folders]) == [{"a": 1}, {"a": 2}]


def test_words_of_a_start_name_machine_commit_and_command():
    facts = environment_facts([{}, START])
    assert facts["machine"] == "H (80 GiB) + H (80 GiB), A CPU, 8 cores, 64 GiB, 2 processes"
    assert facts["code"] == "git 0123456789ab with changes"
    assert facts["command"] == "genlora fit --config a.yaml"
    assert environment_facts([]) == {}
    assert environment_facts([{"machine": 3, "git": []}])["machine"] == ""


def test_data_are_a_table_without_what_is_zero_everywhere():
    assert data_rows([START]) == (["data", "examples", "tokens"], [["train", "1,200", "5"], ["val", "3", "-"]])
    assert data_rows([])[1] == []


def test_costs_of_starts_are_added_but_for_the_memory():
    later = {"cost": {"steps": 1, "seconds": 1.5, "memory_gib": 2.0, "tokens": "many"}}
    assert cost_of([START, {}, later]) == {"steps": 6, "seconds": 4.0, "tokens": 100, "memory_gib": 3.0}


def test_answers_are_read_by_step_and_a_restart_replaces_them(tmp_path):
    lines = [Sample(9, 0, "p", "r", "late"), Sample(0, 0, "p", "r", "old"), Sample(0, 0, "p", "r", "new")]
    text = "".join(json.dumps(vars(line)) + "\n" for line in lines)
    (tmp_path / SAMPLES_FILE).write_text(text + '{"step": 1}\n{"step": "x", "index": 0, "prompt": 1}\n[1]\n{"st')
    assert [sample.answer for sample in read_samples([tmp_path])] == ["new", "late"]
