"""What is told of where a run runs, and what is not."""

from __future__ import annotations

import json
import subprocess

import pytest

from genlora_lightning.training.environment import describe_environment, git_state, without_secrets


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--model.api_key=abc", "--model.api_key=***"),
        ("--trainer.logger.init_args.token abc --seed 1", "--trainer.logger.init_args.token *** --seed 1"),
        ("--hub-token=abc --password --next", "--hub-token=*** --password --next"),
        ("--model.tokenizer=abc --max_new_tokens 5", "--model.tokenizer=abc --max_new_tokens 5"),
        ("x hf_abcdefghijkl y=sk-abcdefghij", "x *** y=***"),
        ("--url=https://me:pass@host/x", "--url=https://***@host/x"),
        ("fit --config run.yaml", "fit --config run.yaml"),
    ],
)
def test_secrets_on_the_command_line_are_hidden(given, told):
    assert without_secrets(given.split()) == told.split()


def test_environment_is_json_without_variables_that_are_not_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_SECRET", "do-not-tell")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    text = json.dumps(describe_environment(["genlora", "fit", "a b"], processes=2))
    found = json.loads(text)
    assert "do-not-tell" not in text
    assert found["command"] == "genlora fit 'a b'"
    assert found["environment"]["WORLD_SIZE"] == "2"
    assert {"python", "torch", "genlora_lightning"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["processes"] == 2
    assert "git" not in found


def test_commit_and_changes_of_a_repository_are_told(tmp_path, monkeypatch):
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "me")
        monkeypatch.setenv(f"{name}_EMAIL", "me@example.org")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    (tmp_path / "new").write_text("not tracked")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_without_git_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None
