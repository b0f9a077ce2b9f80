"""Resume a run exactly: add to a checkpoint what Lightning leaves out, and restore it."""

from __future__ import annotations

import dis
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from genlora_lightning.artifacts.adapter_folder import stored_facts
from genlora_lightning.artifacts.checkpoint import CHECKPOINT_KEY, keep_adapters_only, numbered_state, pack
from genlora_lightning.distributed.collectives import mean_gradients
from genlora_lightning.distributed.shards import is_sharded, part_of, plain_parameters, whole_gradients
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.fields import shown
from genlora_lightning.injection.named import base_alone
from genlora_lightning.injection.places import has_adapters
from genlora_lightning.layers.accumulation import pass_gradients
from genlora_lightning.overrides import note, noted, put_on, take_off
from genlora_lightning.storage.paths import is_remote
from genlora_lightning.training.lightning_internals import (
    RESTORING,
    checkpoint_connector,
    count_step,
    end_restart,
    fetch_anew,
    fetch_at_epoch_start,
    hooks_that_log,
    should_accumulate,
    skip_step_end,
    validation_is_due,
)
from genlora_lightning.training.random_state import random_state, set_random_state
from genlora_lightning.training.resumable import (
    LATEST_FETCH,
    EndlessLoader,
    has_length,
    is_resumable,
    make_resumable,
    make_unnoticed,
)
from genlora_lightning.training.run_folder import run_name
from genlora_lightning.training.strategies import shards_base

RESUME_KEY = "resume"
_OWNER = "trainer whose files hold adapters only"
_Progress = dict[str, Any]
_COUNTS = ("ready", "started", "processed", "completed", "batches")
_PACKAGE = __name__.partition(".")[0]


def use_resumable_loaders(trainer: Trainer) -> None:
    """Let the strategy, which Lightning asks to process each data loader, make those of the training resumable.

    Those of the validation are kept from changing the training's random numbers, so that a run does not depend on how
    often it validates.
    """
    strategy = trainer.strategy
    original = strategy.process_dataloader

    def process_dataloader(dataloader: object) -> object:
        dataloader = original(dataloader)
        return make_resumable(dataloader) if trainer.training else make_unnoticed(dataloader)

    put_on(strategy, process_dataloader=process_dataloader)


def release_loaders(trainer: Trainer) -> None:
    """Undo :func:`use_resumable_loaders`."""
    take_off(trainer.strategy, "process_dataloader")


# -- saving -----------------------------------------------------------------------------------------------------------


