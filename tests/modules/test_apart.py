"""Named adapters in the module for language models: each trains on the mean over its own tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from genlora_lightning import GenLoRAFinetuning, load_adapter
from genlora_lightning.data import InstructionDataModule
from genlora_lightning.modules import CausalLMModule
from genlora_lightning.training.optim import OptimizerConfig
from tests.conftest import small_config
from tests.modules.conftest import loader, text_batch

NAMES = ["one", "two"]


class Start(Callback):
    """Begins with given values, or remembers those that a run begins with."""

    def __init__(self, values: dict[str, Tensor] | None = None) -> None:
        self.values = values

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.values is None:
            self.values = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        for name, value in self.values.items():
            pl_module.get_parameter(name).data.copy_(value)


def lm(folder: str) -> CausalLMModule:
    # A large eps: Adam makes steps of full length out of gradients that are nothing but rounding.
    return CausalLMModule(folder, optimizer=OptimizerConfig(lr=0.01, schedule="constant", eps=1e-3))


def of(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by the names that they have where it is the only one."""
    prefix = f"adapters.{name}."
    return {f"model.{key.removeprefix(prefix)}": value for key, value in state.items() if key.startswith(prefix)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_adapter_is_trained_on_the_mean_over_its_own_tokens(
    make_trainer: Callable[..., Trainer], model_folders: dict[str, str], accumulate: int
) -> None:
    rows = [([3 + n], [10 + n, 11 + n, 12 + n][: 1 + n % 3]) for n in range(16)]
    names = [NAMES[n * n % 3 % 2] for n in range(16)]
    parts = [range(start, start + 4) for start in range(0, 16, 4)]
    mixed = [{**text_batch([rows[n] for n in part], 4), "adapter": [names[n] for n in part]} for part in parts]
    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    begun, together = Start(), lm(model_folders["llama"])
    tuning = GenLoRAFinetuning(small_config(), adapters=NAMES, save_adapter=False)
    trainer = make_trainer(callbacks=[tuning, begun], **settings)
    trainer.fit(together, loader(mixed))
    assert {"train_loss", "train_loss_one", "train_loss_two"} <= trainer.callback_metrics.keys()
    trained = {name: p.detach() for name, p in together.named_parameters()}
    for name in NAMES:
        own = [[n for n in part if names[n] == name] for part in parts]
        assert all(own)
        alone = lm(model_folders["llama"])
        callbacks = [GenLoRAFinetuning(small_config(), save_adapter=False), Start(of(name, begun.values or {}))]
        batches = [text_batch([rows[n] for n in part], 4) for part in own]
        make_trainer(callbacks=callbacks, **settings).fit(alone, loader(batches))
        expected = {key: p.detach() for key, p in alone.named_parameters() if p.requires_grad}
        assert expected.keys() == of(name, trained).keys()
        for key, value in of(name, trained).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
        assert any(not torch.equal(value, expected[key]) for key, value in of(name, begun.values or {}).items())


def test_records_name_their_adapter_from_the_training_to_the_answers(
    make_trainer: Callable[..., Trainer], model_folders: dict[str, str], tmp_path: Path
) -> None:
    answers = {"one": "w40", "two": "w50"}
    questions = [(f"w{3 + n}", name) for n in range(12) for name in NAMES]
    rows = [{"prompt": prompt, "completion": f" {answers[name]}", "for": name} for prompt, name in questions]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = model_folders["llama"]

    def run(epochs: int, checkpoint: str | None = None) -> tuple[CausalLMModule, Trainer, InstructionDataModule]:
        torch.manual_seed(1)
        module = CausalLMModule(
            folder,
            optimizer=OptimizerConfig(lr=0.05, schedule="constant"),
            generation={"max_new_tokens": 1},
        )
        data = InstructionDataModule(
            folder, str(file), val_file=str(file), test_file=str(file), chat_template="none", batch_size=8,
            adapter_field="for",
        )  # fmt: skip
        tuning = GenLoRAFinetuning(small_config(), adapters=NAMES, adapter_dir=str(tmp_path / "adapter"))
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        trainer = make_trainer(callbacks=[tuning, saver], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
        return module, trainer, data

    module, trainer, data = run(12)
    assert trainer.callback_metrics["val_token_accuracy"] == 1
    found = [row for batch in trainer.predict(module, datamodule=data) for row in batch]
    assert [row["generated"].strip() for row in found] == [answers[str(row["for"])] for row in rows]
    resumed, _, _ = run(12, str(tmp_path / "epoch=5.ckpt"))
    for name in NAMES:
        assert all(map(torch.equal, module.adapters.parameters_of(name), resumed.adapters.parameters_of(name)))
        alone = lm(folder)
        alone.configure_model()
        load_adapter(alone.adapter_root(), tmp_path / "adapter" / name)
        ids = torch.tensor([[3], [8]])
        with module.adapters.using(name):
            assert torch.equal(alone.model.eval()(ids).logits, module.model.eval()(ids).logits)
