from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from docstring_parser import parse
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

import tests.plain
from genlora_lightning.callbacks.predictions import PredictionWriter
from genlora_lightning.callbacks.progress import LineProgressBar
from genlora_lightning.callbacks.throughput import TokensPerSecond
from genlora_lightning.cli.adapter import AdapterOptions
from genlora_lightning.cli.train import _CALLBACK_DEFAULTS, GenLoRACLI, checkpoint_folders, main
from genlora_lightning.layers.linear import AdaptedLinear
from genlora_lightning.reports.runs import find_runs
from genlora_lightning.training.callback import AdapterFinetuning
from tests.models import tiny_bert, tiny_llama

# Some commands here are given no checkpoint, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:The adapters of this .* are new and untrained")

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = [*sorted((ROOT / "configs" / "strategy").glob("*.yaml")), ROOT / "examples/multi_node/two_nodes.yaml"]
WORDS = ["red", "green", "blue", "sky", "grass", "rose", "what", "colour", "is", "the", "?"]
PAIRS = [("what colour is the sky ?", "blue"), ("what colour is the grass ?", "green"), ("the rose ?", "red")]
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


class MLPData(LightningDataModule):
    """A data module that knows neither tokenizer nor labels."""

    def train_dataloader(self) -> Any:
        return tests.plain.mlp_loader()

    val_dataloader = train_dataloader


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `llama` and `bert`, each a tiny model and its tokenizer."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    root = tmp_path_factory.mktemp("models")
    for name, model in (("llama", tiny_llama()), ("bert", tiny_bert(num_labels=2))):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def config(models: Path, tmp_path: Path) -> Path:
    """A configuration of a short fit, and its data."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "data.jsonl")
    return write_config(
        tmp_path / "run.yaml",
        adapter={"rank": 4, "num_groups_a": 2, "num_groups_b": 2},
        model={
            "class_path": "CausalLMModule",
            "init_args": {
                "model": str(models / "llama"),
                "optimizer": {"lr": 0.01},
                "generation": {"max_new_tokens": 3},
            },
        },
        data={
            "class_path": "InstructionDataModule",
            "init_args": {"train_file": data, "val_file": data, "test_file": data, "batch_size": 2},
        },
        trainer={
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "max_epochs": 1,
            "default_root_dir": str(tmp_path / "out"),
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
        },
    )


def write_config(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoint_of(cli: GenLoRACLI) -> str:
    return next(c.best_model_path for c in cli.trainer.callbacks if isinstance(c, ModelCheckpoint))  # type: ignore[attr-defined]


def callbacks_of(cli: GenLoRACLI, kind: type) -> list[Any]:
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def run_fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, list[str]]:
    """The exit code, and the lines on standard error that the command line wrote for the user."""
    with pytest.raises(SystemExit) as info:
        main(args)
    return info.value.code, [line for line in capsys.readouterr().err.splitlines() if "error" in line]


# --- the shipped configurations ---------------------------------------------------------------------------------------


def test_there_are_configs_for_the_quickstart_for_gpus_and_for_classification() -> None:
    names = {path.stem for path in CONFIGS}
    assert {"quickstart", "llama-8b", "llama-1b", "classification"} <= names


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_shipped_config_is_valid_for_each_subcommand(
    path: Path, subcommand: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([subcommand, "--config", str(path), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text())
    assert printed["adapter_dir"] is None  # all that a run writes is below its `default_root_dir`
    assert printed["trainer"]["logger"] is None
    assert printed["adapter"].items() >= given["adapter"].items()
    assert printed["model"]["init_args"]["model"] == given["model"]["init_args"]["model"]
    assert printed["data"]["init_args"].items() >= given["data"]["init_args"].items()
    assert printed["trainer"]["max_epochs"] == given["trainer"]["max_epochs"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_strategy_can_be_laid_over_each_shipped_config(
    path: Path, overlay: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", str(path), "--config", str(overlay), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    base, laid = yaml.safe_load(path.read_text()), yaml.safe_load(overlay.read_text())
    trainer = printed["trainer"]
    assert (trainer["devices"], trainer["num_nodes"]) == (laid["trainer"]["devices"], laid["trainer"]["num_nodes"])
    assert printed["model"]["init_args"]["model"] == base["model"]["init_args"]["model"]
    strategy = laid["trainer"]["strategy"]
    if isinstance(strategy, str):
        assert trainer["strategy"] == strategy
    else:
        sizes = strategy["init_args"]
        assert trainer["strategy"]["init_args"].items() >= sizes.items()
        assert sizes["data_parallel_size"] == trainer["devices"] * trainer["num_nodes"]
        assert sizes["tensor_parallel_size"] == 1
    low_memory = {**base["model"]["init_args"], **laid.get("model", {}).get("init_args", {})}.get("low_memory", False)
    assert printed["model"]["init_args"]["low_memory"] is low_memory


def test_a_printed_config_can_be_run_from(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", str(config), "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    cli = main(["fit", "--config", str(tmp_path / "printed.yaml"), "--trainer.fast_dev_run", "true"])
    assert cli.trainer.state.finished


# --- fit, validate, test, predict -------------------------------------------------------------------------------------


def test_fit_runs_twice_and_keeps_both_runs(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in range(2):
        cli = main(["fit", "--config", str(config)])
        folder = tmp_path / "out" / "logs" / f"version_{run}"
        assert cli.trainer.global_step == 2
        assert Path(checkpoint_of(cli)).is_file()
        assert (folder / "adapter").is_dir()
        assert yaml.safe_load((folder / "config.yaml").read_text())["adapter"]["rank"] == 4
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {"train_loss", "val_loss", "tokens_per_second"} <= set(rows[0])
        assert [len(callbacks_of(cli, kind)) for kind in (AdapterFinetuning, TokensPerSecond, LineProgressBar)] == [
            1
        ] * 3
        assert callbacks_of(cli, TokensPerSecond)[0].tokens > 0
        out = capsys.readouterr().out
        assert "step 2/2 (100%) | train_loss" in out
        assert "validation after step 2 | val_loss" in out


def test_fit_ends_with_a_report_of_all_its_starts_unless_it_is_told_not_to(config: Path, tmp_path: Path) -> None:
    main(["fit", "--config", str(config), "--trainer.max_steps", "1", "--report", "false"])
    main(["fit", "--config", str(config), "--ckpt_path", "auto"])
    assert [path.parent.name for path in tmp_path.glob("out/logs/*/report.html")] == ["version_1"]
    (run,) = find_runs(tmp_path / "out")
    assert [folder.name for folder in run.folders] == ["version_0", "version_1"]
    assert run.curves["train_loss"].steps == (0, 1)
    assert (run.steps, run.state, run.seconds_exact) == (2, "finished", True)
    page = (run.folder / "report.html").read_text()
    assert all(text in page for text in ("train_loss", "val_loss", "Effective rank", "<dd>finished", "2 starts"))


def test_a_report_that_cannot_be_written_is_one_warning(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: str) -> Path:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("genlora_lightning.cli.train.write_report", fail)
    with pytest.warns(UserWarning, match="^No report of the run was written: two lines$"):
        cli = main(["fit", "--config", str(config)])
    assert cli.trainer.global_step == 2


def test_the_saved_config_of_a_run_repeats_it(config: Path, tmp_path: Path) -> None:
    first = main(["fit", "--config", str(config)])
    saved = tmp_path / "out" / "logs" / "version_0" / "config.yaml"
    assert yaml.safe_load(saved.read_text())["data"]["init_args"]["tokenizer"] == first.model.source
    again = main(["fit", "--config", str(saved)])
    assert again.trainer.callback_metrics["val_loss"] == first.trainer.callback_metrics["val_loss"]


def test_validate_and_test_measure_the_checkpoint_that_fit_wrote(config: Path) -> None:
    fitted = main(["fit", "--config", str(config)])
    after = fitted.trainer.callback_metrics["val_loss"]
    checkpoint = checkpoint_of(fitted)
    assert main(["validate", "--config", str(config), "--ckpt_path", checkpoint]).trainer.callback_metrics[
        "val_loss"
    ] == pytest.approx(after)
    assert main(["test", "--config", str(config), "--ckpt_path", checkpoint]).trainer.callback_metrics[
        "test_loss"
    ] == pytest.approx(after)
    assert main(["validate", "--config", str(config)]).trainer.callback_metrics["val_loss"] != after


def test_a_checkpoint_does_not_replace_settings_of_the_user(config: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(main(["fit", "--config", str(config)]))
    options = ["--ckpt_path", checkpoint, "--trainer.max_steps", "3", "--trainer.max_epochs", "5"]
    resumed = main(["fit", "--config", str(config), *options, "--model.optimizer.lr", "0.005"])
    assert resumed.trainer.global_step == 3
    assert resumed.model.optimizer_config.lr == 0.005


def test_predict_writes_json_lines(config: Path, tmp_path: Path) -> None:
    cli = main(["predict", "--config", str(config)])
    rows = read_lines(Path(cli.trainer.log_dir or "", "predictions.jsonl"))
    assert [(row["index"], row["prompt"], row["completion"]) for row in rows] == [
        (index, prompt, completion) for index, (prompt, completion) in enumerate(PAIRS)
    ]
    assert all(isinstance(row["generated"], str) for row in rows)
    target = tmp_path / "own" / "answers.jsonl"
    main(["predict", "--config", str(config), "--predictions_path", str(target)])
    assert read_lines(target) == rows


def test_own_prediction_writer_is_not_doubled(config: Path, tmp_path: Path) -> None:
    writer = {"class_path": "PredictionWriter", "init_args": {"path": str(tmp_path / "mine.jsonl")}}
    overlay = write_config(tmp_path / "overlay.yaml", trainer={"callbacks": [writer]})
    cli = main(["predict", "--config", str(config), "--config", str(overlay)])
    assert len(callbacks_of(cli, PredictionWriter)) == 1
    assert (tmp_path / "mine.jsonl").is_file()


def test_classification_takes_tokenizer_and_label_names_of_the_model(models: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text(
        "text,label\n" + "".join(f"{WORDS[i]} {WORDS[i + 1]},{'no' if i % 2 else 'yes'}\n" for i in range(6))
    )
    config = write_config(
        tmp_path / "classes.yaml",
        model={
            "class_path": "SequenceClassificationModule",
            "init_args": {"model": str(models / "bert"), "label_names": ["no", "yes"], "adapter": {"rank": 4}},
        },
        data={
            "class_path": "TextClassificationDataModule",
            "init_args": {"train_file": str(data), "val_file": str(data)},
        },
        trainer={"accelerator": "cpu", "max_steps": 1, "max_epochs": 1, "default_root_dir": str(tmp_path)},
    )
    cli = main(["fit", "--config", str(config)])
    assert "val_accuracy" in cli.trainer.callback_metrics
    assert len(callbacks_of(cli, AdapterFinetuning)) == 1
    predicted = main(["predict", "--config", str(config), "--data.predict_file", str(data)])
    rows = read_lines(Path(predicted.trainer.log_dir or "", "predictions.jsonl"))
    assert [row["index"] for row in rows] == list(range(6))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_later_configs_and_flags_win(config: Path, tmp_path: Path) -> None:
    overlay = write_config(tmp_path / "overlay.yaml", adapter={"rank": 6}, trainer={"max_steps": 1})
    adapter_dir = tmp_path / "my adapter"
    flags = ["--adapter.num_groups_a", "3", "--model.optimizer.lr", "0.02", "--seed_everything", "7"]
    files = ["--config", str(config), "--config", str(overlay)]
    cli = main(["fit", *files, *flags, "--adapter_dir", str(adapter_dir)])
    adapter = next(m for m in cli.model.modules() if isinstance(m, AdaptedLinear))
    assert adapter.update.A.weight.shape[:2] == (3, 6)
    assert cli.trainer.global_step == 1
    assert cli.model.optimizer_config.lr == 0.02
    assert adapter_dir.is_dir()
    assert cli.config["fit"]["seed_everything"] == 7


def test_kind_of_a_file_stays_when_a_flag_gives_a_size(config: Path, tmp_path: Path) -> None:
    lora = write_config(tmp_path / "lora.yaml", adapter={"kind": "lora", "rank": 2, "num_groups_a": None})
    no_groups = ["--adapter.num_groups_b", "null"]
    cli = main(["fit", "--config", str(config), "--config", str(lora), "--adapter.rank", "5", *no_groups])
    adapter = next(m for m in cli.model.modules() if isinstance(m, AdaptedLinear))
    assert (adapter.config.kind, adapter.config.rank, adapter.config.scaling) == ("lora", 5, "rank")
    flags = ["--adapter.kind", "lora", "--adapter.rank", "3", "--adapter.num_groups_a", "null", *no_groups]
    cli = main(["fit", "--config", str(config), *flags])
    adapter = next(m for m in cli.model.modules() if isinstance(m, AdaptedLinear))
    assert (adapter.config.kind, adapter.config.rank) == ("lora", 3)


def test_field_of_another_kind_is_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["fit", "--config", str(config), "--adapter.kind", "lora"])
    message = capsys.readouterr().err
    assert "Unknown LoRAConfig fields ['num_groups_a', 'num_groups_b']" in message
    assert message.count("\n") == 1


def test_own_tokenizer_wins_and_is_saved(config: Path, models: Path, tmp_path: Path) -> None:
    other = str(models / "bert")
    cli = main(["fit", "--config", str(config), "--data.tokenizer", other])
    assert cli.config["fit"]["data"]["init_args"]["tokenizer"] == other
    saved = yaml.safe_load((tmp_path / "out" / "logs" / "version_0" / "config.yaml").read_text())
    assert saved["data"]["init_args"]["tokenizer"] == other


def test_adapter_section_adapts_a_module_that_knows_nothing_of_adapters(tmp_path: Path) -> None:
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path)]
    plain = ["fit", "--model", "tests.plain.PlainMLP", "--data", f"{__name__}.MLPData", *trainer]
    cli = main([*plain, "--adapter.rank", "2", "--adapter.num_groups_b", "2"])
    assert sum(isinstance(m, AdaptedLinear) for m in cli.model.modules()) == 3
    unadapted = main(plain)
    assert not any(isinstance(m, AdaptedLinear) for m in unadapted.model.modules())


def test_finished_adapter_is_replaced_only_if_it_is_said(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "--config", str(config), "--adapter_dir", str(tmp_path / "adapter"), "--trainer.max_steps", "1"]
    main(command)
    finished = (tmp_path / "adapter" / "manifest.json").read_bytes()
    code, errors = run_fails(command, capsys)
    assert code == 1
    assert len(errors) == 1
    assert f"error: {tmp_path / 'adapter'} holds the adapter of another run (1 steps, written" in errors[0]
    assert (tmp_path / "adapter" / "manifest.json").read_bytes() == finished
    main([*command, "--overwrite"])
    assert (tmp_path / "adapter" / "manifest.json").read_bytes() != finished


def test_run_in_the_place_of_another_leaves_its_metrics_and_settings_too(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "runs", "version": "mine"}}
    named = write_config(tmp_path / "named.yaml", trainer={"logger": logger, "max_steps": 1})
    command = ["fit", "--config", str(config), "--config", str(named)]
    main(command)
    before = {path: path.read_bytes() for path in (tmp_path / "runs" / "mine").rglob("*") if path.is_file()}
    assert {"metrics.csv", "config.yaml", "adapter_config.json"} <= {path.name for path in before}
    code, errors = run_fails([*command, "--model.optimizer.lr", "0.02"], capsys)
    assert code == 1
    assert f"{tmp_path / 'runs' / 'mine' / 'adapter'} holds the adapter of another run" in errors[0]
    assert {path: path.read_bytes() for path in (tmp_path / "runs" / "mine").rglob("*") if path.is_file()} == before


def test_overwrite_alone_adds_no_adapters_and_reaches_a_callback_of_the_trainer(tmp_path: Path) -> None:
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path)]
    command = ["fit", "--model", "tests.plain.PlainMLP", "--data", f"{__name__}.MLPData", *trainer, "--overwrite"]
    assert not any(isinstance(m, AdaptedLinear) for m in main(command).model.modules())
    own = {"class_path": "genlora_lightning.GenLoRAFinetuning", "init_args": {"config": {"num_groups_b": 2}}}
    overlay = write_config(tmp_path / "overlay.yaml", trainer={"callbacks": [own]})
    (callback,) = callbacks_of(main([*command, "--config", str(overlay)]), AdapterFinetuning)
    assert callback.overwrite


def overlay_in_the_comment(path: Path) -> str:
    """What a configuration's comment says to lay over it."""
    return "".join(
        line[1:] + "\n" for line in path.read_text().splitlines() if line.startswith("#     ") and "{" in line
    )


