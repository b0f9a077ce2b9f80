"""LightningModules that know nothing of adapters, and trainers for them."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from genlora_lightning.training.callback import AdapterFinetuning
from tests.models import tiny_bert

LIGHTNING_2_5 = Version(lightning.__version__) < Version("2.6")


class PlainMLP(LightningModule):
    """A regression MLP with a frozen-to-be backbone, as a user would write it."""

    def __init__(self, build_in: str = "init", lr: float = 0.05) -> None:
        super().__init__()
        self.build_in = build_in
        self.lr = lr
        self.net: nn.Sequential | None = None
        self.losses: list[float] = []
        if build_in == "init":
            self.build()

    def build(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def configure_model(self) -> None:
        if self.build_in == "configure_model" and self.net is None:
            self.build()

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.net(x)

    def step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.step(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class PlainEncoder(PlainMLP):
    """A transformers encoder with its classification head, in a module that knows nothing of adapters."""

    def build(self) -> None:
        self.net = tiny_bert().eval()

    def step(self, batch: list[Tensor]) -> Tensor:
        ids, labels = batch
        assert self.net is not None
        return self.net(input_ids=ids, labels=labels).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.02)


def mlp_loader(n: int = 32, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].sin()), batch_size=batch_size)


def encoder_loader(n: int = 32, batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (n, 6), generator=generator)
    return DataLoader(TensorDataset(ids, ids[:, 1] % 3), batch_size=batch_size)


class Overwrite(Callback):
    """Lets runs replace each other's adapters, those of the module's own callback, too."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AdapterFinetuning):
                callback.overwrite = True


def trainer(root: Any, *callbacks: Any, overwrite: bool = True, **settings: Any) -> Trainer:
    """A quiet CPU trainer for tests, many of which run again and again in one folder."""
    callbacks = (*callbacks, Overwrite()) if overwrite else callbacks
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": str(root),
            "callbacks": list(callbacks),
            **settings,
        }
    )
