"""A schedule that depends on a metric goes on after a stop with the values that it would have been told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tests.training.test_resume import Noisy, SaveAt, run, seed

MESSAGE = r"ReduceLROnPlateau is told at each step of 'train_loss', which was logged in `on_train_batch_end`"


class Watched(Noisy):
    """Its learning rate falls with nearly every value that its scheduler is told."""

    def __init__(self, logged_in: str = "training_step", **schedule: Any) -> None:
        super().__init__()
        self.logged_in = logged_in
        self.schedule = {"interval": "step", "monitor": "train_loss", **schedule}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.logged_in == "training_step":
            self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.logged_in == "on_train_batch_end":
            self.log("train_loss", outputs["loss"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.9, patience=0, threshold=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.schedule}}


def rest_of(tmp_path: Path, save: SaveAt, whole: Watched, second: Watched, **settings: Any) -> list[float]:
    """What a run loses after it was stopped, and is to lose."""
    first = Watched(whole.logged_in, **whole.schedule)
    seed(5)
    before = run(tmp_path, whole, max_epochs=3, **settings)
    seed(5)
    with pytest.raises(KeyError, match="stopped"):
        run(tmp_path, first, save, max_epochs=3, **settings)
    seed(99)
    after = run(tmp_path, second, max_epochs=3, ckpt_path=save.file, **settings)
    for name in ("_batches_that_stepped", "global_step"):
        assert getattr(after.fit_loop.epoch_loop, name) == getattr(before.fit_loop.epoch_loop, name)
    rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in (before, after)]
    if whole.logged_in == "training_step":
        assert rates[0] == rates[1]
    return whole.losses[len(whole.losses) - len(second.losses) :]


SETTINGS: dict[str, dict[str, Any]] = {
    "unvalidated": {},
    "validated": {"validate": True},
    "validated often": {"validate": True, "val_check_interval": 2},
    "accumulating": {"validate": True, "accumulate_grad_batches": 2},
}
EPOCH_ENDS = (5, 10)
VALIDATED = {"unvalidated": (), "validated": EPOCH_ENDS, "validated often": (2, 4), "accumulating": EPOCH_ENDS}
# Where each hook saves, in batches.
PLACES = [
    *(
        (batches, hook, kind)
        for kind in SETTINGS
        for hook in ("on_train_batch_start", "on_train_batch_end")
        for batches in (2, 3, 4, 5, 8, 10)
    ),
    *((batches, "on_validation_end", kind) for kind in SETTINGS for batches in VALIDATED[kind]),
    *((batches, "on_train_epoch_end", kind) for kind in SETTINGS for batches in EPOCH_ENDS),
]


@pytest.mark.parametrize(("batches", "hook", "kind"), PLACES)
def test_plateau_of_a_training_metric_at_each_step_goes_on_exactly(tmp_path, batches, hook, kind):
    settings = SETTINGS[kind]
    whole, second = Watched(), Watched()
    rest = rest_of(tmp_path, SaveAt(tmp_path / "x.ckpt", batches, hook), whole, second, **settings)
    assert second.losses == rest
    assert len(rest) == 15 - batches + (hook == "on_train_batch_start")


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric val_loss which is not available")
@pytest.mark.parametrize(
    ("batches", "hook"),
    [
        *((batches, "on_train_batch_end") for batches in (4, 5, 7, 10, 12)),
        *((batches, "on_validation_end") for batches in EPOCH_ENDS),
    ],
)
def test_plateau_at_each_step_is_told_the_latest_validation(tmp_path, batches, hook):
    schedule = {"monitor": "val_loss", "strict": False}
    whole, second = Watched(**schedule), Watched(**schedule)
    save = SaveAt(tmp_path / "x.ckpt", batches, hook)
    assert second.losses == rest_of(tmp_path, save, whole, second, validate=True)[-len(second.losses) :]
    assert second.losses == whole.losses[batches:]


@pytest.mark.parametrize("batches", [7, 10, 12])
def test_plateau_by_epoch_is_told_the_validation_of_an_earlier_epoch(tmp_path, batches):
    schedule = {"monitor": "val_loss", "interval": "epoch", "frequency": 3}
    whole, second = Watched(**schedule), Watched(**schedule)
    save = SaveAt(tmp_path / "x.ckpt", batches)
    rest_of(tmp_path, save, whole, second, validate=True, check_val_every_n_epoch=2)
    assert second.losses == whole.losses[batches:]


def test_metric_that_is_logged_after_the_checkpoint_is_warned_of(tmp_path):
    whole, second = Watched("on_train_batch_end"), Watched("on_train_batch_end")
    with pytest.warns(UserWarning, match=MESSAGE):
        rest_of(tmp_path, SaveAt(tmp_path / "x.ckpt", 3), whole, second)


def test_metric_that_was_logged_before_the_checkpoint_is_not_warned_of(tmp_path):
    whole, second = Watched("on_train_batch_end"), Watched("on_train_batch_end")
    with warnings.catch_warnings(record=True) as caught:
        rest_of(tmp_path, SaveAt(tmp_path / "x.ckpt", 5, "on_train_epoch_end"), whole, second)
    assert second.losses == whole.losses[5:]
    assert not [warning for warning in caught if "ReduceLROnPlateau" in str(warning.message)]
