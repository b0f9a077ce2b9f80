"""A training step does not wait for the device but where the trainer logs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from genlora_lightning import GenLoRAFinetuning
from genlora_lightning.callbacks.progress import LineProgressBar, TerminalProgressBar
from genlora_lightning.callbacks.throughput import TokensPerSecond
from genlora_lightning.modules import CausalLMModule, GenLoRAModule, SequenceClassificationModule
from genlora_lightning.training import finite
from tests.conftest import small_config
from tests.models import tiny_bert, tiny_llama
from tests.waits import Waits, record_waits

# transformers reads in each forward whether the attention mask has padding, to choose a kernel.
OF_TRANSFORMERS = ("transformers/masking_utils.py", "transformers/modeling_attn_mask_utils.py")
EVERY = 4
STEPS = 12
ANSWERS = [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0, 0]]


def token_batch() -> dict[str, torch.Tensor]:
    mask = torch.tensor(ANSWERS)
    ids = torch.randint(3, 64, mask.shape) * mask
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def class_batch() -> dict[str, torch.Tensor]:
    return {**token_batch(), "labels": torch.tensor([0, 2, 1])}


class TinyCausal(CausalLMModule):
    def load_backbone(self) -> torch.nn.Module:
        return tiny_llama(attn_implementation="eager")


class TinyClassifier(SequenceClassificationModule):
    def load_backbone(self) -> torch.nn.Module:
        model = tiny_bert()
        self._find_trained_modules(model, [])
        return model


def causal() -> tuple[GenLoRAModule, list[dict[str, torch.Tensor]]]:
    return TinyCausal("made here"), [token_batch() for _ in range(STEPS)]


def classifier() -> tuple[GenLoRAModule, list[dict[str, torch.Tensor]]]:
    return TinyClassifier("made here", num_labels=3), [class_batch() for _ in range(STEPS)]


class BetweenLogs(Callback):
    """Enters a context for each optimizer step but the first, whose gradients are looked at, and those that log."""

    def __init__(self, enter: Callable[[], Any]) -> None:
        self.enter = enter
        self.stack = ExitStack()
        self.batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.stack.close()
        if trainer.global_step > 0 and (trainer.global_step + 1) % EVERY:
            self.stack.enter_context(self.enter())
            self.batches += 1

    def on_train_epoch_end(self, *_: Any) -> None:
        self.stack.close()

    on_exception = on_train_epoch_end


def fit(
    root: Path,
    module: GenLoRAModule,
    batches: list[Any],
    enter: Callable[[], Any],
    accumulate: int = 1,
    **settings: Any,
) -> BetweenLogs:
    between = BetweenLogs(enter)
    finetuning = GenLoRAFinetuning(small_config(), generate="step" if accumulate > 1 else "forward", save_adapter=False)
    bar = settings.pop("bar", None) or LineProgressBar(every_fraction=10.0)
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": root,
            "logger": CSVLogger(root),
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "max_epochs": 1,
            "log_every_n_steps": EVERY,
            "accumulate_grad_batches": accumulate,
            "gradient_clip_val": 1.0,
            **settings,
        },
        callbacks=[finetuning, TokensPerSecond(), bar, between],
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return between


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [causal, classifier])
def test_no_step_between_logs_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], accumulate: int
) -> None:
    monkeypatch.setattr(finite, "waits_to_read", lambda tensor: True)  # as on a GPU
    waits: list[Waits] = []

    class Recording(ExitStack):
        def __enter__(self) -> Any:
            waits.append(self.enter_context(record_waits(ignored=OF_TRANSFORMERS)))
            return self

    between = fit(tmp_path, *make(), Recording, accumulate)
    assert between.batches == len(waits) == {1: 8, 2: 8}[accumulate]
    assert [found for recorded in waits for found in recorded.found] == []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_terminal_bar_reads_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("genlora_lightning.callbacks.progress.time.monotonic", lambda: clock[0])
    readings: list[float] = []

    class Recording(ExitStack):
        def __enter__(self) -> Any:
            clock[0] += 0.4
            waits = self.enter_context(record_waits())
            self.callback(lambda: readings.extend([clock[0]] if any("progress.py" in f for f in waits.found) else []))
            return self

    fit(tmp_path, *causal(), Recording, bar=TerminalProgressBar())
    assert len(readings) in (2, 3)  # 8 steps of 0.4 s are recorded
    assert all(later - earlier >= 1.0 for earlier, later in pairwise(readings))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_no_step_of_two_ranks_has_a_barrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barriers: list[int] = []
    original = torch.distributed.barrier

    def barrier(*args: Any, **kwargs: Any) -> Any:
        barriers.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.distributed, "barrier", barrier)

    class Counting(ExitStack):
        def __enter__(self) -> Any:
            barriers.clear()
            self.callback(lambda: (tmp_path / "seen").open("a").write(f"{len(barriers)}\n"))
            return self

    settings = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    fit(tmp_path, *causal(), Counting, **settings)
    assert set((tmp_path / "seen").read_text().split()) == {"0"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_no_step_between_logs_synchronizes_a_gpu(tmp_path: Path) -> None:
    class Refusing(ExitStack):
        def __enter__(self) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            self.callback(torch.cuda.set_sync_debug_mode, "default")
            return self

    module, batches = causal()  # its eager attention asks nothing of the mask
    pinned = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
    assert fit(tmp_path, module, pinned, Refusing, accelerator="cuda").batches == 8


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x[0]),
        lambda x: bool((x > 0).any()),
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: (x.requires_grad_()[x > 0]).sum().backward(),
    ],
)
def test_recorder_sees_each_kind_of_wait_and_says_where(wait: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(3)
    with record_waits() as waits:
        wait(x)
    assert waits.found
    assert "test_waits.py" in waits.found[0]


def test_recorder_leaves_out_what_does_not_wait() -> None:
    x, index = torch.ones(3, requires_grad=True), torch.tensor([0, 2])
    with record_waits() as waits:
        x[index].sum().backward()
        torch.where(x > 0, x, 0.0).index_select(0, index)
        torch.full((), 3.0, device=x.device)
    assert waits.found == []
