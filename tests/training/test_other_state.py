"""State that is neither the adapters' nor the frozen base's survives a stop."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback
from torch import nn

from genlora_lightning import GenLoRAFinetuning, load_module, remove_adapters, save_adapter
from genlora_lightning.artifacts.loading import read_checkpoint
from genlora_lightning.storage.checkpoint_file import write_checkpoint
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Persistent(nn.Module):
    """A state that is no buffer, as torchmetrics keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "total"] = self.total

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        if prefix + "total" in state_dict:
            self.total = state_dict.pop(prefix + "total").clone()


class Stateful(PlainMLP):
    def build(self) -> None:
        super().build()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("table", torch.arange(10_000.0))  # never changes
        self.register_buffer("queue", torch.zeros(64, 1024))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)
        self.counter, self.metric = Counter(), Persistent()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        out = self(batch[0])
        self.seen += 1
        self.scratch += 1
        self.mean = 0.5 * self.mean + 0.5 * out.detach().mean()  # another tensor each time
        self.queue[int(self.seen) % 64] = self.seen
        self.counter.count += 1
        self.metric.total = self.metric.total + 2
        loss = (out - batch[1] - self.mean).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def values(self) -> list[Any]:
        return [self.seen.item(), self.mean.item(), self.queue.sum().item(), self.counter.count, *self.metric.total]


class Save(Callback):
    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.current_epoch}.ckpt")


def fit(folder: Any, module: Any, ckpt_path: Any = None, **settings: Any) -> Any:
    finetuning = GenLoRAFinetuning(small_config(exclude_modules=["4"]), save_adapter=False)
    trainer(folder, finetuning, Save(), **settings).fit(module, mlp_loader(), ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_changed_buffers_and_extra_state_come_back_in_a_resume(tmp_path, precision):
    if precision == "bf16-true":
        mlp = mlp_loader().dataset
        mlp.tensors = tuple(t.bfloat16() for t in mlp.tensors)
    whole = fit(tmp_path, Stateful(), max_epochs=2, precision=precision)
    resumed = fit(tmp_path, Stateful(), tmp_path / "0.ckpt", max_epochs=2, precision=precision)
    assert resumed.values() == whole.values()
    assert resumed.losses == whole.losses[4:]
    kept = read_checkpoint(tmp_path / "0.ckpt")["genlora"]["other_state"]
    assert set(kept) == {"seen", "mean", "queue", "counter._extra_state", "metric.total"}


def test_changed_buffers_come_back_in_load_module_and_in_runs_that_follow(tmp_path):
    first = fit(tmp_path, Stateful())
    loaded = load_module(Stateful(), tmp_path / "0.ckpt")
    assert loaded.values() == first.values()
    fit(tmp_path / "more", loaded)
    assert load_module(Stateful(), tmp_path / "more" / "0.ckpt").values() == loaded.values()


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], r"0\.ckpt is damaged, .* genlora\.other_state must be a dictionary with text keys, got \[\]"),
        ({"seen": "x"}, r"0\.ckpt has the value 'x' for the buffer seen, which has the shape \(\)"),
        ({"seen": torch.ones(2)}, r"0\.ckpt has the shape \(2,\) for the buffer seen, which has the shape \(\)"),
        (
            {"counter._extra_state": 3},
            r"0\.ckpt holds state that this Stateful does not take .*_extra_state.*TypeErr",
        ),
    ],
)
def test_state_of_another_form_is_refused_and_the_module_is_as_it_was(tmp_path, kept, message):
    fit(tmp_path, Stateful())
    content = read_checkpoint(tmp_path / "0.ckpt")
    content["genlora"]["other_state"] = kept
    write_checkpoint(content, tmp_path / "0.ckpt")
    module = Stateful()
    before = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(ValueError, match=message):
        load_module(module, tmp_path / "0.ckpt")
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Stateful(), tmp_path / "0.ckpt", max_epochs=2)


class Teacher(PlainMLP):
    """A copy that follows the model, in place, as most of them are written."""

    def build(self) -> None:
        super().build()
        self.teacher = nn.Linear(8, 4).requires_grad_(False)

    def on_train_batch_end(self, *_: Any) -> None:
        for parameter in self.teacher.parameters():
            parameter.data.mul_(0.9)


