from __future__ import annotations

import linecache
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.cli.errors import find_user_error, leave, one_line


def raised_in(module: str, statement: str, **names: Any) -> Exception:
    """The error that a statement raises when it stands in a module of that name."""
    namespace, file = {"__name__": module, **names}, f"<{module}: {statement}>"
    source = f"def run():\n    {statement}"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), namespace)
    try:
        namespace["run"]()
    except Exception as error:
        return error
    pytest.fail(f"{statement!r} raised nothing")


def test_an_error_raised_by_this_package_is_for_the_user() -> None:
    with pytest.raises(ValueError, match="at least 1") as info:
        GenLoRAConfig(rank=0)
    assert find_user_error(info.value) is info.value


@pytest.mark.parametrize(
    "statement", ["int('x')", "{}['x']", "None.x", "raise AssertionError('x')", "assert 1 == 2, 'x'", "raised = 1 / 0"]
)
def test_an_error_that_nobody_meant_is_a_fault(statement: str) -> None:
    assert find_user_error(raised_in("genlora_lightning.layers.linear", statement)) is None


def test_what_the_operating_system_refuses_is_for_the_user() -> None:
    error = raised_in("genlora_lightning.artifacts.adapter_io", "open('/nowhere/at/all')")
    assert find_user_error(error) is error


def test_an_error_of_several_lines_is_for_the_user() -> None:
    error = raised_in("genlora_lightning.layers.linear", "raise ValueError(\n        'x'\n        'y'\n    )")
    assert find_user_error(error) is error


@pytest.mark.parametrize("module", ["lightning.pytorch.loggers.wandb", "lightning.fabric.strategies.model_parallel"])
def test_what_lightning_raises_where_it_sets_a_run_up_is_for_the_user(module: str) -> None:
    error = raised_in(module, "raise ModuleNotFoundError('x')")
    assert find_user_error(error) is error
    assert find_user_error(raised_in(module, "{}['x']")) is None


@pytest.mark.parametrize("module", ["torch.nn", "genlora_lightning_of_others", "__main__", "jsonargparse._typehints"])
def test_an_error_raised_elsewhere_is_a_fault(module: str) -> None:
    assert find_user_error(raised_in(module, "raise ValueError('x')")) is None


def test_an_error_of_other_code_called_from_this_package_is_a_fault() -> None:
    inner = raised_in("torch.nn", "raise ValueError('x')")

    def call() -> None:
        raise inner

    assert find_user_error(raised_in("genlora_lightning.layers.linear", "call()", call=call)) is None


def test_an_error_packed_by_the_parser_is_unpacked() -> None:
    cause = raised_in("genlora_lightning.adapters.genlora.config", "raise ValueError('x')")
    packed = raised_in("jsonargparse._typehints", "raise ValueError('Does not validate') from cause", cause=cause)
    twice = raised_in("jsonargparse._typehints", "raise ValueError('Does not validate') from cause", cause=packed)
    assert find_user_error(twice) is cause


def test_what_lightning_says_about_its_settings_is_for_the_user() -> None:
    error = raised_in("lightning.pytorch.trainer", "raise error('x')", error=MisconfigurationException)
    assert find_user_error(error) is error


def test_an_error_without_traceback_is_a_fault() -> None:
    assert find_user_error(ValueError("never raised")) is None


def test_nested_message_becomes_one_line() -> None:
    message = (
        'Parser key "model":\n  Does not validate against any of the Union subtypes\n  Subtypes: [A, B]\n  Errors:\n'
        "    - Problem with given class_path 'genlora_lightning.GenLoRAConfig':\n"
        "        Option 'rnak' is not accepted\n    - Expected a <class 'NoneType'>\n"
        "  Given value type: <class 'str'>\n  Given value: x"
    )
    assert one_line(message, [], []) == (
        "Parser key \"model\": Problem with given class_path 'genlora_lightning.GenLoRAConfig': Option 'rnak' is not "
        "accepted; did you mean 'rank'?"
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("unrecognized arguments: --trainer.max_step 3", "; did you mean 'trainer.max_steps'?"),
        ("Subcommand 'fit' does not accept option 'modle'", "; did you mean 'model'?"),
        ("unrecognized arguments: --trainer.zzz 3", "--trainer.zzz 3."),
        ("unrecognized arguments: --max_steps 3", "--max_steps 3."),  # of another section
        ("Expected a dot import path string: Modle", "or one of MyModel."),
        (
            "the following arguments are required: fit.model",
            "--config FILE, which `genlora init` writes for your data.",
        ),
    ],
)
def test_suggestions(message: str, expected: str) -> None:
    assert one_line(message, ["MyModel"], ["model", "trainer.max_steps"]).endswith(expected)


@pytest.mark.parametrize(("rank", "printed"), [(0, "error: x\n"), (1, "[rank 1] error: x\n")])
def test_leaving_names_the_process(
    rank: int, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", rank, raising=False)
    with pytest.raises(SystemExit, match=r"^3$"):
        leave("error: x", 3)
    assert capsys.readouterr().err == printed
