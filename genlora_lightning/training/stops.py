"""Stop a run whose gradients are not finite, or whose loss diverges, with the last good weights saved."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from genlora_lightning.errors import DivergedError, NonFiniteGradientError
from genlora_lightning.training.divergence import Divergence, DivergenceWatch
from genlora_lightning.training.finite import FiniteWatch
from genlora_lightning.training.outcome import Outcome
from genlora_lightning.training.sync import AdapterSync


class RunWatch:
    """Watches gradients and loss of one fit.

    Args:
        trainer: Its trainer.
        sync: Tells of the other ranks.
        outcome: Saves what there is before an error is raised.
        every: How often gradients are checked, in optimizer steps; 0: never.
    """

    def __init__(self, trainer: Trainer, sync: AdapterSync, outcome: Outcome, *, every: int) -> None:
        self._trainer = trainer
        self._outcome = outcome
        self._every = every
        self._finite = FiniteWatch(trainer.strategy.root_device, sync.set_on_any_rank)
        self._divergence: DivergenceWatch | None = None
        self._last_loss: Tensor | None = None

    def watch_loss(self, module: LightningModule) -> None:
        """Watch the loss from here on."""
        self._divergence = DivergenceWatch(self._trainer, module)

    def before_backward(self, loss: Tensor) -> None:
        """Take the loss of a micro-batch, to tell of it if the gradient is not finite."""
        self._last_loss = loss.detach()

    def before_step(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Check the gradients of a step that is about to be made.

        Raises:
            NonFiniteGradientError: On all ranks.
        """
        trainer = self._trainer
        # With a gradient scaler (float16) overflows are expected, and the scaler skips the step by itself.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self._every and not scaled and trainer.global_step % self._every == 0:
            place = {
                "step": trainer.global_step + 1,
                "epoch": trainer.current_epoch,
                "batch": trainer.fit_loop.batch_idx,
            }
            if self._finite.check(optimizer, self._last_loss, **place):
                self._stop_if_not_finite(module)

    def after_batch(self, outputs: Any) -> None:
        """Take what ``training_step`` has returned."""
        if self._divergence is not None:
            self._divergence.after_batch(outputs)

    def stop_if_spoiled(self, module: LightningModule, *, at_the_end: bool = False) -> None:
        """Read what was found of gradients and loss; waits for the device. All ranks come here together.

        Raises:
            NonFiniteGradientError: A gradient was not finite.
            DivergedError: The loss has diverged.
        """
        self._stop_if_not_finite(module)
        found = self._divergence.read(at_the_end=at_the_end) if self._divergence is not None else None
        if found is not None:
            self._stop_diverged(module, found)

    def last_good_step(self, module: LightningModule) -> int:
        """How many steps the weights are of, where the last ones may have been left out and nobody knows it yet."""
        found = None
        with suppress(RuntimeError):  # a device that fails must not hide the error that is being handled
            found = self._finite.read(module)
        if found is None:
            return self._trainer.global_step
        rank_zero_warn(f"The gradient was NaN or infinite at step {found.step}; it and those after it were not made.")
        return found.step - 1

    def end(self) -> None:
        """Leave the optimizers as they were."""
        self._finite.end()

    def _stop_if_not_finite(self, module: LightningModule) -> None:
        """Read what the checks of the gradients have found; waits for the device. All ranks come here together."""
        trainer = self._trainer
        found = self._finite.read(module)
        # Gradients and not only the loss: after the reduction they are the same on all ranks, so that all ranks stop.
        if found is None:
            return
        first = f" ({found.names[0]} first)" if found.names else ""  # others see it if this rank has pieces
        # Not its value: a module may scale what it returns.
        loss = {None: "unknown", True: "finite", False: "not finite"}[found.loss_was_finite]
        later = "" if found.step > trainer.global_step else f", nor any after it until step {trainer.global_step}"
        saved = self._outcome.save_after_error(module, step=found.step - 1, on_all_ranks=True)
        trainer.strategy.barrier()  # the first rank that raises has the others killed, rank 0 in the middle of saving
        raise NonFiniteGradientError(
            f"The gradient is NaN or infinite at optimizer step {found.step}, epoch {found.epoch}, batch "
            f"{found.batch}, in {len(found.names)} tensors{first}; the last loss was {loss}. The step was not "
            f"made{later}: the weights are those before it. {saved} Lower the learning rate, set `gradient_clip_val`, "
            "or look at that batch."
        )

    def _stop_diverged(self, module: LightningModule, found: Divergence) -> NoReturn:
        assert self._divergence is not None
        best = self._divergence.restore_best()
        self._outcome.give_up()
        saved = (
            f"The weights are set back to step {best}, after which the loss was lowest. "
            + self._outcome.save_after_error(module, step=best, on_all_ranks=True)
            if best
            else "No adapter is saved, because it never was better than at the start."
        )
        self._trainer.strategy.barrier()  # as for gradients that are not finite
        groups = (group for optimizer in self._trainer.optimizers for group in optimizer.param_groups)
        rate = max(float(group.get("initial_lr", group["lr"])) for group in groups)  # the peak of a schedule
        raise DivergedError(
            f"The training diverges: the median loss of the {found.steps} steps until step {found.step} is "
            f"{found.level:.4g}, and {found.start:.4g} at the start. {saved} Lower the learning rate, which is "
            f"{rate:.3g}: try {rate / 10:.1g}. If this loss should rise, set `stop_if_diverged=False` of "
            "GenLoRAFinetuning."
        )
