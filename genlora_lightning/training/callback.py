"""Fine-tune any LightningModule with adapters: inject, watch, and save nothing but what is trained."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.artifacts.adapter_io import write_adapter
from genlora_lightning.artifacts.checkpoint import (
    CHECKPOINT_KEY,
    adapter_root,
    base_of,
    check_base,
    check_checkpoint,
    load_beside,
    remember_base,
    upgrade,
)
from genlora_lightning.artifacts.other_state import note_start
from genlora_lightning.backbone.identity import BaseCheck
from genlora_lightning.backbone.low_memory import weight_source
from genlora_lightning.callbacks.figures import FIGURES, log_figures
from genlora_lightning.callbacks.reading import ReadingTimes
from genlora_lightning.distributed.shards import whole_like
from genlora_lightning.errors import DivergedError, NonFiniteGradientError
from genlora_lightning.injection.inject import adapter_layers, inject_adapters
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.overrides import put_on, state_of, take_off
from genlora_lightning.storage.atomic import remove_leftovers
from genlora_lightning.storage.paths import local_path
from genlora_lightning.training.averaging import AveragedTraining
from genlora_lightning.training.checkpoint_io import install_atomic_checkpoints
from genlora_lightning.training.checks import (
    GradientWatch,
    check_optimizers_hold,
    check_writable,
    prune_frozen,
    set_train_mode,
    warn_of_low_rates,
)
from genlora_lightning.training.divergence import DivergenceWatch
from genlora_lightning.training.finite import FiniteWatch
from genlora_lightning.training.lightning_internals import STRICT_LOADING
from genlora_lightning.training.resume import (
    Resume,
    keep_base_out_of_files,
    name_checkpoint_in_errors,
    name_of_checkpoint,
    naming_checkpoint,
    release_loaders,
    release_restoring,
    use_resumable_loaders,
    write_content,
)
from genlora_lightning.training.run_folder import (
    begin_run,
    check_not_taken,
    free_folder,
    resume_run,
    run_folder,
    run_name,
)
from genlora_lightning.training.snapshots import Snapshots
from genlora_lightning.training.step_generation import Generate, StepGeneration
from genlora_lightning.training.strategies import averaging_callbacks, check_strategy
from genlora_lightning.training.sync import AdapterSharding, AdapterSync, describe_timeout

_OVERRIDDEN = (
    "configure_model",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_train_start",
    "configure_gradient_clipping",
    "__getstate__",
    STRICT_LOADING,
)


class GenLoRAFinetuning(Callback):
    """Fine-tune a LightningModule with generated low-rank adapters.

    Give it to the trainer; the module need not know of it. Before the optimizer is configured it freezes the model,
    injects the adapters and, when training starts, sets train mode (normalisation layers with frozen running
    statistics stay in evaluation mode: their statistics belong to the base, which is not saved). Checkpoints hold the
    adapters, what else is trained, and what is needed to resume; never the base. A run resumed with ``ckpt_path`` goes
    on as if it had not stopped, in the middle of an epoch and of gradient accumulation too: random states are restored,
    and plain data loaders of the training are replaced by :class:`ResumableDataLoader`. When fitting
    ends, or is interrupted, an adapter folder is written.

    What it checks: that the optimizer holds exactly the trainable parameters (frozen ones are taken out of it), that
    the first step brings a gradient to the adapters, and that every step's gradient is finite.

    The adapters go into ``pl_module.adapter_root()`` if the module has such a method
    (:class:`~genlora_lightning.GenLoRAModule` has), else into the whole LightningModule. If it has a method
    ``resolve_adapter_config(config)``, this may complete the configuration once the model is known.

    Args:
        config: What to adapt, and how, also as a dictionary; the defaults if ``None``.
        adapter_dir: Where to save the adapter folder when fitting ends, on a local disk; ``adapter`` beside the run's
            ``checkpoints`` if ``None`` (without a logger in ``default_root_dir``). After an error or Ctrl-C it is
            ``<adapter_dir>-interrupted``, so that a finished adapter is never replaced by an unfinished one.
        overwrite: Replace the adapter of another run that lies in ``adapter_dir``. If not, such a run ends with an
            error before it trains. A run that goes on (``ckpt_path``) replaces its own in any case.
        base_check: What to do with a checkpoint (``ckpt_path``) of another base: ``"error"``, ``"warn"``, or ``"off"``:
            do not look.
        save_adapter: Whether to save the folder. Checkpoints are Lightning's matter and not concerned.
        train_mode: Whether to set the module to train mode when fitting starts (``from_pretrained`` returns models in
            evaluation mode, in which their dropout does nothing).
        check_finite_every_n_steps: How often gradients are checked to be finite, in optimizer steps; 0: never. A step
            whose gradient is not finite is not made. On a GPU torch's fused Adam, AdamW and SGD (the modules' choice)
            leave it out by themselves, and all steps after it: the run stops at the next of the steps after which the
            trainer logs (``log_every_n_steps``), before a validation or a checkpoint, or at the end, with the last good
            weights. Elsewhere the run stops at once; with another optimizer on a GPU each check waits for the device.
        stop_if_diverged: Whether to stop a run with an error when its loss has risen far over where it started and
            stays there (how far: :class:`~genlora_lightning.training.divergence.LossCurve`), after setting the weights
            back to the best ones. It is looked at where gradients are read, and costs two copies of what is trained.
            Set it to ``False`` where a loss should rise (adversarial, policy gradients, a weight that grows); or give
            the module an attribute ``watched_loss``: the loss to look at, ``None`` for none.
        adapter_sharding: Where the base is sharded (FSDP1, FSDP2): ``"replicate"`` keeps the adapters whole on each
            rank and averages their gradients in one message per optimizer step; ``"shard"`` shards them, too. Modules
            trained in full are treated as the adapters are.
        generate: With ``accumulate_grad_batches`` greater than 1: ``"forward"`` generates the low-rank matrices in each
            micro-batch; ``"step"`` once for all micro-batches of an optimizer step, whose gradients go through the
            generator as one sum (under DDP once more for the last micro-batch). Losses and gradients are equal to
            rounding, also where a checkpoint inside of an accumulation window divides the sum. The adapters' parameters
            have no gradient before the last backward; those of the matrices, as large as a stored LoRA's, wait for it.
        check_ranks_every_n_steps: How often to compare the adapters between the ranks, in every bit, beside the end of
            the run, where it is always done; 0: only there. To find a fault; it waits for the device.

    Raises:
        ValueError: From the trainer's run: given twice, a strategy it does not support, a configuration that does not
            fit the model, a checkpoint that does not.
        FileExistsError: ``adapter_dir`` holds the adapter of another run, or something else.
    """

    def __init__(
        self,
        config: AdapterConfig | dict[str, Any] | None = None,
        *,
        adapter_dir: str | None = None,
        overwrite: bool = False,
        base_check: BaseCheck = "error",
        save_adapter: bool = True,
        train_mode: bool = True,
        check_finite_every_n_steps: int = 1,
        stop_if_diverged: bool = True,
        adapter_sharding: AdapterSharding = "replicate",
        check_ranks_every_n_steps: int = 0,
        generate: Generate = "forward",
    ) -> None:
        self.config = read_config(config)
        self.adapter_dir = None if adapter_dir is None else str(local_path(adapter_dir, "`adapter_dir`"))
        self.overwrite = overwrite
        if base_check not in get_args(BaseCheck):
            raise ValueError(f"`base_check` must be one of {get_args(BaseCheck)}, got {base_check!r}.")
        self.base_check: BaseCheck = base_check
        self.save_adapter = save_adapter
        self.train_mode = train_mode
        self.check_finite_every_n_steps = check_finite_every_n_steps
        self.stop_if_diverged = stop_if_diverged
        if adapter_sharding not in get_args(AdapterSharding):
            raise ValueError(
                f"`adapter_sharding` must be one of {get_args(AdapterSharding)}, got {adapter_sharding!r}."
            )
        self.adapter_sharding: AdapterSharding = adapter_sharding
        self.check_ranks_every_n_steps = check_ranks_every_n_steps
        if generate not in get_args(Generate):
            raise ValueError(f"`generate` must be one of {get_args(Generate)}, got {generate!r}.")
        self.generate: Generate = generate
        self.report: InjectionReport | None = None
        self._planned: Path | None = None  # where the adapter is to be saved ...
        self._folder: Path | None = None  # ... and may be
        self._settled = False
        self._saved_after_error = False
        self._gradient_watch = GradientWatch()
        self._finite: FiniteWatch | None = None
        self._divergence: DivergenceWatch | None = None
        self._times: ReadingTimes | None = None
        self._last_loss: Tensor | None = None
        self._resume: Resume | None = None
        self._snapshots: Snapshots | None = None
        self._averaging: list[AveragedTraining] = []
        self._sync: AdapterSync | None = None
        self._untrained = False
        self._steps: StepGeneration | None = None

    # -- setting up -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = getattr(trainer, "callbacks", [])
        if sum(isinstance(callback, GenLoRAFinetuning) for callback in callbacks) > 1:
            raise ValueError(
                "The trainer has more than one GenLoRAFinetuning callback. Give one: either in the trainer's "
                "`callbacks`, or by the module's `adapter` argument."
            )
        check_strategy(trainer)
        averaging = averaging_callbacks(trainer.strategy, callbacks)
        self._sync = AdapterSync(trainer, self.adapter_sharding)
        install_atomic_checkpoints(trainer)
        self._unwrap(trainer, pl_module)  # left over if an earlier run with another trainer failed
        name_checkpoint_in_errors(trainer)
        self.report = None
        self._folder = None  # of an earlier run
        self._settled = False
        self._resume = None
        self._untrained = False
        self._wrap(trainer, pl_module)
        self._averaging = [AveragedTraining(callback) for callback in averaging]
        self._snapshots = Snapshots(trainer)
        keep_base_out_of_files(trainer)
        if stage == "fit":
            use_resumable_loaders(trainer)
            # Loggers may know their version on the first rank only.
            self._planned = self._choose_folder(trainer, trainer.strategy.broadcast(run_folder(trainer)))
            begin_run(trainer, goes_on=bool(adapter_layers(pl_module)))
            self._prepare_when_optimizers_are_made(trainer.strategy, pl_module)

    def _wrap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Instance attributes, because the class is the user's. `functools.wraps` must not be used: Lightning looks
        # through `__wrapped__` and would find that the hook is not overridden.
        original_configure = pl_module.configure_model
        original_save = pl_module.on_save_checkpoint
        original_load = pl_module.on_load_checkpoint
        original_start = pl_module.on_train_start
        original_clipping = pl_module.configure_gradient_clipping
        original_state = pl_module.__getstate__

        def configure_model() -> None:
            original_configure()
            self._inject(pl_module)
            note_start(pl_module)
            _load_waiting_weights(trainer, pl_module)

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            # Here and not in the callback's own hook, which Lightning skips with `save_weights_only=True`.
            self._stop_if_spoiled(trainer, pl_module)
            original_save(checkpoint)
            write_content(trainer, pl_module, checkpoint)

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            upgrade(checkpoint)
            original_load(checkpoint)
            source = name_of_checkpoint(trainer)
            check_checkpoint(pl_module, checkpoint, source)
            check_base(checkpoint, base_of(pl_module), source, self.base_check)
            load_beside(pl_module, checkpoint, source)
            if self._snapshots is not None and self._snapshots.restoring:
                self._snapshots.load(pl_module, checkpoint)
                return
            self._untrained = False
            if trainer.state.fn == "fit":
                resume_run(trainer, checkpoint[CHECKPOINT_KEY].get("run"))
                self._resume = Resume(checkpoint, source)
                if trainer.strategy.restore_checkpoint_after_setup:  # with the optimizers there
                    self._resume.prepare(trainer, pl_module)

        def on_train_start() -> None:
            # After everybody else's, because the random state is restored here.
            original_start()
            # A finder's trial has callbacks of its own: the run itself has not started yet.
            if self._resume is not None and self in trainer.callbacks:  # type: ignore[attr-defined]
                with naming_checkpoint(trainer):
                    self._resume.start(trainer, pl_module)
                self._resume = None

        def configure_gradient_clipping(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            # Here gradients are reduced and have the module's scale, and are not clipped yet.
            log_figures(trainer, pl_module, optimizer)
            original_clipping(optimizer, *args, **kwargs)

        put_on(
            pl_module,
            configure_gradient_clipping=configure_gradient_clipping,
            configure_model=configure_model,
            on_save_checkpoint=on_save_checkpoint,
            on_load_checkpoint=on_load_checkpoint,
            on_train_start=on_train_start,
            # Copies and pickles of the module in the middle of a run are no part of this run.
            __getstate__=lambda: state_of(pl_module, original_state()),
            # Lightning must accept a checkpoint without the base; `check_checkpoint` is strict about all the rest.
            **{STRICT_LOADING: False},
        )

    def _prepare_when_optimizers_are_made(self, strategy: Strategy, pl_module: LightningModule) -> None:
        """Take frozen parameters out of the optimizers and set the mode before any callback saves or trains anything.

        Optimizer state refers to parameters by their place in the groups, and finders are called first of all.
        """
        original = strategy.setup_optimizers

        def setup_optimizers(trainer: Trainer) -> None:
            original(trainer)
            pruned = prune_frozen(trainer.optimizers)
            if pruned:
                rank_zero_info(f"Took {pruned} frozen parameters out of the optimizer.")
            if self.train_mode:
                set_train_mode(pl_module)

        put_on(strategy, setup_optimizers=setup_optimizers)

    def _unwrap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        take_off(pl_module, *_OVERRIDDEN)
        take_off(trainer.strategy, "setup_optimizers")
        release_loaders(trainer)
        release_restoring(trainer)
        if self._snapshots is not None:
            self._snapshots.end()
            self._snapshots = None
        for averaging in self._averaging:
            averaging.end()
        self._averaging = []

    def _inject(self, pl_module: LightningModule) -> None:
        resolve: Callable[[AdapterConfig], AdapterConfig] | None = getattr(pl_module, "resolve_adapter_config", None)
        config = resolve(self.config) if resolve is not None else self.config
        self._untrained = not adapter_layers(pl_module)
        self.report = inject_adapters(adapter_root(pl_module), config)
        waiting = weight_source(pl_module)
        if waiting is not None:
            waiting.start_trained()
        remember_base(pl_module, anew=self._untrained)
        self._sync_of_run.equalize_and_shard(pl_module)

    @property
    def _sync_of_run(self) -> AdapterSync:
        assert self._sync is not None, "the callback's `setup` has not been called"
        return self._sync

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.report is None or not adapter_layers(pl_module):
            raise RuntimeError(
                "The adapters were not injected before fitting started: `configure_model` of "
                f"{type(pl_module).__name__} was not called. Do not replace `configure_model` on the instance."
            )
        rank_zero_info(self.report.summary())
        self._gradient_watch = GradientWatch()
        self._finite = FiniteWatch(trainer.strategy.root_device, self._sync_of_run.set_on_any_rank)
        self._saved_after_error = False
        self._last_loss = None
        if not trainer.strategy.restore_checkpoint_after_setup:  # else nobody knows yet which run it is
            self._settle_folder(trainer, pl_module)
        check_optimizers_hold(trainer.optimizers, pl_module)
        warn_of_low_rates(trainer.optimizers, pl_module)
        self._sync_of_run.check_trainable(pl_module)
        if self._resume is not None:
            with naming_checkpoint(trainer):
                self._resume.prepare(trainer, pl_module)
        for averaging in self._averaging:
            averaging.start(trainer, pl_module)
        self._steps = None
        if self.generate == "step":
            self._steps = StepGeneration(trainer, pl_module, sharded=self._sync_of_run.shards_adapters)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_spoiled(trainer, pl_module)
        if self._untrained and trainer.state.fn != "fit":
            rank_zero_warn(
                f"The adapters of this {type(pl_module).__name__} are new and untrained, and no `ckpt_path` is given: "
                "what follows is the base model's result. Give `ckpt_path`, or load the adapter first (`load_module`). "
                "Strategies that train in processes of their own (`ddp_spawn`, `ddp_fork`) leave the module in the "
                "main one untrained."
            )

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def check_new_run(self, trainer: Trainer) -> None:
        """Find out, before anything is loaded or logged, that a new run would replace the adapter of another one.

        The trainer's ``fit`` finds it out, too, when the model is built and the loggers have opened their files.

        Raises:
            FileExistsError: It would, and ``overwrite`` is not set.
        """
        folder = self._choose_folder(trainer, run_folder(trainer))
        if folder is not None:
            check_not_taken(folder, "", overwrite=self.overwrite)

    def _choose_folder(self, trainer: Trainer, run: str) -> Path | None:
        if not self.save_adapter or getattr(trainer, "fast_dev_run", False):
            return None
        if self.adapter_dir is not None:
            return Path(self.adapter_dir)
        folder = os.path.join(run, "adapter")
        try:
            return local_path(folder, "adapter folder")
        except ValueError as error:
            raise ValueError(
                f"{error} Set `adapter_dir` to a local folder, or `save_adapter` to False: this run's checkpoints may "
                "be remote, and hold the adapters, too."
            ) from None

    def _settle_folder(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out before the training that the adapter cannot be saved, or would replace another run's; collective."""
        if self._settled:
            return
        self._settled = True
        problem: OSError | None = None
        if self._planned is not None and trainer.is_global_zero:
            try:
                check_writable(self._planned, needed=2 * _state_bytes(pl_module))
                check_not_taken(self._planned, run_name(trainer), overwrite=self.overwrite)
            except OSError as error:
                problem = error
            else:  # a run that was killed while it saved what it had does not save there again
                remove_leftovers(self._interrupted_folder(trainer, self._planned))
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise problem
        self._folder = self._planned

    def _interrupted_folder(self, trainer: Trainer, folder: Path) -> Path:
        """Where the adapter of a run that was stopped is saved, which has another folder for the one of its end."""
        place = folder.with_name(f"{folder.name}-interrupted")
        return free_folder(place, run_name(trainer), overwrite=self.overwrite)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle_folder(trainer, pl_module)

    # -- while training ---------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle_folder(trainer, pl_module)
        if self.stop_if_diverged:
            self._divergence = DivergenceWatch(trainer, pl_module)
        self._times = ReadingTimes(trainer)  # not earlier: a resumed run has its steps by now

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._steps is not None:
            self._steps.before_batch()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._last_loss = loss.detach()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps is not None:
            self._steps.after_backward()
        if not pl_module.automatic_optimization:  # it may clip before it steps
            for optimizer in trainer.optimizers:
                self._sync_of_run.reduce(optimizer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._steps is not None:
            self._steps.after_backward()  # of a micro-batch that had none, because its `training_step` gave no loss
        self._sync_of_run.reduce(optimizer)
        warning = self._gradient_watch.check(pl_module, optimizer, self._sync_of_run.any_rank)
        if warning is not None:
            rank_zero_warn(warning)
        # With a gradient scaler (float16) overflows are expected, and the scaler skips the step by itself.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        every = self.check_finite_every_n_steps
        if every and not scaled and trainer.global_step % every == 0:
            assert self._finite is not None
            place = {
                "step": trainer.global_step + 1,
                "epoch": trainer.current_epoch,
                "batch": trainer.fit_loop.batch_idx,
            }
            if self._finite.check(optimizer, self._last_loss, **place):
                self._stop_if_not_finite(trainer, pl_module)

    def _stop_if_not_finite(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what the checks of the gradients have found; waits for the device. All ranks come here together."""
        found = self._finite.read(pl_module) if self._finite is not None else None
        # Gradients and not only the loss: after the reduction they are the same on all ranks, so that all ranks stop.
        if found is None:
            return
        first = f" ({found.names[0]} first)" if found.names else ""  # others see it if this rank has pieces
        # Not its value: a module may scale what it returns.
        loss = {None: "unknown", True: "finite", False: "not finite"}[found.loss_was_finite]
        later = "" if found.step > trainer.global_step else f", nor any after it until step {trainer.global_step}"
        saved = self._save_after_error(trainer, pl_module, step=found.step - 1, on_all_ranks=True)
        trainer.strategy.barrier()  # the first rank that raises has the others killed, rank 0 in the middle of saving
        raise NonFiniteGradientError(
            f"The gradient is NaN or infinite at optimizer step {found.step}, epoch {found.epoch}, batch "
            f"{found.batch}, in {len(found.names)} tensors{first}; the last loss was {loss}. The step was not "
            f"made{later}: the weights are those before it. {saved} Lower the learning rate, set `gradient_clip_val`, "
            "or look at that batch."
        )

    def _stop_if_spoiled(self, trainer: Trainer, pl_module: LightningModule, *, at_the_end: bool = False) -> None:
        """Read what was found of gradients and loss; waits for the device. All ranks come here together."""
        self._stop_if_not_finite(trainer, pl_module)
        found = self._divergence.read(at_the_end=at_the_end) if self._divergence is not None else None
        if found is None:
            return
        assert self._divergence is not None
        best = self._divergence.restore_best()
        self._saved_after_error = True
        saved = (
            f"The weights are set back to step {best}, after which the loss was lowest. "
            + self._save_after_error(trainer, pl_module, step=best, on_all_ranks=True)
            if best
            else "No adapter is saved, because it never was better than at the start."
        )
        trainer.strategy.barrier()  # as for gradients that are not finite
        groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        rate = max(float(group.get("initial_lr", group["lr"])) for group in groups)  # the peak of a schedule
        raise DivergedError(
            f"The training diverges: the median loss of the {found.steps} steps until step {found.step} is "
            f"{found.level:.4g}, and {found.start:.4g} at the start. {saved} Lower the learning rate, which is "
            f"{rate:.3g}: try {rate / 10:.1g}. If this loss should rise, set `stop_if_diverged=False` of "
            "GenLoRAFinetuning."
        )

    # -- the end ----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        assert self._times is not None
        if self._divergence is not None:
            self._divergence.after_batch(outputs)
        if self._times.due():
            self._stop_if_spoiled(trainer, pl_module)
        every = self.check_ranks_every_n_steps
        if every and trainer.global_step % every == 0:
            self._sync_of_run.compare(pl_module, f"After step {trainer.global_step}")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._steps is not None:  # left open where the epoch was cut short
            self._steps.end()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_spoiled(trainer, pl_module, at_the_end=True)
        self._sync_of_run.compare(pl_module, f"At the end, after step {trainer.global_step},")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._folder is None or not (trainer.is_global_zero or self._sync_of_run.shards_adapters):
            return
        content = self._sync_of_run.record(pl_module)
        if not trainer.is_global_zero:
            return
        place = free_folder(self._folder, run_name(trainer), overwrite=self.overwrite)
        if place != self._folder:
            rank_zero_warn(f"Another run has saved its adapter in {self._folder} meanwhile; it is left as it is.")
        try:
            folder = write_adapter(content, place, training=_facts(trainer, trainer.global_step))
        except OSError as error:
            # Hours of training must not end in a full disk: any other place is better than none.
            rank_zero_warn(str(error))
            folder = write_adapter(content, _spare_folder(), training=_facts(trainer, trainer.global_step))
        rank_zero_info(f"The adapter is saved in {folder}.")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        hint = describe_timeout(trainer, exception)
        if hint is not None:
            print(hint, file=sys.stderr, flush=True)  # from whichever rank it is
        if self._folder is not None and trainer.state.fn == "fit" and not self._saved_after_error:
            step = self._last_good_step(trainer, pl_module)
            saved = self._save_after_error(trainer, pl_module, step=step)
            rank_zero_info(f"Stopped at step {step}. {saved}")
        if self._steps is not None:  # a checkpoint may yet be written
            with suppress(RuntimeError):  # must not hide the error that is being handled
                self._steps.end()
        self._end_watch()
        self._unwrap(trainer, pl_module)

    def _last_good_step(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """How many steps the weights are of, where the last ones may have been left out and nobody knows it yet."""
        found = None
        with suppress(RuntimeError):  # a device that fails must not hide the error that is being handled
            found = self._finite.read(pl_module) if self._finite is not None else None
        if found is None:
            return trainer.global_step
        rank_zero_warn(f"The gradient was NaN or infinite at step {found.step}; it and those after it were not made.")
        return found.step - 1

    def _end_watch(self) -> None:
        if self._finite is not None:
            self._finite.end()
            self._finite = None
        self._divergence = None

    def _save_after_error(
        self, trainer: Trainer, pl_module: LightningModule, *, step: int, on_all_ranks: bool = False
    ) -> str:
        """Save what there is, without hiding the error that is being handled; returns a sentence on what was done."""
        self._saved_after_error = True
        if self._folder is None:
            return "No adapter was saved (`save_adapter` is off)."
        if step == 0:
            return "No step had been made, so there is no adapter to save."
        if self._sync_of_run.shards_adapters and not on_all_ranks:
            return "The adapter lies in pieces on several ranks and was not saved; go on from the last checkpoint."
        if not (trainer.is_global_zero or self._sync_of_run.shards_adapters):
            return "The adapter is saved by rank 0."
        content = self._sync_of_run.record(pl_module)
        if not trainer.is_global_zero:
            return "The adapter is saved by rank 0."
        problems = []
        for choose in (partial(self._interrupted_folder, trainer, self._folder), _spare_folder):
            place = choose()
            try:
                write_adapter(content, place, training=_facts(trainer, step))
            except (OSError, ValueError) as error:
                problems.append(str(error))
            else:
                return f"The adapter after {step} steps is saved in {place}."
        return f"The adapter could not be saved: {' '.join(problems)}"

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_watch()
        self._unwrap(trainer, pl_module)


def _load_waiting_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Read the base's weights, if the model was built without them; FSDP1 does it when it makes its units."""
    waiting = weight_source(pl_module)
    strategy = trainer.strategy
    if waiting is not None and isinstance(strategy, FSDPStrategy):
        strategy.kwargs["param_init_fn"] = waiting.for_fsdp1(strategy.root_device)
    elif waiting is not None:
        waiting.load(strategy.root_device)


def _state_bytes(pl_module: LightningModule) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in whole_like(pl_module).values())


def _spare_folder() -> Path:
    """A folder that is not there yet, so that nothing is left if it is not written."""
    return Path(tempfile.gettempdir(), f"genlora-adapter-{secrets.token_hex(4)}")


def _facts(trainer: Trainer, step: int) -> dict[str, Any]:
    logged = {name: value for name, value in trainer.callback_metrics.items() if name not in FIGURES}
    metrics = {name: float(value) for name, value in logged.items() if value.numel() == 1}
    return {
        "run": run_name(trainer),
        "global_step": step,
        "epoch": trainer.current_epoch,
        "metrics": {name: value for name, value in metrics.items() if value == value and abs(value) != float("inf")},
    }
