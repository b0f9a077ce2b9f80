"""Load checkpoints of runs with adapters where there is no callback of ours to do it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from genlora_lightning.artifacts.checkpoint import CHECKPOINT_KEY, upgrade
from genlora_lightning.artifacts.loading import load_checkpoint
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.training.lightning_internals import trainer_or_none

_log = rank_zero_logger(__name__)


def load_without_callback() -> None:
    """Give ``LightningModule`` an ``on_load_checkpoint`` that knows our checkpoints; others it leaves alone.

    Without the callback Lightning would ask for the base's weights, which our checkpoints do not hold. The method is
    that of the class: ``Trainer().validate(module, ckpt_path=…)`` and ``load_from_checkpoint`` ask nobody else.
    """
    LightningModule.on_load_checkpoint = _on_load_checkpoint  # type: ignore[method-assign, assignment]


def _on_load_checkpoint(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Put the adapters of a checkpoint into the module, which had none or these, and give Lightning a full state dict.

    Raises:
        ValueError: The run is a fit, or its strategy has sharded the model before; or the checkpoint does not fit.
    """
    is_ours = "on_load_checkpoint" in vars(module)  # the callback's, which comes here by the module's own
    if is_ours or CHECKPOINT_KEY not in checkpoint:
        return
    trainer = trainer_or_none(module)
    source = f"The checkpoint {(trainer and trainer.ckpt_path) or ''}".rstrip()
    if trainer is not None and (trainer.state.fn == "fit" or trainer.strategy.restore_checkpoint_after_setup):
        raise ValueError(
            f"{source} holds adapters only. To go on from it give the trainer the callback that it was written with: "
            "Trainer(callbacks=[GenLoRAFinetuning(config)])."
        )
    upgrade(checkpoint)
    load_checkpoint(module, checkpoint, source)
    checkpoint["state_dict"] = module.state_dict()
    _log.info(f"{source} holds adapters only; they were put into the module.")
