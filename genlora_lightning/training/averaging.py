"""Let Lightning's ``WeightAveraging`` average what is trained, in place of a copy of the whole module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from genlora_lightning.artifacts.checkpoint import pack
from genlora_lightning.distributed.shards import plain_name, plain_parameters, trained_tensors
from genlora_lightning.overrides import put_on, take_off
from genlora_lightning.training.lightning_internals import averaged_model, drop_averaged_model

_GIVEN_THE_TRAINED = (
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
)
_CURRENT, _AVERAGING = "current_model_state", "averaging_state"  # WeightAveraging's own


class _Trained(LightningModule):
    """What is trained of a module, sharing its memory; names are numbers, because those of parameters have no dots."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        own = plain_parameters(module)
        self.names: list[str] = []
        for name, tensor in trained_tensors(module).items():
            number = str(len(self.names))
            if name in own:
                self.register_parameter(number, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(number, tensor)
            self.names.append(name)
        self.to(module.device)


def _nothing(*_: Any, **__: Any) -> None:
    """In place of a setup that would copy the whole module."""


class AveragedTraining:
    """Makes one ``WeightAveraging`` callback work on what is trained only.

    Its hooks are called with a module that has nothing else. Checkpoints hold the average as what is trained, which is
    what ``load_module`` gives, and the weights that training goes on with beside it.

    Args:
        callback: The trainer's callback.
    """

    def __init__(self, callback: Any) -> None:
        self._callback = callback
        self._trained: _Trained | None = None
        self._waiting: dict[str, Any] | None = None
        self._loop: Any = None
        self._left = False  # whether the module has got the average
        self.end()  # left over if an earlier run failed; and it may have copied the whole module already
        self._setup, self._save, self._leave = callback.setup, callback.on_save_checkpoint, callback.on_train_end
        hooks = {name: self._with_trained(getattr(callback, name)) for name in _GIVEN_THE_TRAINED}
        put_on(
            callback,
            setup=_nothing,
            on_save_checkpoint=self._on_save_checkpoint,
            on_load_checkpoint=self._on_load_checkpoint,
            on_train_end=self._on_train_end,
            **hooks,
        )

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Begin with the average, once the weights are on their device and a checkpoint is loaded."""
        self._trained = _Trained(module)
        self._setup(trainer, self._trained, "fit")
        if self._waiting is not None:
            self._load_average(self._waiting)
        self._loop = trainer.fit_loop
        put_on(self._loop, run=self._leaving_average(trainer, self._loop.run))

    def end(self) -> None:
        """Leave the callback as it was."""
        hooks = (*_GIVEN_THE_TRAINED, "setup", "on_save_checkpoint", "on_load_checkpoint", "on_train_end")
        take_off(self._callback, *hooks)
        if self._loop is not None:
            take_off(self._loop, "run")
        drop_averaged_model(self._callback)
        self._trained = self._waiting = self._loop = None

    def _with_trained(self, hook: Any) -> Any:
        def with_trained(trainer: Trainer, module: LightningModule, *args: Any, **kwargs: Any) -> None:
            if self._trained is not None:
                hook(trainer, self._trained, *args, **kwargs)

        return with_trained

    def _on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._trained is not None:
            self._leave(trainer, self._trained)
            self._left = True

    def _leaving_average(self, trainer: Trainer, run: Callable[[], None]) -> Callable[[], None]:
        # Lightning leaves `on_train_end` out where nothing is left to train. The module would be left with the weights
        # that the training would have gone on with, and the run's adapter folder be replaced by them. A finder's trial
        # has other callbacks.
        def run_and_leave_average() -> None:
            self._left = False
            run()
            if not self._left and self._callback in trainer.callbacks:  # type: ignore[attr-defined]
                self._on_train_end(trainer, trainer.lightning_module)

        return run_and_leave_average

    def _on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._trained is None:
            return
        names = self._trained.names
        self._save(trainer, self._trained, checkpoint)
        current: dict[str, Tensor] = {plain_name(name): tensor for name, tensor in checkpoint[_CURRENT].items()}
        average = {names[int(number)]: tensor for number, tensor in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = {**current, **average}
        checkpoint[_CURRENT] = pack({name: current[name] for name in names})

    def _on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit" or _CURRENT not in checkpoint:
            return
        average = {name: checkpoint["state_dict"][name].clone() for name in checkpoint[_CURRENT]}
        state = {"average": average, "rest": checkpoint[_AVERAGING]}
        with torch.no_grad():
            for name, tensor in trained_tensors(module).items():
                tensor.copy_(checkpoint[_CURRENT][name])
        if self._trained is None:
            self._waiting = state
        else:
            self._load_average(state)

    def _load_average(self, state: dict[str, Any]) -> None:
        assert self._trained is not None
        numbered = {f"module.{n}": state["average"][name] for n, name in enumerate(self._trained.names)}
        average: nn.Module = averaged_model(self._callback)
        average.load_state_dict({**numbered, **state["rest"]})
        self._waiting = None