def add_resume_state(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add to a checkpoint what Lightning leaves out: random states, loaders, and a half-filled accumulation window.

    With several processes this is a collective operation, like ``trainer.save_checkpoint`` itself.
    """
    if "optimizer_states" not in checkpoint:
        return
    loaders = _own_loaders(trainer)
    mine = {
        "random": random_state(trainer.strategy.root_device),
        "loaders": [loader.state_dict() for loader in loaders],
    }
    progress = checkpoint["loops"]["fit_loop"]
    checkpoint[CHECKPOINT_KEY][RESUME_KEY] = {
        "ranks": _gathered(trainer, mine),
        "gradients": _gradients(trainer, module, progress),
        "window": _window(trainer, module),
        "plateau": _plateau_metrics(trainer, progress),
        "monitors": _monitors(trainer, progress),
        "step_is_over": _step_is_over(trainer, progress),
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
    }
    if loaders and len(loaders) == len(progress["state_dict"].get("combined_loader", [])):
        del progress["state_dict"]["combined_loader"]  # it is ours, and now among the ranks' states


def _own_loaders(trainer: Trainer) -> list[Any]:
    return [loader for loader in tree_leaves(trainer.train_dataloader) if is_resumable(loader)]


def _gathered(trainer: Trainer, mine: dict[str, Any]) -> list[dict[str, Any]]:
    if trainer.world_size == 1:
        return [mine]
    ranks: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(ranks, mine)
    return ranks


def _mid_window(trainer: Trainer, progress: _Progress) -> bool:
    batches = progress["epoch_loop.batch_progress"]
    return (
        batches["current"]["processed"] % trainer.accumulate_grad_batches != 0
        and not batches["is_last_batch"]
        and trainer.lightning_module.automatic_optimization
    )


def _gradients(trainer: Trainer, module: LightningModule, progress: _Progress) -> dict[str, Tensor]:
    """The gradients that the next optimizer step will add to, the mean of the ranks' own; else none.

    Under manual optimization nobody but the module knows which these are, so that they are all kept.
    """
    if module.automatic_optimization and not _mid_window(trainer, progress):
        return {}
    pass_gradients(module)
    sharded = whole_gradients(module)  # of all ranks already
    parameters = {n: p for n, p in plain_parameters(module).items() if p.requires_grad and not is_sharded(p)}
    own = mean_gradients(parameters.values()) if trainer.world_size > 1 else [p.grad for p in parameters.values()]
    found = {name: grad for name, grad in zip(parameters, own, strict=True) if grad is not None}
    gradients: dict[str, Tensor] = pack({**found, **sharded})
    return gradients


def _window(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """What a module keeps of the accumulation window so far (``window_state``), the mean of the ranks' own."""
    find = getattr(module, "window_state", None)
    state: dict[str, Tensor] = {} if find is None else find()
    if trainer.world_size > 1:
        state = {name: trainer.strategy.reduce(t.double(), reduce_op="mean") for name, t in state.items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _plateau_metrics(trainer: Trainer, progress: _Progress) -> list[list[Any]]:
    """What ReduceLROnPlateau is about to be told: Lightning saves at the end of a step or epoch before it tells it."""
    if not trainer.lightning_module.automatic_optimization:  # the module tells it
        return []
    epoch = progress["epoch_progress"]["current"]
    batches = progress["epoch_loop.batch_progress"]
    before_the_end = epoch["processed"] == epoch["ready"] - 1 and batches["is_last_batch"] and _at_rest(batches)
    at_the_end = epoch["processed"] == epoch["ready"] == epoch["completed"] + 1 and batches["is_last_batch"]
    count = {}
    if before_the_end or at_the_end:
        count["epoch"] = trainer.current_epoch + 1
    if not _step_is_over(trainer, progress) and not should_accumulate(trainer):
        count["step"] = batches["current"]["ready"]
    return [
        [index, trainer.callback_metrics[config.monitor].detach().cpu().clone()]
        for index, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval in count
        and count[config.interval] % config.frequency == 0
        and config.monitor in trainer.callback_metrics
    ]


def _monitors(trainer: Trainer, progress: _Progress) -> dict[str, Any]:
    """The metrics that ReduceLROnPlateau monitors, as they are now: it may be told them long after they are logged.

    Those that are logged in a hook that may come after the present one are ``"late"``: what they are is not known yet.
    """
    plateaus = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    names = {config.monitor for config in plateaus if config.monitor is not None}
    at_step_end = not _at_rest(progress["epoch_loop.batch_progress"])
    late = [name for name in names if at_step_end and "on_train_batch_end" in hooks_that_log(trainer, name)]
    metrics = trainer.callback_metrics
    return {
        "values": {name: metrics[name].detach().cpu().clone() for name in sorted(names & set(metrics))},
        "late": sorted(late),
    }


def _step_is_over(trainer: Trainer, progress: _Progress) -> bool:
    """Whether schedulers have been told of the latest step, and it is counted: after a validation, if there is one."""
    in_validation = trainer.state.fn == "fit" and trainer.validating
    return _at_rest(progress["epoch_loop.batch_progress"]) and not in_validation


def _at_rest(batches: _Progress) -> bool:
    return bool(batches["current"]["completed"] == batches["current"]["processed"])


def write_content(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Turn what Lightning wants to save into what we save, in place; collective, like saving itself."""
    with base_alone(module):
        keep_adapters_only(module, checkpoint, trainer.optimizers, look_at_frozen=not shards_base(trainer.strategy))
        checkpoint[CHECKPOINT_KEY]["run"] = run_name(trainer)
        add_resume_state(trainer, module, checkpoint)


def keep_base_out_of_files(trainer: Trainer) -> None:
    """Have the strategy write adapters only, also after the run, when the module's hooks are its own again."""
    strategy = trainer.strategy
    mine = weakref.ref(trainer)  # which the strategy is not to keep
    known = noted(strategy, _OWNER) is not None
    note(strategy, _OWNER, mine)
    if known:
        return  # of an earlier trainer, if the user gave it the same strategy
    original = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        owner: Trainer | None = noted(strategy, _OWNER)()
        module = None if owner is None else owner.lightning_module
        if CHECKPOINT_KEY not in checkpoint and owner is not None and module is not None and has_adapters(module):
            write_content(owner, module, checkpoint)
        original(checkpoint, *args, **kwargs)

    put_on(strategy, save_checkpoint=save_checkpoint)


def _scheduled_accumulation(trainer: Trainer, epoch: int) -> int:
    """How many batches an optimizer step takes in an epoch."""
    found: int = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            found = callback.get_accumulate_grad_batches(epoch)
    return found


# -- resuming ---------------------------------------------------------------------------------------------------------


def name_of_checkpoint(trainer: Trainer) -> str:
    """The checkpoint that a trainer goes on from, for messages."""
    return f"The checkpoint {trainer.ckpt_path or ''}".rstrip()


@contextmanager
def naming_checkpoint(trainer: Trainer) -> Iterator[None]:
    """Context manager in which an error says from which checkpoint a run cannot go on, and the likely cause.

    What this package raises for the user says so itself. What Lightning, torch or a callback raise of what they are
    given to restore says neither.
    """
    try:
        yield
    except MisconfigurationException:  # Lightning's words for the user
        raise
    except Exception as error:
        if _is_adapter_folder(trainer.ckpt_path):
            raise ValueError(
                f"{trainer.ckpt_path}, given as `ckpt_path`, is an adapter folder and no checkpoint: it holds the "
                "adapter, and nothing of the run. Load it into the module first (`load_module`, `load_adapter`), and "
                "give no `ckpt_path`."
            ) from error
        if _is_meant(error) or isinstance(error, OSError):  # which says what file it could not read
            raise
        going_on = trainer.state.fn == "fit"
        others = "optimizers, schedulers, callbacks or data loaders" if going_on else "callbacks or another data module"
        raise ValueError(
            f"{name_of_checkpoint(trainer)} cannot be {'gone on from' if going_on else 'loaded'} "
            f"({type(error).__name__}: {error!s:.500}). It was probably written with other {others}, or by another "
            "release of Lightning; else it is damaged."
        ) from error


def _is_adapter_folder(path: Any) -> bool:
    return (
        path is not None and not is_remote(str(path)) and Path(path).is_dir() and stored_facts(Path(path)) is not None
    )


def _is_meant(error: Exception) -> bool:
    """Whether a ``raise`` statement of this package raised an error, and no expression in it and nobody else."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or str(place.tb_frame.f_globals.get("__name__")).partition(".")[0] != _PACKAGE:
        return False
    return place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def name_checkpoint_in_errors(trainer: Trainer) -> None:
    """Put :func:`naming_checkpoint` around all that a trainer does to restore a checkpoint."""
    connector = checkpoint_connector(trainer)
    put_on(connector, **{name: _naming(trainer, getattr(connector, name)) for name in RESTORING})


def release_restoring(trainer: Trainer) -> None:
    """Undo :func:`name_checkpoint_in_errors`."""
    take_off(checkpoint_connector(trainer), *RESTORING)


def _naming(trainer: Trainer, restore: Callable[..., None]) -> Callable[..., None]:
    def restore_naming(*args: Any, **kwargs: Any) -> None:
        with naming_checkpoint(trainer):
            restore(*args, **kwargs)

    return restore_naming


def _check_counts(source: str, value: Any, place: str) -> None:
    """Refuse counters that are none: with a negative one a run would not end."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value) if type(value) is list else ():
        here = f"{place}.{name}"
        if name not in _COUNTS:
            _check_counts(source, inner, here)
        elif type(inner) is not int or not 0 <= inner < 2**62:
            raise DamagedFileError(f"{source} is damaged: {here} must be a count, got {shown(inner)}.")


def _check_kind(name: str, state: dict[str, Any], optimizer: Optimizer, source: str) -> None:
    """Refuse the state of an optimizer of another kind, which would lack something in the first step."""
    here = type(optimizer).__name__
    settings = [
        {key for group in groups for key in group} - {"params", "param_names"}
        for groups in (state["param_groups"], optimizer.param_groups)
    ]
    if name != here and settings[0] != settings[1]:
        raise ValueError(
            f"{source} was written with the optimizer {name}, and this run has {here}, which cannot go on with its "
            f"state. Use {name} to resume, or load the checkpoint into the module (`load_module`) and start a new run."
        )


class Resume:
    """What is left to do of a resume between the loading of a checkpoint and the first batch.

    Args:
        checkpoint: What Lightning has loaded, and goes on to read the optimizers' and loops' state from: it is changed
            in place.
        source: The file, for messages.

    Raises:
        DamagedFileError: A counter in it is none.
    """

    def __init__(self, checkpoint: dict[str, Any], source: str) -> None:
        _check_counts(source, checkpoint.get("loops"), "loops")
        _check_counts(source, checkpoint[CHECKPOINT_KEY].get(RESUME_KEY), RESUME_KEY)
        self.checkpoint = checkpoint
        self.source = source
        self.state: dict[str, Any] = checkpoint[CHECKPOINT_KEY].get(RESUME_KEY, {})
        progress = checkpoint["loops"]["fit_loop"] if self.state and "loops" in checkpoint else {}
        self.before_the_first_batch = bool(progress) and not progress["epoch_loop.batch_progress"]["total"]["ready"]
        self.new_epoch = False
        self.epoch_is_over = False
        self.uncounted_step = 0

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Translate the optimizers' state and put the loops' counters right, before Lightning restores them."""
        if "optimizer_states" not in self.checkpoint:
            raise ValueError(
                f"{self.source} holds weights only (`save_weights_only=True`), and nothing of the run, which therefore "
                "cannot be gone on from there. Load it into the module first (`load_module`), and give no `ckpt_path`."
            )
        self.translate(trainer, module)
        if "loops" in self.checkpoint and self.state:
            progress = self.checkpoint["loops"]["fit_loop"]
            epoch = max(0, progress["epoch_progress"]["current"]["ready"] - 1)
            self._settle(progress, _scheduled_accumulation(trainer, epoch))
        self.checkpoint = {}

    def translate(self, trainer: Trainer, module: LightningModule) -> None:
        """Translate the optimizers' state, whose parameters have names, into what this run's optimizers load."""
        stored = self.checkpoint.get("optimizer_states", [])
        if len(stored) not in (0, len(trainer.optimizers)):
            raise ValueError(f"The checkpoint has {len(stored)} optimizers, this run {len(trainer.optimizers)}.")
        names = self.state.get("optimizers", [])
        for name, state, optimizer in zip(names, stored, trainer.optimizers, strict=False):
            _check_kind(name, state, optimizer, self.source)
        if stored:
            pairs = zip(stored, trainer.optimizers, strict=True)
            self.checkpoint["optimizer_states"] = [numbered_state(module, state, opt) for state, opt in pairs]

    def _settle(self, progress: _Progress, window: int) -> None:
        """Bring the counters into a form from which Lightning goes on as an uninterrupted run does.

        It restarts in one of several ways, some of which leave out the rest of the epoch (a checkpoint written after
        its last batch), or train it again (one written at its end, if the end of the run is given as ``max_steps``).
        """
        epoch, batches = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
        current = batches["current"]
        seen = current["processed"]
        late = not _at_rest(batches)  # written when a batch had ended, before what follows upon it
        unfinished = current["ready"] - seen  # written in the middle of a batch, because of an error
        for counters in (current, batches["total"]):
            counters["completed"] = counters["started"] = counters["ready"] = counters["processed"]
        if unfinished:
            batches["is_last_batch"] = False  # it is yet to be trained on
        if epoch["current"]["processed"] == epoch["current"]["ready"] and seen and not batches["is_last_batch"]:
            # The run's end stopped the epoch half-way, and Lightning has counted it as a whole one.
            for counters in (epoch["current"], epoch["total"]):
                counters["processed"] -= 1
                counters["completed"] = counters["processed"]
        if epoch["current"]["processed"] == epoch["current"]["ready"]:
            for counters in (epoch["current"], epoch["total"]):
                counters["completed"] = counters["processed"]
            self.new_epoch = True
        else:
            self.epoch_is_over = batches["is_last_batch"] and not late
            if late and not unfinished:
                self.uncounted_step = int(seen % window == 0 or batches["is_last_batch"])
                # If a validation is due after this batch, it has not been done: say so.
                validated = progress["epoch_loop.val_loop.batch_progress"]
                validated["current"] = dict.fromkeys(validated["current"], 0)
                validated["total"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        for rank in self.state["ranks"]:
            for loader in rank["loaders"]:
                if self.new_epoch:
                    if "before" in loader:  # of a stream, which goes on
                        loader["before"] += loader["batches"]
                    if epoch["current"]["processed"]:  # else the first batch of all is fetched before the first epoch
                        loader.pop(LATEST_FETCH, None)
                    loader["batches"] = 0
                elif len(rank["loaders"]) == 1:
                    loader["batches"] = seen  # what was trained on, if something was fetched ahead
                else:
                    loader["batches"] -= unfinished

    def start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore what the first batch depends on; the last thing before it."""
        loop = trainer.fit_loop
        if not self.new_epoch:  # inside of an epoch Lightning does not call the hook that sets it
            trainer.accumulate_grad_batches = _scheduled_accumulation(trainer, trainer.current_epoch)
        if self.new_epoch:
            loop.epoch_loop.restarting = False
        elif self.uncounted_step and not validation_is_due(loop):
            count_step(loop)  # else it is counted after the validation
        if not self.epoch_is_over:
            # Else schedulers that depend on a metric are left out at the end of the epoch. If the epoch is over but for
            # its end, then the metrics were those of the run before, and are given below.
            end_restart(loop)
        if not self.state:
            return
        self._tell_schedulers(trainer, module)
        self.restore_values(trainer, module)

    def _tell_schedulers(self, trainer: Trainer, module: LightningModule) -> None:
        """Do to ReduceLROnPlateau what the stopped run would have done next."""
        monitors = self.state.get("monitors", {"values": {}, "late": []})
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: value.to(device) for name, value in monitors["values"].items()})
        # Beside a validation Lightning does again all that follows upon a step.
        again = not self.new_epoch and validation_is_due(trainer.fit_loop)
        if again and self.state.get("step_is_over"):
            skip_step_end(trainer.fit_loop)
        for index, metric in self.state["plateau"]:
            config = trainer.lr_scheduler_configs[index]
            if config.interval == "step" and config.monitor in monitors["late"]:
                rank_zero_warn(
                    f"ReduceLROnPlateau is told at each step of {config.monitor!r}, which was logged in "
                    "`on_train_batch_end`, where the checkpoint was written, too. If it was logged afterwards, then "
                    "the scheduler is told the value of the step before: the learning rates may differ from those of "
                    "the run that was stopped. Log it in `training_step` to resume exactly."
                )
            if config.interval == "epoch" or not again:
                module.lr_scheduler_step(config.scheduler, metric)

    def restore_values(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore what the next batch depends on beside the loops: gradients, random states, the loaders' places."""
        if not self.state:
            return
        parameters = plain_parameters(module) if self.state["gradients"] else {}
        for name, gradient in self.state["gradients"].items():
            parameter = parameters[name]
            whole = gradient.to(parameter.device, parameter.dtype, copy=True)
            parameter.grad = part_of(whole, parameter)
        if self.state["window"]:
            device = module.device
            load: Any = module.load_window_state
            load({name: t.to(device) for name, t in self.state["window"].items()})
        ranks = self.state["ranks"]
        if trainer.global_rank < len(ranks):
            mine = ranks[trainer.global_rank]
            self._load_loaders(trainer, mine["loaders"])
            set_random_state(mine["random"], trainer.strategy.root_device)
        else:  # more ranks than there were: the others are as far in the epoch as the first, with numbers of their own
            self._load_loaders(trainer, ranks[0]["loaders"])

    def _load_loaders(self, trainer: Trainer, states: list[dict[str, Any]]) -> None:
        loaders = _own_loaders(trainer)
        if self.before_the_first_batch and not states:
            return  # it was written before there were any, in somebody's `on_fit_start`
        if len(loaders) != len(states):
            raise ValueError(
                f"The checkpoint holds the places of {len(states)} resumable data loaders, and this run has "
                f"{len(loaders)}. Use the same data loaders to resume."
            )
        if len(states) > 1 and any(LATEST_FETCH in state for state in states):
            raise ValueError(
                f"The checkpoint was written in the middle of an epoch of {len(states)} data loaders, one of which had "
                "no length: the others' places are not known. Go on from a checkpoint of an epoch's end, and give the "
                "loader's `batch_sampler` a `__len__` to resume runs in the middle of epochs."
            )
        for loader, state in zip(loaders, states, strict=True):
            loader.load_state_dict(state)
        # Of a loader without a length Lightning has fetched a batch already.
        next_epoch = self.new_epoch and trainer.current_epoch
        if any(isinstance(loader, EndlessLoader) or not (has_length(loader) or next_epoch) for loader in loaders):
            fetch_anew(trainer)
        elif not all(map(has_length, loaders)):
            fetch_at_epoch_start(trainer.fit_loop)
