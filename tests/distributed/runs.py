"""Modules, data and strategies for comparing two ranks with one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.utils.data import DataLoader, TensorDataset

from genlora_lightning import CausalLMModule, GenLoRAFinetuning, OptimizerConfig
from genlora_lightning.backbone.architectures import enable_gradient_checkpointing
from genlora_lightning.distributed.shards import whole_tensors
from genlora_lightning.training.strategies import GenLoRAFSDPStrategy
from tests.conftest import small_config
from tests.models import tiny_llama
from tests.plain import PlainMLP, trainer

SHARDED = ("fsdp1", "fsdp2")
STRATEGIES = ("ddp", *SHARDED)
POLICIES = ("replicate", "shard")
CONFIG = {"modules_to_train": ["lm_head"]}


def strategy(kind: str) -> Strategy | str:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind == "ddp, unused":
        return DDPStrategy(process_group_backend="gloo", find_unused_parameters=True)
    if kind == "fsdp1":
        return GenLoRAFSDPStrategy()
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if kind == "fsdp2" else "auto"


class PlainLlama(PlainMLP):
    """A small decoder without dropout, in a module that knows nothing of adapters."""

    def __init__(self, build_in: str = "init", optimizer: str = "sgd", checkpointing: bool = False) -> None:
        self.optimizer, self.checkpointing = optimizer, checkpointing
        super().__init__(build_in)

    def build(self) -> None:
        with torch.random.fork_rng():
            self.net = tiny_llama(tie_word_embeddings=False)
        if self.checkpointing:
            enable_gradient_checkpointing(self.net)

    def step(self, batch: list[Tensor]) -> Tensor:
        assert self.net is not None
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        # A large eps: Adam makes steps of full length out of gradients that are nothing but rounding.
        return torch.optim.AdamW(self.parameters(), lr=2e-3, eps=1e-4, weight_decay=0.1)


def llama_loader(n: int = 48) -> DataLoader[Any]:
    ids = torch.randint(3, 64, (n, 6), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(ids), batch_size=4)


def mask_loader(n: int = 48) -> DataLoader[Any]:
    def collate(rows: list[tuple[Tensor]]) -> dict[str, Tensor]:
        ids = torch.stack([row[0] for row in rows])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    return DataLoader(llama_loader(n).dataset, batch_size=4, collate_fn=collate)


class Halves(Callback):
    """Gives each rank its half of the global batch, so that two ranks see what one process sees."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.world_size > 1:
            for key in range(len(batch)) if isinstance(batch, list) else list(batch):
                batch[key] = batch[key].chunk(2)[trainer.global_rank]


class Record(Callback):
    """What was trained, whole, and the mean of the ranks' losses of each batch."""

    def on_fit_start(self, trainer, pl_module):
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().double() * trainer.accumulate_grad_batches
        if trainer.world_size > 1:
            distributed.all_reduce(loss)
        self.losses.append(float(loss) / trainer.world_size)

    def on_train_end(self, trainer, pl_module):
        self.state = {name: tensor.detach().clone() for name, tensor in whole_tensors(pl_module).items()}


class SaveAt(Callback):
    """Saves after so many batches of the run."""

    def __init__(self, file: Path, batches: int) -> None:
        self.file, self.batches = file, batches

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.file)


class RankedSeed(Callback):
    """Lets the ranks draw different initial values, as a script without a common seed does."""

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(100 + trainer.global_rank)


def fit(
    kind: str,
    policy: str,
    folder: Path,
    module: LightningModule,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    loader: DataLoader[Any] | None = None,
    adapter: GenLoRAFinetuning | None = None,
    **settings: Any,
) -> Record:
    """One run, over ten or more steps unless told otherwise; the same adapters whatever the strategy."""
    record = Record()
    adapter = adapter or GenLoRAFinetuning(
        small_config(**CONFIG), adapter_sharding=policy, adapter_dir=str(folder / f"{kind}-{policy}")
    )
    settings = {"max_epochs": 1, "use_distributed_sampler": False, **settings}
    run = trainer(
        folder,
        RankedSeed(),
        adapter,
        Halves(),
        record,
        *callbacks,
        strategy=strategy(kind),
        devices=1 if kind == "single" else 2,
        **settings,
    )
    run.fit(module, loader or llama_loader(), ckpt_path=ckpt_path)
    record.trainer = run
    return record


def causal_lm(folder: Path) -> CausalLMModule:
    return CausalLMModule(
        str(folder / "model"), optimizer=OptimizerConfig(lr=2e-3, schedule="constant", eps=1e-4), dtype="float32"
    )


def tensors_of(folder: Path) -> dict[str, Any]:
    """What an adapter folder holds, without what differs from run to run."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: manifest[name] for name in ("base", "layers", "trained_modules")} | {
        "names": set(load_file(folder / "adapter_model.safetensors"))
    }