def test_quickstart_s_comment_changes_all_that_is_the_quickstart_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart = ROOT / "configs" / "quickstart.yaml"
    (tmp_path / "my_task.yaml").write_text(textwrap.dedent(overlay_in_the_comment(quickstart)))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", str(quickstart), "--config", str(tmp_path / "my_task.yaml"), "--print_config"])
    printed = capsys.readouterr().out
    assert "train_file: my/train.jsonl" in printed
    assert "default_root_dir: runs/my_task" in printed
    assert "quickstart" not in printed


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_options_of_the_model_reach_the_data_s_tokenizer_unless_it_is_another_one(
    config: Path, models: Path, monkeypatch: pytest.MonkeyPatch, own_tokenizer: bool
) -> None:
    for step in ("instantiate_classes", "_run_subcommand"):  # the arguments alone are of interest
        monkeypatch.setattr(GenLoRACLI, step, lambda *_: None)
    args = ["--model.trust_remote_code", "true", "--model.revision", "v2"]
    args += ["--data.tokenizer", str(models / "bert")] if own_tokenizer else []
    data = main(["fit", "--config", str(config), *args]).config["fit"]["data"]["init_args"]
    assert (data["trust_remote_code"], data["revision"]) == ((None, None) if own_tokenizer else (True, "v2"))
    data = main(["fit", "--config", str(config), *args, "--data.revision", "v3"]).config["fit"]["data"]["init_args"]
    assert data["revision"] == "v3"


