from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.errors import WrongBaseError
from genlora_lightning.injection.inject import adapter_layers
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer


class Hyper(PlainMLP):
    """A module that Lightning can make from its checkpoint."""

    def __init__(self, build_in: str = "init") -> None:
        super().__init__(build_in)
        self.save_hyperparameters()


@pytest.fixture
def trained(tmp_path):
    """A module after a run with adapters, its checkpoint, and its validation loss."""
    module = Hyper()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="run")
    run = trainer(
        tmp_path, GenLoRAFinetuning(small_config(exclude_modules=["4"])), saver, max_epochs=2, enable_checkpointing=True
    )
    run.fit(module, mlp_loader())
    return module, tmp_path / "run.ckpt", run.validate(module, mlp_loader(), verbose=False)


@pytest.mark.parametrize("place", ["trained", "init", "configure_model"])
def test_checkpoint_is_evaluated_by_a_trainer_without_the_callback(tmp_path, trained, place):
    module, file, expected = trained
    if place != "trained":
        module = Hyper(place)
    else:  # its values are the checkpoint's afterwards, not those it has
        with torch.no_grad():
            for layer in adapter_layers(module).values():
                for parameter in layer.adapter_parameters().values():
                    parameter.add_(0.1)
    assert trainer(tmp_path).validate(module, mlp_loader(), ckpt_path=str(file), verbose=False) == expected
    assert set(adapter_layers(module)) == {"net.0", "net.2"}


@pytest.mark.parametrize("place", ["init", "configure_model"])
def test_load_from_checkpoint_of_a_plain_module_gives_it_its_adapters(tmp_path, trained, place):
    _, file, expected = trained
    module = Hyper.load_from_checkpoint(file, build_in=place)
    assert trainer(tmp_path).validate(module, mlp_loader(), verbose=False) == expected


def test_fit_from_a_checkpoint_without_the_callback_says_which_one_to_give(tmp_path, trained):
    module, file, _ = trained
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    message = r"run.ckpt holds adapters only. .* Trainer\(callbacks=\[GenLoRAFinetuning\(config\)\]\)"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_epochs=4).fit(module, mlp_loader(), ckpt_path=str(file))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_other_base_is_refused_without_the_callback_too(tmp_path, trained):
    module = Hyper()
    with torch.no_grad():
        module.net[0].weight.add_(1.0)
    with pytest.raises(WrongBaseError, match="other values"):
        trainer(tmp_path).validate(module, mlp_loader(), ckpt_path=str(trained[1]), verbose=False)
    assert not adapter_layers(module)


def test_checkpoint_of_a_run_without_adapters_is_left_to_lightning(tmp_path):
    module = Hyper()
    run = trainer(tmp_path, ModelCheckpoint(dirpath=tmp_path, filename="plain"), enable_checkpointing=True)
    run.fit(module, mlp_loader())
    loaded = Hyper.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert not adapter_layers(loaded)
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in loaded.state_dict().items())
