from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.storage.checkpoint_file import verify_checkpoint
from genlora_lightning.training.checkpoint_io import AtomicCheckpointIO
from tests.artifacts.test_adapter_io import flip
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer


def run(tmp_path, *callbacks, **settings):
    finetuning = GenLoRAFinetuning(small_config(), save_adapter=False)
    return trainer(tmp_path, finetuning, *callbacks, **settings)


def test_callback_installs_it_and_checkpoints_are_kept_removed_and_resumed_from(tmp_path):
    folder = tmp_path / "checkpoints"
    saver = ModelCheckpoint(folder, monitor="val_loss", save_top_k=1, save_last=True, every_n_epochs=1)
    fit = run(tmp_path, saver, enable_checkpointing=True, max_epochs=3)
    module = PlainMLP()
    fit.fit(module, mlp_loader(), mlp_loader())
    assert isinstance(fit.strategy.checkpoint_io, AtomicCheckpointIO)
    names = os.listdir(folder)
    assert len(names) == 2
    assert "last.ckpt" in names
    assert {verify_checkpoint(folder / name) for name in names} == {"sha256"}
    resumed = run(tmp_path, max_epochs=4)
    resumed.fit(PlainMLP(), mlp_loader(), ckpt_path=folder / "last.ckpt")
    assert resumed.global_step == 16
    fit.strategy.remove_checkpoint(folder / "last.ckpt")
    fit.strategy.remove_checkpoint(folder / "last.ckpt")
    assert "last.ckpt" not in os.listdir(folder)


def test_flipped_bit_stops_a_run_before_it_starts(tmp_path):
    fit = run(tmp_path)
    fit.fit(PlainMLP(), mlp_loader())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    data = (tmp_path / "x.ckpt").read_bytes()
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    place = data.find(state["net.0.update.B.latent"].numpy().tobytes())
    assert place > 0
    flip(tmp_path / "x.ckpt", 8 * place + 3)
    with pytest.raises(DamagedFileError, match=r"x\.ckpt .* has another SHA-256 than when it was written"):
        run(tmp_path).fit(PlainMLP(), mlp_loader(), ckpt_path=tmp_path / "x.ckpt")


@pytest.mark.parametrize("make", [AsyncCheckpointIO, type("Own", (TorchCheckpointIO,), {})])
def test_plugin_of_the_user_stays(tmp_path, make):
    plugin = make()
    fit = run(tmp_path, plugins=[plugin])
    fit.fit(PlainMLP(), mlp_loader())
    assert fit.strategy.checkpoint_io is plugin


def test_remote_paths_are_left_to_lightning_and_file_urls_are_local(tmp_path):
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"a": 1}, "memory://folder/x.ckpt")
    assert plugin.load_checkpoint("memory://folder/x.ckpt") == {"a": 1}
    plugin.remove_checkpoint("memory://folder/x.ckpt")
    with pytest.raises(FileNotFoundError):
        plugin.load_checkpoint("memory://folder/x.ckpt")
    plugin.save_checkpoint({"a": 2}, f"file://{tmp_path}/x.ckpt")
    assert verify_checkpoint(tmp_path / "x.ckpt") == "sha256"
    assert plugin.load_checkpoint(f"file://{tmp_path}/x.ckpt") == {"a": 2}
    plugin.remove_checkpoint(f"file://{tmp_path}/x.ckpt")
    assert not os.listdir(tmp_path)


def test_storage_options_are_refused_as_lightning_does(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={})