def test_adapter_dir_alone_keeps_the_adapter_of_the_module(config: Path, tmp_path: Path) -> None:
    sections = yaml.safe_load(config.read_text())
    sections["model"]["init_args"]["adapter"] = sections.pop("adapter")
    moved = write_config(tmp_path / "moved.yaml", **sections)
    cli = main(["fit", "--config", str(moved), "--adapter_dir", str(tmp_path / "adapter")])
    assert callbacks_of(cli, AdapterFinetuning)[0].config.rank == 4
    assert (tmp_path / "adapter").is_dir()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")  # as `train_mode` says
def test_settings_of_the_callback_reach_it(config: Path) -> None:
    flags = ["--adapter_sharding", "shard", "--check_ranks_every_n_steps", "3", "--generate", "step"]
    flags += ["--save_adapter", "false", "--train_mode", "false", "--check_finite_every_n_steps", "2"]
    (callback,) = callbacks_of(main(["fit", "--config", str(config), *flags]), AdapterFinetuning)
    assert (callback.save_adapter, callback.train_mode, callback.check_finite_every_n_steps) == (False, False, 2)
    assert (callback.adapter_sharding, callback.check_ranks_every_n_steps, callback.generate) == ("shard", 3, "step")


def test_named_adapters_are_a_list_or_have_settings_each(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenLoRACLI, "_run_subcommand", lambda *_: None)

    def kinds(path: Path, *flags: str) -> dict[str, tuple[str, Any]]:
        (callback,) = callbacks_of(main(["fit", "--config", str(path), *flags]), AdapterFinetuning)
        return {name: (one.kind, one.to_dict()["rank"]) for name, one in callback.adapters.items()}

    assert kinds(config, "--adapters", "[a, b]") == {"a": ("genlora", 4), "b": ("genlora", 4)}
    sections = {**yaml.safe_load(config.read_text()), "adapters": {"a": None, "b": {"kind": "lora", "rank": 2}}}
    named = write_config(config.with_name("named.yaml"), **sections)
    assert kinds(named) == {"a": ("genlora", 4), "b": ("lora", 2)}


