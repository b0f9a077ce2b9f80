from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from genlora_lightning.cli.completion import SHELLS
from genlora_lightning.cli.main import main

pytest.importorskip("shtab")


@pytest.mark.parametrize("shell", SHELLS)
def test_script_knows_commands_and_their_options(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("export-lora", "find_lr", "print_config", "base-check"):
        assert word in script


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("genlora exp", "export-lora"),
        ("genlora fit --conf", "--config"),
        ("genlora plan --gradient", "--gradient-checkpointing"),
    ],
)
def test_bash_completes(typed, expected, capsys, tmp_path):
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)
    words = typed.split(" ")
    asked = (
        f"source {tmp_path / 'script'}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
        'function="$(complete -p genlora | sed "s/.*-F \\([^ ]*\\).*/\\1/")"; '
        f'"$function" genlora "{words[-1]}" "{words[-2]}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=30)
    assert expected in done.stdout.split(), done.stderr


def test_missing_shtab_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install 'genlora-lightning[completion]'" in capsys.readouterr().err
