from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import LightningDataModule

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.cli.trainer import CommandTrainer, centred_losses, rate_table, steepest_fall
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.training.precision import Precision
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader


class Data(LightningDataModule):
    def train_dataloader(self):
        return mlp_loader(64)


class Rated(PlainMLP):
    """With the attribute that Lightning's search sets."""

    def __init__(self):
        super().__init__()
        self.lr = 1e-3

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def command_trainer(tmp_path, *callbacks, **settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"accelerator": "cpu", "max_epochs": 1}
    return CommandTrainer(default_root_dir=tmp_path, callbacks=[*callbacks], **{**quiet, **settings})


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed"])
def test_precision_is_chosen_for_the_accelerator(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(
        "genlora_lightning.cli.trainer.best_precision", lambda where: asked.append(where) or Precision(name, "so")
    )
    assert command_trainer(tmp_path, precision="auto").precision == name
    assert command_trainer(tmp_path, precision="64-true").precision == "64-true"
    assert asked == ["cpu"]


def test_search_for_a_rate_prints_the_curve_and_leaves_all_as_it_was(tmp_path, capsys):
    module = Rated()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run = command_trainer(tmp_path, GenLoRAFinetuning(small_config(), adapter_dir=str(tmp_path / "adapter")))
    run.find_lr(module, Data(), steps=30, highest=1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rate", "loss"]
    assert lines[1].split()[0] == "1.00e-05"
    assert float(lines[1].split()[1]) == pytest.approx(sum(module.losses[:3]) / 3, abs=1e-4)  # as they are
    assert sum("<- steepest fall" in line for line in lines) == 1
    assert lines[-1].startswith("Suggested: lr ")
    (steepest,) = (float(line.split()[0]) for line in lines if "<- steepest fall" in line)
    assert float(lines[-1].split()[2].rstrip(",")) == pytest.approx(steepest / 3, rel=0.05)
    assert module.lr == 1e-3
    assert not (tmp_path / "adapter").exists()
    assert not any(layer.acts() for layer in adapter_layers(module).values())
    after = {name.replace("base_layer.", ""): tensor for name, tensor in module.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_losses_and_their_steepest_fall_are_found_in_the_finders_averages():
    losses = [8.0 - 5.0 / (1 + math.exp(20.0 - step)) for step in range(40)]  # falls fastest at step 20
    average, recorded = 0.0, []
    for step, loss in enumerate(losses, 1):
        average = 0.98 * average + 0.02 * loss
        recorded.append(average / (1 - 0.98 ** (step + 1)))  # as Lightning's finder does
    found = centred_losses(recorded)
    assert found[:2] == pytest.approx([8.0, 8.0], rel=1e-6)
    assert found[20] == pytest.approx(sum(losses[18:23]) / 5)
    assert steepest_fall(found) == 20
    assert steepest_fall([1.0, 2.0, 3.0]) is None
    assert steepest_fall([3.0, math.nan, math.nan]) is None


def test_search_that_cannot_tell_rates_apart_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"No rate between 1e-05 and 0.3 could be told from the others in 2 steps"):
        command_trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False)).find_lr(
            Rated(), Data(), steps=2
        )


def test_curve_has_a_bar_for_each_loss_and_stands_infinite_ones():
    text = rate_table([1e-4, 1e-3, 1e-2, 1e-1], [4.0, 3.0, 2.0, math.inf], 1)
    bars = [line.count("#") for line in text.splitlines()[1:-1]]
    assert bars[0] > bars[1] > bars[2] == 0
    assert bars[3] == 40
    assert text.splitlines()[2].endswith("<- steepest fall")
