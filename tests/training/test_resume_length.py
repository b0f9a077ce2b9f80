"""A run whose data loader does not say how many batches it has goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, Sampler

from genlora_lightning import GenLoRAFinetuning
from tests.conftest import small_config
from tests.plain import trainer
from tests.training.test_resume import Noisy, SaveAt, data, seed


class Shuffled(Sampler[list[int]]):
    """A batch sampler without a length: five batches, in an order of the global generator or its own."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(20, generator=self.generator).tolist()
        yield from (order[start : start + 4] for start in range(0, 20, 4))


class Augmented(Dataset[Any]):
    """Draws from the global generator whenever an example is read."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        x, y = data()[index]
        return x + 0.1 * torch.randn(8), y


def loader(kind: str) -> Any:
    generator = torch.Generator().manual_seed(11) if kind == "generator" else None
    settings: dict[str, Any] = {"workers": {"num_workers": 1}}.get(kind, {})
    if kind == "persistent":
        settings = {"num_workers": 1, "persistent_workers": True, "generator": torch.Generator().manual_seed(11)}
    dataset = Augmented() if kind == "augmented" else data()
    return DataLoader(dataset, batch_sampler=Shuffled(generator), **settings)


def fit(
    folder: Path, module: Noisy, *callbacks: Any, kind: Any = "plain", ckpt_path: Any = None, **settings: Any
) -> Any:
    finetuning = GenLoRAFinetuning(small_config(exclude_modules=["5"], dropout=0.2), save_adapter=False)
    made = trainer(folder, finetuning, *callbacks, **{"max_epochs": 3, "limit_val_batches": 0, **settings})
    train = loader(kind) if isinstance(kind, str) else kind()
    made.fit(module, train, DataLoader(data(), batch_size=4), ckpt_path=ckpt_path)
    return made


PLACES = [(3, "on_train_batch_end"), (5, "on_train_epoch_end")]
MORE_PLACES = [
    (1, "on_train_start"),
    (1, "on_train_batch_end"),
    (5, "on_train_batch_end"),
    (8, "on_train_batch_end"),
    (10, "on_train_epoch_end"),
]


@pytest.mark.parametrize(
    ("batches", "hook", "kind"),
    [
        *((*place, kind) for kind in ("plain", "generator", "augmented") for place in PLACES + MORE_PLACES),
        *((*place, kind) for kind in ("workers", "persistent") for place in PLACES),  # processes take long to start
    ],
)
def test_run_whose_batch_sampler_has_no_length_goes_on_exactly(tmp_path, batches, hook, kind):
    whole, first, second = Noisy(), Noisy(), Noisy()
    save = SaveAt(tmp_path / "x.ckpt", 0 if hook == "on_train_start" else batches, hook)
    seed(5)
    fit(tmp_path, whole, kind=kind)
    seed(5)
    with pytest.raises(KeyError, match="stopped"):
        fit(tmp_path, first, save, kind=kind)
    seed(99)
    resumed = fit(tmp_path, second, kind=kind, ckpt_path=tmp_path / "x.ckpt")
    assert first.losses + second.losses == whole.losses
    assert resumed.global_step == 15


def test_run_goes_on_exactly_in_the_middle_of_accumulation_and_after_a_validation(tmp_path):
    settings = {"limit_val_batches": 1.0, "val_check_interval": 2, "accumulate_grad_batches": 2}
    whole, first, second = Noisy(), Noisy(), Noisy()
    seed(5)
    fit(tmp_path, whole, kind="augmented", **settings)
    seed(5)
    with pytest.raises(KeyError, match="stopped"):
        fit(tmp_path, first, SaveAt(tmp_path / "x.ckpt", 7, "on_validation_end"), kind="augmented", **settings)
    seed(99)
    fit(tmp_path, second, kind="augmented", ckpt_path=tmp_path / "x.ckpt", **settings)
    assert first.losses + second.losses == whole.losses


class Summed(Noisy):
    """Trains on the batches of two loaders at once."""

    def step(self, batch: list[Any]) -> torch.Tensor:
        return super().step(batch[0]) + super().step(batch[1])


def test_several_loaders_one_of_which_has_no_length_are_refused_in_the_middle_of_an_epoch(tmp_path):
    def several() -> CombinedLoader:
        return CombinedLoader([loader("plain"), DataLoader(data(), batch_size=4)], "min_size")

    whole, first, second = Summed(), Summed(), Summed()
    seed(5)
    fit(tmp_path, whole, kind=several)
    middle, end = SaveAt(tmp_path / "x.ckpt", 3, stop=False), SaveAt(tmp_path / "y.ckpt", 5, "on_train_epoch_end")
    seed(5)
    with pytest.raises(KeyError, match="stopped"):
        fit(tmp_path, first, middle, end, kind=several)
    with pytest.raises(ValueError, match=r"2 data loaders, one of which had no length.* `batch_sampler` a `__len__`"):
        fit(tmp_path, Summed(), kind=several, ckpt_path=middle.file)
    seed(99)
    fit(tmp_path, second, kind=several, ckpt_path=end.file)
    assert first.losses + second.losses == whole.losses