def test_a_configuration_of_all_commands_may_stand_before_the_command(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_config(config.with_name("whole.yaml"), fit=yaml.safe_load(config.read_text()))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--config", str(whole), "fit", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["adapter"]["rank"] == 4


def test_every_argument_of_the_callback_is_a_setting() -> None:
    arguments = set(inspect.signature(AdapterFinetuning.__init__).parameters) - {"self", "config"}
    assert set(_CALLBACK_DEFAULTS) == arguments


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_barebones_trainer_gets_adapters_and_no_bar(config: Path) -> None:
    sections = yaml.safe_load(config.read_text())
    kept = ("accelerator", "devices", "max_steps", "max_epochs", "default_root_dir")
    limits = {key: sections["trainer"][key] for key in kept}
    bare = write_config(config.with_name("bare.yaml"), **{**sections, "trainer": {**limits, "barebones": True}})
    cli = main(["fit", "--config", str(bare)])
    kinds = {type(callback) for callback in cli.trainer.callbacks}  # type: ignore[attr-defined]
    assert kinds == {AdapterFinetuning, SaveConfigCallback}


def test_help_loads_no_model_and_no_model_library() -> None:
    code = (
        "import sys\nfrom genlora_lightning.cli.train import main\n"
        "try:\n    main(['fit', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted(name for name in sys.modules if name in ('transformers.modeling_utils', 'datasets', 'peft')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "--adapter_dir" in done.stdout
    shown = " ".join(done.stdout.split())
    assert "`--adapter.help` lists the adapter's settings" in shown
    assert "Train an adapter, from a configuration and flags. " in shown
    assert "Example: `genlora fit --config support.yaml --adapter.rank 32`" in shown
    assert "functools" not in shown
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_of_the_adapter_is_not_that_of_one_kind():
    texts = {item.arg_name: item.description for item in parse(AdapterOptions.__doc__).params}
    assert set(texts) == {field.name for field in dataclasses.fields(AdapterOptions)}
    assert texts["rank"] == "The highest rank ΔW can have. The kind's default if not given."
    assert texts["alpha"].endswith("The kind's default if not given.")
    assert texts["elastic"].startswith("(GenLoRA, LoRA) Ranks to train for")
    assert texts["target_parameters"].startswith("Parameters to adapt that hold a stack")
    assert texts["num_products"].startswith("(Compacter) ")
    assert not any(":func:" in text for text in texts.values())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ["--trainer.max_stepz", "1"],
            "unrecognized arguments: --trainer.max_stepz 1; did you mean 'trainer.max_steps'?",
        ),
        (
            ["--trainer.max_steps", "many"],
            "Parser key \"trainer.max_steps\": Expected a <class 'int'>. Got value: many.",
        ),
        (["--adapter.scaling", "cubic"], "'sqrt_rank', 'rank'"),
        (["--config", "nowhere.yaml"], "File does not exist"),
        (["--data.train_fil", "x"], "Option 'train_fil' is not accepted; did you mean 'train_file'?"),
    ],
)
def test_arguments_that_do_not_parse_are_told_in_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], args: list[str], text: str
) -> None:
    code, errors = run_fails(["fit", "--config", str(config), *args], capsys)
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert text in errors[0]
    assert "fit --help`" in errors[0]