def test_frozen_parameters_that_change_are_named(tmp_path):
    finetuning = GenLoRAFinetuning(small_config(exclude_modules=["4", "teacher"]), save_adapter=False)
    run = trainer(tmp_path, finetuning, Save(), max_epochs=2)
    with pytest.warns(UserWarning, match=r"2 frozen parameters have changed .*, teacher\.weight among them") as caught:
        run.fit(Teacher(), mlp_loader())
    assert len([w for w in caught if "frozen parameters have changed" in str(w.message)]) == 1


def warned_of_frozen(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "frozen parameters have changed" in str(w.message)]


def test_fixed_parameters_of_the_adapters_are_not_the_bases_in_a_run_that_was_made_with_another_seed(tmp_path):
    def run(folder: str, **settings: Any) -> Any:
        config = small_config(exclude_modules=["4"], learn_centers=False, learn_widths=False)
        finetuning = GenLoRAFinetuning(config, save_adapter=False)
        module = PlainMLP()
        trainer(tmp_path / folder, finetuning, Save(), max_epochs=2).fit(module, mlp_loader(), **settings)
        return module

    torch.manual_seed(1)
    run("first")
    torch.manual_seed(2)
    assert warned_of_frozen(lambda: run("second", ckpt_path=tmp_path / "first" / "0.ckpt")) == []


def test_new_adapters_begin_with_the_base_as_it_is_by_then_and_a_new_run_warns_anew(tmp_path):
    module = fit(tmp_path, PlainMLP())
    remove_adapters(module)
    with torch.no_grad():
        module.net[0].weight.mul_(2)  # trained further in between, say
    assert warned_of_frozen(lambda: fit(tmp_path, module)) == []
    with torch.no_grad():
        module.net[4].weight.mul_(2)  # beside adapters that were not trained with it
    for _ in range(2):
        assert len(warned_of_frozen(lambda: fit(tmp_path, module))) == 1


class Normed(PlainMLP):
    """Has statistics that move with each batch in train mode."""

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))

    def on_train_epoch_start(self) -> None:
        self.train()


class Spectral(PlainMLP):
    def build(self) -> None:
        super().build()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net[2] = nn.utils.parametrizations.spectral_norm(self.net[2])


class NormedPart(Normed):
    def adapter_root(self) -> nn.Module:
        return self.net


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize(
    ("cls", "number", "first"),
    [
        (Normed, 3, r"net\.1\.running_mean"),
        (NormedPart, 3, r"net\.1\.running_mean"),
        (Spectral, 2, r"net\.2\.\S*_u"),
    ],
)
def test_changed_buffers_of_the_base_are_named_once_when_the_adapter_is_saved(tmp_path, cls, number, first):
    module = cls()
    finetuning = GenLoRAFinetuning(small_config())
    with pytest.warns(UserWarning, match=rf"{number} buffers of the frozen base have changed, {first} among"):
        trainer(tmp_path, finetuning, Save()).fit(module, mlp_loader())
    batch = mlp_loader().dataset.tensors[0]
    loaded = load_module(cls(), tmp_path / "0.ckpt")
    # Not equal, because whoever reads a spectral norm's weight in train mode moves its vectors a little.
    torch.testing.assert_close(loaded.eval()(batch), module.eval()(batch), rtol=0, atol=1e-4)
    save_adapter(module, tmp_path / "again")  # says no more


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_changed_buffers_are_named_where_the_user_saves_the_adapter(tmp_path):
    module = Normed()
    trainer(tmp_path, GenLoRAFinetuning(small_config(), save_adapter=False)).fit(module, mlp_loader())
    with pytest.warns(UserWarning, match="3 buffers of the frozen base have changed"):
        save_adapter(module, tmp_path / "mine")


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_buffers_that_the_folder_holds_or_that_are_no_state_of_the_base_are_not_warned_of(tmp_path):
    class Count(torchmetrics.Metric):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def update(self) -> None: ...

        def compute(self) -> None: ...

    class Sound(Normed):
        def build(self) -> None:
            super().build()
            self.register_buffer("scratch", torch.zeros(()), persistent=False)
            self.register_buffer("table", torch.full((3,), float("nan")))
            self.metrics = torchmetrics.MetricCollection([Count()])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.scratch += 1
            self.metrics["Count"].steps += 1
            return super().training_step(batch, batch_idx)

    finetuning = GenLoRAFinetuning(small_config(modules_to_train=["1"]))
    trainer(tmp_path, finetuning).fit(Sound(), mlp_loader())
    assert (tmp_path / "adapter").is_dir()
