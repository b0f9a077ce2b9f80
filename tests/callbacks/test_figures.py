from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.callbacks.figures import peak_memory_gib
from genlora_lightning.callbacks.progress import LineProgressBar
from tests.conftest import small_config
from tests.plain import PlainMLP, mlp_loader, trainer


class Scheduled(PlainMLP):
    """Scales its gradients after everybody else, as our modules do; keeps their norms."""

    def configure_optimizers(self) -> Any:
        self.norms: list[float] = []
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, 3.0)
        self.norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rate_gradient_norm_and_memory_stand_in_the_log(tmp_path, capsys, accumulate):
    module = Scheduled()
    finetuning = GenLoRAFinetuning(small_config(exclude_modules=["4"]), save_adapter=False)
    trainer(
        tmp_path,
        finetuning,
        LineProgressBar(),
        logger=CSVLogger(tmp_path),
        enable_progress_bar=True,
        max_epochs=2,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1e-3,
    ).fit(module, mlp_loader())
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = [row for row in csv.DictReader(file) if row["lr"]]
    steps = [int(row["step"]) for row in rows]
    assert steps == list(range(1, 8 // accumulate, 2))
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.5 * 0.5**step for step in steps])
    assert [float(row["grad_norm"]) for row in rows] == pytest.approx([module.norms[step] for step in steps])
    memory = peak_memory_gib(torch.device("cpu"))
    assert memory is not None
    assert all(0.5 * memory < float(row["memory_gib"]) <= memory for row in rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    for line in lines:
        assert "| grad_norm " in line or "| step 0/" in line  # no step was made yet
        assert "| lr " in line
        assert " GiB |" in line


def test_figures_are_no_results_of_the_adapter(tmp_path):
    run = trainer(tmp_path, GenLoRAFinetuning(small_config()), log_every_n_steps=1)
    run.fit(PlainMLP(), mlp_loader())
    assert "grad_norm" in run.callback_metrics
    assert "grad_norm" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
