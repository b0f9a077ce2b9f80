"""Name what is private in Lightning and used here: the one file to read when Lightning changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.strategies.fsdp import (
    _move_torchmetrics_to_device as move_torchmetrics_to_device,
)
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol as is_local_file_protocol
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from genlora_lightning.overrides import put_on, take_off

__all__ = [
    "RESTORING",
    "STRICT_LOADING",
    "averaged_model",
    "checkpoint_connector",
    "count_step",
    "drop_averaged_model",
    "end_restart",
    "fetch_anew",
    "fetch_at_epoch_start",
    "find_unused_parameters",
    "hooks_that_log",
    "is_local_file_protocol",
    "move_torchmetrics_to_device",
    "own_precision_plugin",
    "pending_resume",
    "set_up_activation_checkpointing",
    "should_accumulate",
    "skip_step_end",
    "tensor_parallel_size",
    "trainer_or_none",
    "validation_is_due",
]

# The attribute behind a module's `strict_loading`, which can be read and set but not unset.
STRICT_LOADING = "_strict_loading"


def trainer_or_none(module: LightningModule) -> Trainer | None:
    """The trainer that runs a module, or ``None``; ``module.trainer`` raises an error then."""
    return module._trainer


def averaged_model(callback: Any) -> Any:
    """The ``AveragedModel`` of a ``WeightAveraging`` callback."""
    return callback._average_model


def drop_averaged_model(callback: Any) -> None:
    """Have a ``WeightAveraging`` callback forget its average; it does nothing outside of a fit then."""
    callback._average_model = None


def checkpoint_connector(trainer: Trainer) -> Any:
    """What saves and loads a trainer's checkpoints; nobody but callbacks within a run calls its ``restore``."""
    return trainer._checkpoint_connector


# What the trainer has a checkpoint connector do, one after another, to restore a run.
RESTORING = ("resume_start", "restore_model", "restore_datamodule", "restore_callbacks", "restore_training_state")


@contextmanager
def pending_resume(trainer: Trainer) -> Iterator[None]:
    """Context manager around the loading of a checkpoint: a resume that is not yet at its end goes on afterwards."""
    connector: Any = checkpoint_connector(trainer)
    before = connector._loaded_checkpoint, connector._ckpt_path
    try:
        yield
    finally:
        connector._loaded_checkpoint, connector._ckpt_path = before


def should_accumulate(trainer: Trainer) -> bool:
    """Whether the present micro-batch is not the last one of its optimizer step."""
    return trainer.fit_loop._should_accumulate()


def validation_is_due(loop: _FitLoop) -> bool:
    """Whether a validation follows the batch that was trained on last."""
    fetcher: Any = loop._data_fetcher
    return loop.epoch_loop._should_check_val_fx(fetcher)


def count_step(loop: _FitLoop) -> None:
    """Count a batch that made an optimizer step, which schedulers and loggers go by."""
    loop.epoch_loop._batches_that_stepped += 1


def end_restart(loop: _FitLoop) -> None:
    """Let the loop take the next epoch for an ordinary one, and not for the rest of one that was stopped."""
    loop._restarting = False


def tensor_parallel_size(strategy: ModelParallelStrategy) -> Any:
    """What the user gave as ``tensor_parallel_size``: a number or "auto"."""
    return strategy._tensor_parallel_size


def own_precision_plugin(strategy: FSDPStrategy) -> Any:
    """The precision plugin that a strategy was given, or ``None``."""
    return strategy._precision_plugin


def set_up_activation_checkpointing(strategy: FSDPStrategy, wrapper: nn.Module) -> None:
    """Checkpoint the activations of the modules that a strategy's ``activation_checkpointing_policy`` names."""
    _setup_activation_checkpointing(wrapper, strategy._activation_checkpointing_kwargs)


def find_unused_parameters(strategy: DDPStrategy) -> None:
    """Have DDP, which is yet to wrap the module, expect parameters without a gradient.

    Raises:
        ValueError: It was told that each step uses the same ones.
    """
    if strategy._ddp_kwargs.get("static_graph"):
        raise ValueError(
            "`static_graph=True` of DDPStrategy says that all batches use the same parameters: leave it out."
        )
    strategy._ddp_kwargs["find_unused_parameters"] = True


def hooks_that_log(trainer: Trainer, name: str) -> set[str]:
    """The hooks in which a metric of the training has been logged, by its name or that of its values at each step."""
    results = trainer.fit_loop.epoch_loop._results.values()
    return {item.meta.fx for item in results if item.meta.name in (name, name.removesuffix("_step"))}


def skip_step_end(loop: _FitLoop) -> None:
    """Have a restarting loop count and tell schedulers nothing of the step before, beside a validation due then."""
    epoch_loop: Any = loop.epoch_loop
    original = epoch_loop.update_lr_schedulers

    def update_lr_schedulers(interval: str, update_plateau_schedulers: bool) -> None:
        take_off(epoch_loop, "update_lr_schedulers")
        if not update_plateau_schedulers:  # that of another step
            original(interval, update_plateau_schedulers)
        elif not epoch_loop._should_accumulate():
            epoch_loop._batches_that_stepped -= 1  # is counted next

    put_on(epoch_loop, update_lr_schedulers=update_lr_schedulers)


def fetch_at_epoch_start(loop: _FitLoop) -> None:
    """Have a resumed loop fetch the first batch when its epoch begins, which others than the first one do."""
    loop._resuming_from_checkpoint = False


def fetch_anew(trainer: Trainer) -> None:
    """Let go of the training batches that the trainer has fetched ahead, and of the iterator that they came from."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)