def test_find_lr_draws_a_curve_for_a_module_with_a_schedule_and_writes_no_adapter(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["find_lr", "--config", str(config), "--steps", "12", "--trainer.enable_progress_bar", "false"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["rate", "loss"] for line in lines)
    assert lines[-1].startswith("Suggested: lr ")
    assert not [*tmp_path.rglob("adapter_model.safetensors")]


def test_unknown_class_is_told_with_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    code, errors = run_fails(["fit", "--model", "CausalLM"], capsys)
    assert code == 2
    assert len(errors) == 1
    assert "no class is known as 'CausalLM'" in errors[0]
    assert "CausalLMModule, SequenceClassificationModule" in errors[0]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--adapter.rank", "0"], "`rank` must be at least 1, got 0"),
        (["--data.train_file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data.batch_size", "0"], "batch_size must be an integer of at least 1, got 0"),
        (["--ckpt_path", "nowhere.ckpt"], "There is no checkpoint 'nowhere.ckpt'"),
        (["--adapter.target_modules", "nowhere"], "nowhere"),
        (["--trainer.accelerator", "gpu"], "gpu"),
        (["--ckpt_path", "best"], "`--ckpt_path best` means the best checkpoint of a run in this process"),
        (["--adapter_dir", "s3://bucket/adapter"], "The `adapter_dir` 's3://bucket/adapter' is a URL"),
    ],
)
def test_errors_for_users_are_told_without_traceback(
    config: Path, capsys: pytest.CaptureFixture[str], args: list[str], text: str
) -> None:
    code, errors = run_fails(["fit", "--config", str(config), *args], capsys)
    assert code == 1
    (line,) = (line for line in errors if line.startswith("error: "))
    assert line == errors[-1]
    assert text in line


