"""Fine-tune any LightningModule with adapters: inject, watch, and save nothing but what is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.steps import hook_steps
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
from genlora_lightning.callbacks.figures import log_figures
from genlora_lightning.callbacks.log import rank_zero_logger
from genlora_lightning.callbacks.reading import ReadingTimes
from genlora_lightning.injection.peft_adapters import (
    AnyConfig,
    PeftAdapter,
    PeftConfigLike,
    put_adapters,
    read_any_config,
)
from genlora_lightning.injection.places import has_adapters
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.layers.quantized import keep_layout
from genlora_lightning.overrides import put_on, state_of, take_off
from genlora_lightning.storage.paths import local_path
from genlora_lightning.training.averaging import AveragedTraining
from genlora_lightning.training.checkpoint_io import install_atomic_checkpoints
from genlora_lightning.training.checks import (
    GradientWatch,
    check_adapters_act,
    check_optimizers_hold,
    prune_frozen,
    set_train_mode,
    trained_outside,
    warn_of_low_rates,
    warn_of_trained_outside,
)
from genlora_lightning.training.elastic import ElasticRanks
from genlora_lightning.training.lightning_internals import STRICT_LOADING
from genlora_lightning.training.named_adapters import NamedTraining, each_apart, read_adapters
from genlora_lightning.training.outcome import Outcome, planned_folder
from genlora_lightning.training.peft_support import check_not_shared, check_support
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
from genlora_lightning.training.run_folder import begin_run, check_not_taken, resume_run, run_folder
from genlora_lightning.training.snapshots import Snapshots
from genlora_lightning.training.step_generation import Generate, StepGeneration
from genlora_lightning.training.stops import RunWatch
from genlora_lightning.training.strategies import averaging_callbacks, check_strategy
from genlora_lightning.training.sync import AdapterSharding, AdapterSync, describe_timeout
from genlora_lightning.training.without_callback import load_without_callback

_log = rank_zero_logger(__name__)

load_without_callback()

_OVERRIDDEN = (
    "configure_model",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_train_start",
    "configure_gradient_clipping",
    "__getstate__",
    STRICT_LOADING,
)


class AdapterFinetuning(Callback):
    """Fine-tune a LightningModule with adapters: of this library, or of any kind that PEFT has.

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

    PEFT's adapters are put in by PEFT itself, into the only transformers model in there if there is one, which alone is
    frozen then; the folder at the end is PEFT's own, with our manifest beside it, and ``PeftModel.from_pretrained``
    loads it. Which kinds were tested under which strategy: :mod:`genlora_lightning.training.peft_support`.

    Args:
        config: What to adapt, and how: a :class:`~genlora_lightning.GenLoRAConfig`, a configuration of another kind,
            one of PEFT (``peft.LoraConfig``, ``peft.VeraConfig``, …), or a dictionary, in which ``kind`` says which
            (``{"kind": "peft", "peft_type": "VERA", "r": 64}``); GenLoRA's defaults if ``None``.
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
        adapters: Names of several adapters that are trained at once, all with ``config``; or names with a configuration
            each (``None``: ``config``). Each has its own parameters, optimizer state, clipping and folder,
            ``<adapter_dir>/<name>``; a step changes nothing of one that no row names. They are the module's
            ``adapters``, an :class:`~genlora_lightning.AdapterSet`. Batches are dictionaries with a list of names, one
            for each row, as ``"adapter"``, which is taken out of them before the module sees them; or the module
            computes in ``with self.adapters.using(rows=names)``. Linears alone, on one device or under DDP
            (``docs/several.md``).
        check_ranks_every_n_steps: How often to compare the adapters between the ranks, in every bit, beside the end of
            the run, where it is always done; 0: only there. To find a fault; it waits for the device.

    Raises:
        ValueError: From the trainer's run: given twice, a strategy it does not support, a configuration that does not
            fit the model, a checkpoint that does not.
        FileExistsError: ``adapter_dir`` holds the adapter of another run, or something else.
    """

    def __init__(
        self,
        config: AdapterConfig | PeftAdapter | PeftConfigLike | dict[str, Any] | None = None,
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
        adapters: Sequence[str] | Mapping[str, AnyConfig | PeftConfigLike | dict[str, Any] | None] | None = None,
    ) -> None:
        self.config = read_any_config(config)
        self.adapters = read_adapters(adapters, self.config)
        self._named = NamedTraining(self.adapters)
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
        self.reports: dict[str, InjectionReport] | None = None  # by the adapters' names; "" for one without
        self._outcome: Outcome | None = None
        self._watch: RunWatch | None = None
        self._gradient_watch = GradientWatch()
        self._times: ReadingTimes | None = None
        self._resume: Resume | None = None
        self._snapshots: Snapshots | None = None
        self._averaging: list[AveragedTraining] = []
        self._sync: AdapterSync | None = None
        self._untrained = False
        self._steps: StepGeneration | None = None
        self._elastic: ElasticRanks | None = None

    @property
    def report(self) -> InjectionReport | None:
        """What was adapted, trained in full, and left alone; of named adapters the first one's."""
        return next(iter((self.reports or {}).values()), None)

    # -- setting up -------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks = getattr(trainer, "callbacks", [])
        if sum(isinstance(callback, AdapterFinetuning) for callback in callbacks) > 1:
            raise ValueError(
                "The trainer has more than one GenLoRAFinetuning callback. Give one: either in the trainer's "
                "`callbacks`, or by the module's `adapter` argument."
            )
        check_strategy(trainer)
        if self.adapters:
            self._named.check(trainer, generate=self.generate)
        elif isinstance(self.config, PeftAdapter):
            check_support(self.config, trainer.strategy, self.adapter_sharding, generate=self.generate)
        averaging = averaging_callbacks(trainer.strategy, callbacks)
        self._sync = AdapterSync(trainer, self.adapter_sharding)
        install_atomic_checkpoints(trainer)
        self._unwrap(trainer, pl_module)  # left over if an earlier run with another trainer failed
        name_checkpoint_in_errors(trainer)
        self.reports = None
        self._outcome = None  # of an earlier run
        self._resume = None
        self._untrained = False
        self._wrap(trainer, pl_module)
        self._averaging = [AveragedTraining(callback) for callback in averaging]
        self._snapshots = Snapshots(trainer)
        keep_base_out_of_files(trainer)
        self._elastic = ElasticRanks(trainer, pl_module) if stage == "fit" else None
        if stage == "fit":
            use_resumable_loaders(trainer)
            self._outcome = Outcome(
                trainer,
                self._sync,
                adapter_dir=self.adapter_dir,
                overwrite=lambda: self.overwrite,
                wanted=self.save_adapter,
            )
            begin_run(trainer, goes_on=has_adapters(pl_module))
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
            note_start(pl_module, anew=self._untrained)
            _load_waiting_weights(trainer, pl_module)

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            # Here and not in the callback's own hook, which Lightning skips with `save_weights_only=True`.
            self._stop_if_spoiled(pl_module)
            original_save(checkpoint)
            write_content(trainer, pl_module, checkpoint)
            if self._elastic is not None:
                self._elastic.write(checkpoint[CHECKPOINT_KEY])

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
                if self._elastic is not None:
                    self._elastic.load(checkpoint[CHECKPOINT_KEY])
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
            for _ in each_apart(pl_module, optimizer) if self.adapters else [None]:
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
                _log.info(f"Took {pruned} frozen parameters out of the optimizer.")
            for optimizer in trainer.optimizers:
                hook_steps(pl_module, optimizer)
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
        resolve: Callable[[AnyConfig], AnyConfig] = getattr(pl_module, "resolve_adapter_config", lambda config: config)
        config = resolve(self.config)
        self._untrained = not has_adapters(pl_module)
        keep_layout(pl_module)
        if self.adapters:
            self.reports = self._named.put_in(pl_module, {name: resolve(one) for name, one in self.adapters.items()})
        else:
            self.reports = {"": put_adapters(adapter_root(pl_module, config), config)}
        outside = sum(parameter.numel() for parameter in trained_outside(pl_module).values())
        self.reports = {name: replace(report, trained_outside=outside) for name, report in self.reports.items()}
        waiting = weight_source(pl_module)
        if waiting is not None:
            waiting.start_trained()
        remember_base(pl_module, anew=self._untrained)
        if isinstance(config, PeftAdapter) and self._sync_of_run.shards_adapters:
            check_not_shared(pl_module)
        self._sync_of_run.equalize_and_shard(pl_module)

    @property
    def _outcome_of_run(self) -> Outcome:
        assert self._outcome is not None, "the callback's `setup` has not been called for a fit"
        return self._outcome

    @property
    def _sync_of_run(self) -> AdapterSync:
        assert self._sync is not None, "the callback's `setup` has not been called"
        return self._sync

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.reports is None or not has_adapters(pl_module):
            raise RuntimeError(
                "The adapters were not injected before fitting started: `configure_model` of "
                f"{type(pl_module).__name__} was not called. Do not replace `configure_model` on the instance."
            )
        check_adapters_act(pl_module)
        for name, report in self.reports.items():
            _log.info(f"Adapter {name}: {report.summary()}" if name else report.summary())
        self._gradient_watch = GradientWatch()
        self._outcome_of_run.begin()
        self._watch = RunWatch(trainer, self._sync_of_run, self._outcome_of_run, every=self.check_finite_every_n_steps)
        if not trainer.strategy.restore_checkpoint_after_setup:  # else nobody knows yet which run it is
            self._outcome_of_run.settle(pl_module)
        check_optimizers_hold(trainer.optimizers, pl_module)
        warn_of_low_rates(trainer.optimizers, pl_module)
        warn_of_trained_outside(pl_module)
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
        self._stop_if_spoiled(pl_module)
        if self._untrained and trainer.state.fn != "fit":
            rank_zero_warn(
                f"The adapters of this {type(pl_module).__name__} are new and untrained, and no `ckpt_path` is given: "
                "what follows is the base model's result. Give `ckpt_path`, or load the adapter first (`load_module`). "
                "Strategies that train in processes of their own (`ddp_spawn`, `ddp_fork`) leave the module in the "
                "main one untrained."
            )

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.adapters:
            self._named.begin_batch(pl_module, batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._named.end_batch()

    on_test_batch_end = on_validation_batch_end
    on_predict_batch_end = on_validation_batch_end

    def check_new_run(self, trainer: Trainer) -> None:
        """Find out, before anything is loaded or logged, that a new run would replace the adapter of another one.

        The trainer's ``fit`` finds it out, too, when the model is built and the loggers have opened their files.

        Raises:
            FileExistsError: It would, and ``overwrite`` is not set.
        """
        folder = planned_folder(trainer, run_folder(trainer), self.adapter_dir) if self.save_adapter else None
        if folder is not None:
            for name in self.adapters or [""]:
                check_not_taken(folder / name, "", overwrite=self.overwrite)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outcome_of_run.settle(pl_module)

    # -- while training ---------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outcome_of_run.settle(pl_module)
        if self.stop_if_diverged and self._watch is not None:
            self._watch.watch_loss(pl_module)
        if self._elastic is not None:
            self._elastic.begin()
        self._times = ReadingTimes(trainer)  # not earlier: a resumed run has its steps by now

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._elastic is not None:
            self._elastic.before_batch()
        if self._steps is not None:
            self._steps.before_batch()
        if self.adapters:
            self._named.begin_batch(pl_module, batch, training=True)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self.adapters:
            self._named.check_loss(loss)
        assert self._watch is not None
        self._watch.before_backward(loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._gradient_watch.after_backward()
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
        if not pl_module.automatic_optimization:  # it may call `loss.backward()`, which no hook sees
            self._gradient_watch.after_backward()
        warning = self._gradient_watch.check(pl_module, optimizer, self._sync_of_run.any_rank)
        if warning is not None:
            rank_zero_warn(warning)
        assert self._watch is not None
        self._watch.before_step(pl_module, optimizer)

    def _stop_if_spoiled(self, pl_module: LightningModule, *, at_the_end: bool = False) -> None:
        if self._watch is not None:
            self._watch.stop_if_spoiled(pl_module, at_the_end=at_the_end)

    # -- the end ----------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        assert self._times is not None
        assert self._watch is not None
        self._end_draw()
        self._named.end_batch()
        self._watch.after_batch(outputs)
        if self._times.due():
            self._stop_if_spoiled(pl_module)
        every = self.check_ranks_every_n_steps
        if every and trainer.global_step % every == 0:
            self._sync_of_run.compare(pl_module, f"After step {trainer.global_step}")

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_draw()  # where a batch was skipped
        self._named.end_batch()
        if self._steps is not None:  # left open where the epoch was cut short
            self._steps.end()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_spoiled(pl_module, at_the_end=True)
        self._sync_of_run.compare(pl_module, f"At the end, after step {trainer.global_step},")

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._outcome_of_run.save(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_draw()
        self._named.end_batch()
        hint = describe_timeout(trainer, exception)
        if hint is not None:
            print(hint, file=sys.stderr, flush=True)  # from whichever rank it is
        if self._outcome is not None and self._outcome.waits_for_error:
            step = trainer.global_step if self._watch is None else self._watch.last_good_step(pl_module)
            saved = self._outcome.save_after_error(pl_module, step=step)
            _log.info(f"Stopped at step {step}. {saved}")
        if self._steps is not None:  # a checkpoint may yet be written
            with suppress(RuntimeError):  # must not hide the error that is being handled
                self._steps.end()
        self._end_watch()
        self._unwrap(trainer, pl_module)

    def _end_draw(self) -> None:
        if self._elastic is not None:
            self._elastic.end()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_watch()
        self._unwrap(trainer, pl_module)


class GenLoRAFinetuning(AdapterFinetuning):
    """:class:`AdapterFinetuning` by its first name; their checkpoints and folders are the same."""


def _load_waiting_weights(trainer: Trainer, pl_module: LightningModule) -> None:
    """Read the base's weights, if the model was built without them; FSDP1 does it when it makes its units."""
    waiting = weight_source(pl_module)
    strategy = trainer.strategy
    if waiting is not None and isinstance(strategy, FSDPStrategy):
        strategy.kwargs["param_init_fn"] = waiting.for_fsdp1(strategy.root_device)
    elif waiting is not None:
        waiting.load(strategy.root_device)
