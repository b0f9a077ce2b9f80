"""The configurations of the package are found by name."""

from __future__ import annotations

import pytest
import yaml

from genlora_lightning.cli.configs import config_names, config_path, with_paths
from genlora_lightning.cli.main import main


def test_every_name_is_a_configuration():
    assert {"quickstart", "classification", "llama-1b", "llama-8b", "llama-70b", "strategy/fsdp2"} <= {*config_names()}
    for name in config_names():
        assert yaml.safe_load(config_path(f"genlora:{name}").read_text())


def test_names_become_paths_and_all_else_stays():
    path = str(config_path("llama-8b"))
    assert with_paths(["fit", "--config", "genlora:llama-8b", "--config=genlora:llama-8b.yaml", "--x", "a=b"]) == [
        *("fit", "--config", path, f"--config={path}", "--x", "a=b")
    ]


@pytest.mark.parametrize("name", ["genlora:none", "genlora:../cli/main", "genlora:"])
def test_unknown_name_is_an_error_that_lists_the_known(name):
    with pytest.raises(ValueError, match=r"There is no configuration .* It has genlora:classification, .*strategy/ddp"):
        with_paths(["--config", name])


def test_the_tool_trains_by_name(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", "genlora:llama-8b", "--config", "genlora:strategy/fsdp2", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["model"].startswith("meta-llama/")
    assert printed["trainer"]["strategy"]["class_path"].endswith("ModelParallelStrategy")


def test_help_lists_training_and_the_rest(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--help"])
    shown = capsys.readouterr().out
    for command in ("init", "fit", "validate", "test", "predict", "find_lr", "plan", "merge"):
        assert f"\n    {command} " in shown