def test_traceback_is_to_be_had(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENLORA_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint 'nowhere\.ckpt'"):
        main(["fit", "--config", str(config), "--ckpt_path", "nowhere.ckpt"])


def test_faults_of_the_program_keep_their_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genlora_lightning.cli.train.default_progress_bar", lambda **_: {}["a fault"])  # type: ignore[index]
    with pytest.raises(KeyError, match="a fault"):
        main(["fit", "--config", str(config)])


def test_interrupt_before_training_has_its_exit_code(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: GenLoRACLI) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GenLoRACLI, "instantiate_classes", interrupted)
    with pytest.raises(SystemExit, match=r"^130$"):
        main(["fit", "--config", str(config)])
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_ctrl_c_while_training_saves_the_adapter_and_says_where(config: Path, tmp_path: Path) -> None:
    options = ["--trainer.max_steps", "1000000", "--trainer.max_epochs", "1000000", "--trainer.limit_val_batches", "0"]
    # An epoch is a few milliseconds here: with checkpoints the signal would nearly always come while one is written.
    options += ["--trainer.enable_checkpointing", "false", "--trainer.callbacks", "null"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(config), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell's background job ignores Ctrl-C, and what it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step " in line:
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    saved = tmp_path / "out" / "logs" / "version_0" / "adapter-interrupted"
    assert saved.is_dir()
    assert str(saved) in err
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--data.train_file", "nowhere.jsonl"], 1)])
def test_exit_code_of_two_processes(config: Path, tmp_path: Path, flags: list[str], code: int) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(config), *flags]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == code, done.stderr
    assert ("error: train_file: there is no file 'nowhere.jsonl'" in done.stderr) == (code == 1)
    assert (tmp_path / "out" / "logs" / "version_0" / "adapter").is_dir() == (code == 0)


