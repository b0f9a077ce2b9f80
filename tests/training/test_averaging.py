"""Lightning's weight averaging averages what is trained, and survives a stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch import callbacks as lightning_callbacks

from genlora_lightning import GenLoRAFinetuning, load_adapter, load_module
from genlora_lightning.artifacts.loading import read_checkpoint
from genlora_lightning.injection.state import adapter_state_dict
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer
from tests.ranks import on_ranks

pytestmark = [
    pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="came with Lightning 2.6"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]
DECAY = 0.8


def averaging() -> Any:
    return lightning_callbacks.EMAWeightAveraging(decay=DECAY)


class Record(Callback):
    """Averages by itself what it sees after each step, and notes what validation sees; saves at each epoch's end."""

    def __init__(self) -> None:
        self.average: dict[str, torch.Tensor] = {}
        self.validated: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = {name: t.clone() for name, t in adapter_state_dict(pl_module).items()}
        before = self.average or state
        self.average = {name: DECAY * before[name] + (1 - DECAY) * t for name, t in state.items()}

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(all_close(adapter_state_dict(pl_module), self.average))

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.current_epoch}.ckpt")


def all_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[name], t, rtol=1e-5, atol=1e-6) for name, t in other.items())


def equal(one: Any, other: Any) -> bool:
    one, other = adapter_state_dict(one), adapter_state_dict(other)
    return set(one) == set(other) and all(torch.equal(one[name], t) for name, t in other.items())


def finetuning(**settings: Any) -> GenLoRAFinetuning:
    return GenLoRAFinetuning(small_config(exclude_modules=["4"], modules_to_train=["4"]), **settings)


def fit(folder: Any, *callbacks: Any, ckpt_path: Any = None, **settings: Any) -> PlainMLP:
    torch.manual_seed(7)
    module = PlainMLP()
    made = trainer(folder, *callbacks, **{"max_epochs": 3, **settings})
    made.fit(module, mlp_loader(), mlp_loader(8), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("first", [True, False])
def test_average_is_validated_saved_and_left_in_the_module(tmp_path, first):
    record = Record()
    callbacks = [averaging(), finetuning()] if first else [finetuning(), averaging()]
    module = fit(tmp_path, *callbacks, record)
    assert all_close(adapter_state_dict(module), record.average)
    assert record.validated == [True] * 3
    fresh = PlainMLP()
    load_adapter(fresh, tmp_path / "adapter")
    assert equal(fresh, module)
    loaded = load_module(PlainMLP(), tmp_path / "2.ckpt")
    assert equal(loaded, module)
    checkpoint = read_checkpoint(tmp_path / "2.ckpt")
    trained = set(adapter_state_dict(module))
    assert set(checkpoint["state_dict"]) == set(checkpoint["current_model_state"]) == trained
    assert not all_close(checkpoint["current_model_state"], checkpoint["state_dict"])


def test_resumed_average_equals_one_that_was_never_stopped(tmp_path):
    whole = fit(tmp_path / "whole", finetuning(), averaging(), Record())
    resumed = fit(tmp_path / "again", finetuning(), averaging(), ckpt_path=tmp_path / "whole" / "0.ckpt")
    assert equal(whole, resumed)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]


@pytest.mark.parametrize("first", [True, False])
def test_finished_run_that_is_started_again_leaves_the_average_in_the_module_and_the_folder(tmp_path, first):
    def script() -> PlainMLP:
        callbacks = [averaging(), finetuning()] if first else [finetuning(), averaging()]
        saver = lightning_callbacks.ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
        settings = {"enable_checkpointing": True, "overwrite": False}
        return fit(tmp_path, *callbacks, saver, ckpt_path="last", **settings)

    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        whole = script()
    again = script()
    assert not again.losses
    assert equal(again, whole)
    fresh = PlainMLP()
    load_adapter(fresh, tmp_path / "adapter")
    assert equal(fresh, whole)


def test_average_of_a_part_that_is_compiled_is_that_without_compile(tmp_path):
    class Compiled(PlainMLP):
        def build(self) -> None:
            super().build()
            self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/end.ckpt")

    averages = []
    for cls in (PlainMLP, Compiled):
        torch.manual_seed(7)
        folder = tmp_path / cls.__name__
        trainer(folder, averaging(), finetuning(), Save(), max_epochs=1).fit(cls(), mlp_loader())
        averages.append(load_module(PlainMLP(), folder / "end.ckpt"))
    assert all_close(*map(adapter_state_dict, averages))


def test_finder_beside_an_average_is_undone(tmp_path):
    finder = lightning_callbacks.LearningRateFinder(num_training_steps=4, min_lr=1e-4, update_attr=False)
    assert equal(fit(tmp_path, finetuning(), averaging()), fit(tmp_path, finder, finetuning(), averaging()))


def test_trainer_validates_after_a_fit(tmp_path):
    module = PlainMLP()
    run = trainer(tmp_path, finetuning(), averaging(), Record())
    run.fit(module, mlp_loader(), mlp_loader(8))
    before = {name: t.clone() for name, t in adapter_state_dict(module).items()}
    run.validate(module, mlp_loader(8), verbose=False)
    assert all(torch.equal(adapter_state_dict(module)[name], t) for name, t in before.items())


def test_average_of_two_ranks_is_the_same_on_both(tmp_path):
    def train() -> dict[str, torch.Tensor]:
        record = Record()
        module = fit(tmp_path, finetuning(), averaging(), record, strategy="ddp", devices=2, limit_val_batches=0)
        assert all_close(adapter_state_dict(module), record.average)
        return {name: t.clone() for name, t in adapter_state_dict(module).items()}

    first, second = on_ranks(train)
    assert all(torch.equal(second[name], t) for name, t in first.items())


def test_average_is_refused_where_the_base_is_sharded(tmp_path):
    with pytest.raises(ValueError, match=r"EMAWeightAveraging under GenLoRAFSDPStrategy: it averages on one device"):
        fit(tmp_path, finetuning(), averaging(), strategy="genlora_fsdp")
