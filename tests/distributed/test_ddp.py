"""Two gloo ranks on the CPU against one process on the same global batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from genlora_lightning import CausalLMModule, GenLoRAFinetuning, OptimizerConfig, load_adapter
from genlora_lightning.injection.state import adapter_state_dict
from genlora_lightning.training import finite
from tests.conftest import small_config
from tests.models import tiny_llama
from tests.plain import PlainEncoder, PlainMLP, encoder_loader, mlp_loader, trainer

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed"),
]


class Record(Callback):
    """Writes each rank's adapter, and its sampler's name, to a file when training ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = {name: tensor.clone() for name, tensor in adapter_state_dict(pl_module).items()}
        torch.save(state, self.folder / f"rank{trainer.global_rank}.pt")


class RankedSeed(Callback):
    """Lets the ranks draw different initial values, as a script without a common seed does."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        torch.manual_seed(100 + trainer.global_rank)


def ddp(folder: Path, *callbacks: Callback, **settings: object) -> Trainer:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    return trainer(
        folder, *callbacks, Record(folder), devices=2, strategy=strategy, use_distributed_sampler=False, **settings
    )


def ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


class Halves(Callback):
    """Gives each rank its half of the global batch, so that two ranks see what one process sees."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.world_size == 1:
            return
        items = batch if isinstance(batch, list) else list(batch.keys())
        for key in range(len(items)) if isinstance(batch, list) else items:
            batch[key] = batch[key].chunk(2)[trainer.global_rank]


