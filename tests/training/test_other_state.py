"""State that is neither the adapters' nor the frozen base's survives a stop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from genlora_lightning import GenLoRAFinetuning, load_module
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
