"""Several named adapters in one run: each trains on its rows as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from genlora_lightning import (
    CompacterConfig,
    GenLoRAFinetuning,
    LoRAConfig,
    PoLARConfig,
)
from genlora_lightning.artifacts.adapter_folder import read_adapter
from tests.conftest import small_config
from tests.distributed.runs import SaveAt
from tests.plain import PlainMLP, trainer

CONFIGS = {
    "support": small_config(),
    "legal": LoRAConfig(rank=2, target_modules=["0", "4"]),
    "polar": PoLARConfig(rank=2),
    "compacter": CompacterConfig(rank=4, num_products=2),
}
# Of each batch the adapters of its rows: "legal" is missing in some, and alone in one.
BATCHES = [
    ["support", "legal", "polar", "compacter", "support"],
    ["polar", "support", "support", "polar", "compacter"],
    ["legal", "legal", "legal", "legal", "legal"],
    ["compacter", "legal", "support", "polar", "legal"],
]


class OfRows(PlainMLP):
    """A module that knows nothing of adapters: the loss is a sum over rows."""

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        assert set(batch) == {"x", "y"}
        return (self(batch["x"]) - batch["y"]).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # A large eps: Adam makes steps of full length out of gradients that are nothing but rounding.
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3, weight_decay=0.1)


def batches(names: list[list[str | None]] = BATCHES) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for rows in names:
        x = torch.randn(len(rows), 8, generator=generator)
        made.append({"x": x, "y": x[:, :4].sin(), "adapter": rows})
    return made


def loader(given: list[dict[str, Any]]) -> DataLoader[Any]:
    return DataLoader(given, batch_size=None)


class Watch(Callback):
    """Keeps the values of all that is trained, and the optimizer's, before the first and after each step."""

    def __init__(self, start: dict[str, Tensor] | None = None) -> None:
        self.start = start
        self.steps: list[dict[str, Tensor]] = []

    def look(self, trainer, module):
        names = {p: name for name, p in module.named_parameters()}
        found = {name: p.detach().clone() for p, name in names.items() if p.requires_grad}
        for p, state in trainer.optimizers[0].state.items():
            found |= {f"{names[p]} {key}": value.clone() for key, value in state.items()}
        self.steps.append(found)

    def on_train_start(self, trainer, pl_module):
        for name, value in (self.start or {}).items():
            pl_module.get_parameter(name).data.copy_(value)
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.look(trainer, pl_module)


def run(folder: Path, *callbacks: Callback, adapters: Any = CONFIGS, module: Any = None, **settings: Any) -> Any:
    data = settings.pop("data", None) or loader(batches())
    ckpt_path = settings.pop("ckpt_path", None)
    options = settings.pop("options", {})
    tuning = GenLoRAFinetuning(adapters=adapters, adapter_dir=str(folder / "adapter"), **options)
    made = trainer(folder, tuning, *callbacks, **settings)
    module = module or OfRows()
    made.fit(module, data, ckpt_path=ckpt_path)
    return made


def of(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"adapters.{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


# --- as if each were alone --------------------------------------------------------------------------------------------


def test_each_adapter_is_the_one_of_a_run_on_its_rows_alone(tmp_path):
    watch = Watch()
    run(tmp_path, watch, gradient_clip_val=0.5, max_epochs=2)
    for name, config in CONFIGS.items():
        own = []
        for batch in batches():
            rows = [index for index, row in enumerate(batch["adapter"]) if row == name]
            own += [{"x": batch["x"][rows], "y": batch["y"][rows]}] if rows else []
        alone = Watch(of(name, watch.steps[0]))
        tuning = GenLoRAFinetuning(config, save_adapter=False)
        trainer(tmp_path, tuning, alone, gradient_clip_val=0.5, max_epochs=2).fit(OfRows(), loader(own))
        together = of(name, watch.steps[-1])
        assert together.keys() == alone.steps[-1].keys()
        for key, value in alone.steps[-1].items():
            torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-6, msg=key)
        assert any(
            not torch.equal(value, alone.steps[0][key]) for key, value in alone.steps[-1].items() if " " not in key
        )


def test_adapter_without_rows_keeps_its_values_and_moments_in_every_bit(tmp_path):
    watch = Watch()
    run(tmp_path, watch, max_epochs=2)
    for step, rows in enumerate([*BATCHES, *BATCHES]):
        before, after = watch.steps[step : step + 2]
        for name in CONFIGS:
            here, there = of(name, before), of(name, after)
            same = here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
            assert same == (name not in rows), (step, name)


def test_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2}
    whole, rest = Watch(), Watch()
    for saved, place in ((SaveAt(tmp_path / "a.ckpt", 2), whole), (SaveAt(tmp_path / "b.ckpt", 5), Watch())):
        torch.manual_seed(1)
        run(tmp_path, saved, place, **settings)
    for file, batch in (("a.ckpt", 2), ("b.ckpt", 5)):
        rest = Watch()
        torch.manual_seed(2)
        run(tmp_path, rest, ckpt_path=tmp_path / file, **settings)
        assert rest.steps[0].keys() == whole.steps[batch].keys()
        assert all(torch.equal(value, whole.steps[batch][key]) for key, value in rest.steps[0].items())
        assert all(torch.equal(value, rest.steps[-1][key]) for key, value in whole.steps[-1].items())


class OfRank(Callback):
    """Gives each rank its rows of the global batch, before the adapters' callback sees it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.world_size > 1:
            half = slice(0, 2) if trainer.global_rank == 0 else slice(2, 4)
            for key, value in batch.items():
                batch[key] = value[half]
            if not len(batch["x"]):
                raise AssertionError("a rank without rows")


class Keep(Callback):
    """Writes what rank 0 and rank 1 have in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        state = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.timeout(120)
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_whose_rows_are_of_other_adapters_equal_one_process(tmp_path, accumulate):
    from lightning.pytorch.strategies import DDPStrategy

    rows = [  # the first two of each are rank 0's
        ["support", "support", "legal", "polar"],
        ["support", "legal", "support", "legal"],
        ["compacter", "compacter", "polar", "compacter"],
        ["legal", "legal", "legal", "legal"],
    ]
    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}

    class Half(OfRows):
        def step(self, batch):
            return super().step(batch) / len(batch["x"])  # so that the mean over ranks is that of the batch

    torch.manual_seed(5)
    watch = Watch()
    run(tmp_path, watch, Keep(tmp_path), module=Half(), data=loader(batches(rows)), **settings)
    single = torch.load(tmp_path / "rank0.pt")
    torch.manual_seed(5)
    ddp = DDPStrategy(start_method="fork", process_group_backend="gloo")
    tuning = GenLoRAFinetuning(adapters=CONFIGS, adapter_dir=str(tmp_path / "ddp"))
    several = trainer(
        tmp_path, OfRank(), tuning, Keep(tmp_path), devices=2, strategy=ddp, use_distributed_sampler=False, **settings
    )
    several.fit(Half(), loader(batches(rows)))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first.keys() == single.keys()
    for name, tensor in single.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-6, msg=name)
    for name in CONFIGS:
        assert any(
            not torch.equal(watch.steps[0][key], single[key]) for key in single if key.startswith(f"adapters.{name}.")
        )
        stored = read_adapter(tmp_path / "ddp" / name).tensors
        assert all(torch.equal(tensor, stored[key]) for key, tensor in of(name, first).items())