def test_auto_starts_a_new_run_and_then_goes_on_from_the_last_good_checkpoint(config, capsys, caplog):
    options = ["--ckpt_path", "auto", "--trainer.max_epochs", "3"]
    first = main(["fit", "--config", str(config), *options, "--trainer.max_steps", "1"])
    assert first.trainer.global_step == 1
    good = Path(checkpoint_of(first))
    damaged = good.with_name("newer.ckpt")
    damaged.write_bytes(good.read_bytes()[:-300])
    with pytest.warns(UserWarning, match=r"Skipped the checkpoint .*newer\.ckpt: .*truncated"):
        second = main(["fit", "--config", str(config), *options, "--trainer.max_steps", "3"])
    assert second.trainer.global_step == 3
    assert second.trainer.ckpt_path == good.resolve()
    saved = Path(second.trainer.log_dir) / "config.yaml"
    assert yaml.safe_load(saved.read_text())["ckpt_path"] == "auto"  # so that a run from it goes on, too


def test_auto_finds_checkpoints_where_the_callback_puts_them(config, tmp_path):
    saver = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept"), "save_last": True}}
    content = yaml.safe_load(config.read_text())
    content["trainer"] |= {"callbacks": [saver], "logger": False}
    config.write_text(yaml.safe_dump(content))
    for steps in (1, 2):
        run = main(["fit", "--config", str(config), "--ckpt_path", "auto", "--trainer.max_steps", str(steps)])
    assert Path(run.trainer.ckpt_path).parent == tmp_path / "kept"
    assert run.trainer.global_step == 2


@pytest.mark.parametrize("place", ["logger", "dirpath"])
def test_auto_does_not_start_anew_where_it_cannot_look(place: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath="memory://bucket/kept" if place == "dirpath" else None)
    logger = CSVLogger("memory://bucket/run" if place == "logger" else tmp_path)
    with pytest.raises(ValueError, match=r"`ckpt_path: auto` looks .* local folders only.*'memory://bucket/"):
        checkpoint_folders(tests.plain.trainer(tmp_path, saver, logger=logger, enable_checkpointing=True))


def test_auto_looks_where_checkpoints_are_kept_though_logs_go_elsewhere(tmp_path: Path) -> None:
    saver, logger = ModelCheckpoint(dirpath=tmp_path / "kept"), CSVLogger("memory://bucket/run")
    made = tests.plain.trainer(tmp_path, saver, logger=logger, enable_checkpointing=True)
    assert checkpoint_folders(made) == [tmp_path / "kept"]


def test_auto_is_for_fit_only(config, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["test", "--config", str(config), "--ckpt_path", "auto"])
    assert "`--ckpt_path auto` is for `fit`; for `test` give a checkpoint" in capsys.readouterr().err
