"""Each run writes into a folder of its own, and none replaces what another has trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import SingleDeviceStrategy

from genlora_lightning import GenLoRAFinetuning, load_adapter, load_module, save_adapter
from genlora_lightning.artifacts.adapter_folder import stored_facts
from genlora_lightning.errors import WrongBaseError
from genlora_lightning.injection.inject import inject_adapters
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer

CONFIG = small_config(exclude_modules=["4"])


def fit(folder: Path, *callbacks: Any, ckpt_path: Any = None, adapter_dir: str | None = None, **settings: Any) -> Any:
    """A run in a process of its own, as far as it can know; its trainer and module."""
    adapter = GenLoRAFinetuning(CONFIG, adapter_dir=adapter_dir, overwrite=settings.pop("replace", False))
    made, module = trainer(folder, adapter, *callbacks, overwrite=False, **settings), PlainMLP()
    made.fit(module, mlp_loader(), ckpt_path=ckpt_path)
    return made, module


def content(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# -- where -------------------------------------------------------------------------------------------------------------


class Tracker(Logger):
    """Like those of experiment trackers: one directory for all runs, told apart by an id."""

    def __init__(self, folder: Path, run: str) -> None:
        super().__init__()
        self._folder, self._run = str(folder), run

    name = property(lambda self: "project")
    version = property(lambda self: self._run)
    save_dir = property(lambda self: self._folder)

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


def test_runs_of_one_tracker_have_an_adapter_each_beside_their_checkpoints(tmp_path):
    for run in ("r1", "r2"):
        fit(tmp_path, ModelCheckpoint(save_last=True), logger=Tracker(tmp_path, run), enable_checkpointing=True)
    for run in ("r1", "r2"):
        assert (tmp_path / "project" / run / "checkpoints" / "last.ckpt").is_file()
        assert stored_facts(tmp_path / "project" / run / "adapter")["global_step"] == 4


def test_runs_of_a_csv_logger_have_a_version_each(tmp_path):
    for run in range(2):
        fit(tmp_path, logger=CSVLogger(tmp_path, name="logs"))
        assert (tmp_path / "logs" / f"version_{run}" / "adapter" / "manifest.json").is_file()


# -- what lies there already -------------------------------------------------------------------------------------------


def test_finished_adapter_is_not_replaced_by_another_run_unless_it_is_said(tmp_path):
    fit(tmp_path, max_epochs=2)
    finished = content(tmp_path / "adapter")
    created = json.loads((tmp_path / "adapter" / "manifest.json").read_text())["created"]
    adapter, module = GenLoRAFinetuning(CONFIG), PlainMLP()
    message = (
        rf"{re.escape(str(tmp_path / 'adapter'))} holds the adapter of another run \(8 steps, "
        rf"written {re.escape(created)}.*`adapter_dir`.*`ckpt_path`.*`overwrite=True`, `--overwrite`"
    )
    with pytest.raises(FileExistsError, match=message):
        trainer(tmp_path, adapter, overwrite=False, max_steps=1).fit(module, mlp_loader())
    assert module.losses == []
    assert content(tmp_path / "adapter") == finished
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    fit(tmp_path, max_steps=1, adapter_dir=str(tmp_path / "smoke"))
    assert content(tmp_path / "adapter") == finished
    fit(tmp_path, max_steps=1, replace=True)
    assert content(tmp_path / "adapter") != finished


def test_run_goes_on_in_its_own_folder_and_not_in_that_of_another(tmp_path):
    made, _ = fit(tmp_path / "a")
    made.save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path / "b")
    before = content(tmp_path / "a" / "adapter")
    fit(tmp_path / "a", max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert stored_facts(tmp_path / "a" / "adapter")["global_step"] == 8
    assert content(tmp_path / "a" / "adapter") != before
    with pytest.raises(FileExistsError, match="holds the adapter of another run"):
        fit(tmp_path / "b", max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert stored_facts(tmp_path / "b" / "adapter")["global_step"] == 4


def test_checkpoint_and_folder_of_a_release_that_named_no_runs_belong_together(tmp_path):
    made, module = fit(tmp_path)
    made.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    del stored["genlora"]["run"], stored["genlora"]["base"]
    torch.save(stored, tmp_path / "old.ckpt")
    save_adapter(module, tmp_path / "adapter")
    fit(tmp_path, max_epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert stored_facts(tmp_path / "adapter")["global_step"] == 8


def test_trainer_that_fits_again_goes_on_with_its_run(tmp_path):
    made, module = fit(tmp_path)
    made.fit_loop.max_epochs = 2
    made.fit(module, mlp_loader())
    assert stored_facts(tmp_path / "adapter")["global_step"] == 8


def test_folder_is_judged_before_the_first_batch_also_where_checkpoints_are_read_late(tmp_path, monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "restore_checkpoint_after_setup", True)
    made, _ = fit(tmp_path)
    made.save_checkpoint(tmp_path / "x.ckpt")
    module = PlainMLP()
    with pytest.raises(FileExistsError, match="holds the adapter of another run"):
        trainer(tmp_path, GenLoRAFinetuning(CONFIG), overwrite=False).fit(module, mlp_loader())
    assert module.losses == []
    fit(tmp_path, max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert stored_facts(tmp_path / "adapter")["global_step"] == 8


def test_every_rank_stops_for_what_the_first_has_found(tmp_path, monkeypatch):
    def from_the_first(self: Any, value: Any, src: int = 0) -> Any:
        return FileExistsError("the first rank's") if value is None else value

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", from_the_first)
    with pytest.raises(FileExistsError, match="the first rank's"):
        fit(tmp_path)
    assert not (tmp_path / "adapter").exists()


class Meanwhile(Callback):
    """Another run saves its adapter while this one trains; this one may be interrupted then."""

    def __init__(self, folder: Path, error: BaseException | None = None) -> None:
        self.folder, self.error = folder, error

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            other = PlainMLP()
            inject_adapters(other, CONFIG)
            save_adapter(other, self.folder, training={"run": "another"})
            if self.error is not None:
                raise self.error


def test_adapter_that_appeared_meanwhile_stays_and_this_run_s_is_saved_beside_it(tmp_path):
    with pytest.warns(UserWarning, match=r"Another run has saved its adapter in .*adapter meanwhile"):
        _, module = fit(tmp_path, Meanwhile(tmp_path / "adapter"))
    assert stored_facts(tmp_path / "adapter")["run"] == "another"
    fresh = PlainMLP()
    load_adapter(fresh, tmp_path / "adapter-2")
    x = torch.randn(3, 8)
    assert torch.equal(fresh(x), module(x))


def test_interrupted_runs_do_not_replace_each_other(tmp_path):
    for name in ("adapter-interrupted-2", "adapter-interrupted-3"):
        with pytest.raises(KeyError, match="a bug"):
            fit(tmp_path, Meanwhile(tmp_path / "adapter-interrupted", KeyError("a bug")))
        assert stored_facts(tmp_path / "adapter-interrupted")["run"] == "another"
        assert stored_facts(tmp_path / name)["global_step"] == 2


# -- URLs --------------------------------------------------------------------------------------------------------------


def test_remote_run_is_refused_before_it_trains_and_says_what_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"The `adapter_dir` 's3://bucket/adapter' is a URL"):
        GenLoRAFinetuning(CONFIG, adapter_dir="s3://bucket/adapter")
    settings = {"logger": CSVLogger("memory://bucket/run"), "enable_checkpointing": True}
    module = PlainMLP()
    with pytest.raises(
        ValueError, match=r"'memory://bucket/run/.*/adapter' is a URL.*Set `adapter_dir`.*`save_adapter`"
    ):
        trainer("memory://bucket/run", GenLoRAFinetuning(CONFIG), **settings).fit(module, mlp_loader())
    assert module.losses == []
    saver = ModelCheckpoint(save_last=True)
    local = GenLoRAFinetuning(CONFIG, adapter_dir=f"file://{tmp_path / 'mine'}")
    trainer("memory://bucket/run", local, saver, **settings).fit(module, mlp_loader())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert saver.last_model_path.startswith("memory://")
    with pytest.raises(ValueError, match=r"'memory://bucket/run/.*last.ckpt' is a URL, and must be a local path"):
        load_module(PlainMLP(), saver.last_model_path)


# -- checkpoints of another base ---------------------------------------------------------------------------------------


class OtherBase(PlainMLP):
    def build(self) -> None:
        super().build()
        with torch.no_grad():
            self.net[4].weight.add_(0.5)


@pytest.mark.parametrize("use", ["fit", "validate", "load_module"])
def test_checkpoint_of_another_base_is_refused_everywhere(tmp_path, use):
    made, _ = fit(tmp_path)
    made.save_checkpoint(tmp_path / "x.ckpt")

    def load(module: Any, **check: Any) -> Any:
        if use == "load_module":
            return load_module(module, tmp_path / "x.ckpt", **check)
        adapter = GenLoRAFinetuning(CONFIG, save_adapter=False, **check)
        run = trainer(tmp_path, adapter, max_epochs=2)
        return getattr(run, use)(module, mlp_loader(), ckpt_path=tmp_path / "x.ckpt")

    load(PlainMLP())
    message = r"The checkpoint .*x.ckpt was trained on another base: .*1 of \d+ sampled .* values \(net.4.weight\)"
    with pytest.raises(WrongBaseError, match=message):
        load(OtherBase())
    with pytest.warns(UserWarning, match=message):
        load(OtherBase(), base_check="warn")
    load(OtherBase(), base_check="off")


class Unfrozen(PlainMLP):
    """Trains parameters of the base beside the adapters."""

    def extra(self) -> list[torch.Tensor]:
        first: Any = self.net[0]
        return [self.net[4].weight, getattr(first, "base_layer", first).bias]

    def configure_optimizers(self) -> Any:
        for parameter in self.extra():
            parameter.requires_grad_(True)
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.filterwarnings("ignore:2 trainable parameters, net.0.base_layer.bias among them, are neither")
def test_what_is_trained_beside_the_adapters_is_no_other_base(tmp_path):
    made, module = trainer(tmp_path, GenLoRAFinetuning(CONFIG)), Unfrozen()
    made.fit(module, mlp_loader())
    made.save_checkpoint(tmp_path / "x.ckpt")
    assert not any(map(torch.equal, module.extra(), Unfrozen().extra()))
    again = Unfrozen()
    with torch.no_grad():
        for parameter in again.extra():
            parameter.zero_()  # as a new head is, another one each time
    load_module(again, tmp_path / "x.ckpt")
    assert all(map(torch.equal, module.extra(), again.extra()))


def test_base_check_is_one_of_three():
    with pytest.raises(ValueError, match=r"`base_check` must be one of .*got 'no'"):
        GenLoRAFinetuning(CONFIG, base_check="no")