@pytest.mark.parametrize("place", ["init", "configure_model"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_plain_module_on_two_ranks_equals_one_process(tmp_path, place, accumulate):
    config = small_config(exclude_modules=["4"])
    settings = {"max_epochs": 4, "accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    torch.manual_seed(100)  # what rank 0 draws below
    single = PlainMLP(place)
    torch.manual_seed(100)
    trainer(tmp_path, GenLoRAFinetuning(config, save_adapter=False), **settings).fit(single, mlp_loader())
    ddp(tmp_path, RankedSeed(), GenLoRAFinetuning(config), Halves(), **settings).fit(PlainMLP(place), mlp_loader())
    first, second = ranks(tmp_path)
    for name, tensor in adapter_state_dict(single).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-6)
    assert any(tensor.abs().max() > 0.01 for name, tensor in first.items() if name.endswith("update.B.latent"))
    saved = PlainMLP("init")
    load_adapter(saved, tmp_path / "adapter")
    assert all(torch.equal(t, first[name]) for name, t in adapter_state_dict(saved).items())


def test_plain_transformers_encoder_trains_on_two_ranks(tmp_path):
    config = small_config(modules_to_train=["classifier"])
    ddp(tmp_path, RankedSeed(), GenLoRAFinetuning(config), Halves(), max_epochs=2).fit(PlainEncoder(), encoder_loader())
    first, second = ranks(tmp_path)
    assert any("classifier" in name for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_run_on_two_ranks_resumes_to_the_uninterrupted_one_from_a_checkpoint_without_the_base(tmp_path):
    config = small_config(exclude_modules=["4"])
    for part, epochs in (("whole", 4), ("half", 2), ("rest", 4)):
        folder = tmp_path / part
        folder.mkdir()
        torch.manual_seed(7)
        saver = ModelCheckpoint(dirpath=tmp_path, filename=part)
        run = ddp(folder, GenLoRAFinetuning(config), Halves(), saver, max_epochs=epochs, enable_checkpointing=True)
        run.fit(PlainMLP(), mlp_loader(), ckpt_path=tmp_path / "half.ckpt" if part == "rest" else None)
    whole, rest = ranks(tmp_path / "whole")[0], ranks(tmp_path / "rest")[0]
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(whole)
    for name, tensor in whole.items():
        assert torch.equal(tensor, rest[name]), name


class StopAt(Callback):
    """Saves after so many batches and ends the run."""

    def __init__(self, file: Path, batches: int) -> None:
        self.file, self.batches = file, batches

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.file)


class Dropping(PlainMLP):
    def build(self):
        super().build()
        self.net.insert(2, torch.nn.Dropout(0.3))


@pytest.mark.parametrize(
    ("batches", "accumulate", "generate"), [(3, 1, "forward"), (5, 2, "forward"), (6, 3, "forward"), (6, 3, "step")]
)
def test_stop_inside_an_epoch_on_two_ranks_resumes_with_each_rank_s_own_randomness(
    tmp_path, batches, accumulate, generate
):
    config = small_config(exclude_modules=["5"], dropout=0.2)
    data = mlp_loader().dataset
    for part in ("whole", "rest"):
        folder = tmp_path / part
        folder.mkdir()
        run = ddp(
            folder,
            RankedSeed() if part == "whole" else Callback(),
            GenLoRAFinetuning(config, generate=generate),
            StopAt(tmp_path / "half.ckpt", batches) if part == "whole" else Callback(),
            max_epochs=2,
            accumulate_grad_batches=accumulate,
        )
        loader = DataLoader(data, batch_size=8, shuffle=True)
        run.fit(Dropping(), loader, ckpt_path=tmp_path / "half.ckpt" if part == "rest" else None)
    whole, rest = ranks(tmp_path / "whole"), ranks(tmp_path / "rest")
    for name, tensor in whole[0].items():
        assert torch.equal(rest[0][name], rest[1][name]), name
        if accumulate == 1:
            assert torch.equal(tensor, rest[0][name]), name
        else:  # the ranks' partial gradients are averaged when they are saved, which rounds them
            torch.testing.assert_close(tensor, rest[0][name], rtol=0, atol=1e-6)


def test_validation_after_a_fit_in_other_processes_says_that_the_module_here_is_untrained(tmp_path):
    config = small_config(exclude_modules=["4"])
    module = PlainMLP()
    ddp(tmp_path, GenLoRAFinetuning(config), max_epochs=2).fit(module, mlp_loader())
    alone = trainer(tmp_path, GenLoRAFinetuning(config))
    with pytest.warns(UserWarning, match=r"are new and untrained, and no `ckpt_path` is given.*`ddp_fork`"):
        (untrained,) = alone.validate(module, mlp_loader(), verbose=False)
    load_adapter(module, tmp_path / "adapter")
    (trained,) = alone.validate(module, mlp_loader(), verbose=False)
    assert trained["val_loss"] < untrained["val_loss"]


def unequal_loader() -> DataLoader:
    """Batches whose halves have very different numbers of answer tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (16, 8), generator=generator)
    labels = ids.clone()
    for row in range(16):
        labels[row, : 7 if row % 4 < 2 else 2] = -100
    data = TensorDataset(ids, torch.ones_like(ids), labels)

    def collate(rows):
        columns = (torch.stack(column) for column in zip(*rows, strict=True))
        return dict(zip(("input_ids", "attention_mask", "labels"), columns, strict=True))

    return DataLoader(data, batch_size=4, collate_fn=collate)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_causal_lm_weighs_tokens_equally_over_ranks_and_micro_batches(tmp_path, accumulate):
    tiny_llama().save_pretrained(tmp_path / "model")
    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}

    def module() -> CausalLMModule:
        optimizer = OptimizerConfig(lr=0.01, schedule="constant")
        return CausalLMModule(str(tmp_path / "model"), adapter=small_config(), optimizer=optimizer)

    torch.manual_seed(100)
    single = module()
    trainer(tmp_path, **settings).fit(single, unequal_loader())
    torch.manual_seed(100)
    ddp(tmp_path, Halves(), **settings).fit(module(), unequal_loader())
    first, second = ranks(tmp_path)
    for name, tensor in adapter_state_dict(single).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=5e-5)  # AdamW enlarges the last bits


@pytest.mark.parametrize("left_out_by_the_device", [False, True])
def test_nan_on_one_rank_stops_both_and_keeps_the_adapter(tmp_path, monkeypatch, left_out_by_the_device):
    class Fused(PlainMLP):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)

    monkeypatch.setattr(finite, "waits_to_read", lambda tensor: left_out_by_the_device)

    class Spoil(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2 and trainer.global_rank == 1:
                batch[0].fill_(float("nan"))

    config = small_config(exclude_modules=["4"])
    with pytest.raises(Exception, match="NaN or infinite at optimizer step 3"):
        ddp(tmp_path, GenLoRAFinetuning(config), Spoil(), max_epochs=2).fit(Fused(), mlp_loader())
    saved = PlainMLP()
    load_adapter(saved, tmp_path / "adapter-interrupted")
    assert all(t.isfinite().all() for t in adapter_state_dict(saved).values())
