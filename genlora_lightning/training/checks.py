"""Check a training run: the optimizer's parameters, the first gradients, the mode, the place to save."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import compress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from genlora_lightning.artifacts.adapter_folder import is_adapter_folder
from genlora_lightning.artifacts.checkpoint import adapter_root
from genlora_lightning.distributed.shards import local_part
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.named import named_updates
from genlora_lightning.injection.peft_adapters import present_config
from genlora_lightning.injection.places import adapter_parameters, adapter_places, has_adapters

_AnyRank = Callable[[list[bool]], list[bool]]


def check_writable(folder: Path, needed: int) -> None:
    """Find out before the training, not after it, that the adapter cannot be saved."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise FileExistsError(f"The adapter is to be saved in {folder}, but {existing} is a file.")
    if existing == folder.absolute() and not is_adapter_folder(existing):
        raise FileExistsError(
            f"The adapter is to be saved in {folder}, which exists and is no adapter folder. Give another folder."
        )
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"The adapter is to be saved in {folder}, but {existing} is not writable.")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(f"The adapter is to be saved in {folder}, which takes {needed:,} bytes; {free:,} are free.")


def prune_frozen(optimizers: list[Optimizer]) -> int:
    """Take frozen parameters out of the optimizers; returns how many.

    A module that knows nothing of adapters gives its optimizer ``self.parameters()``, the frozen base included.
    """
    removed = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            is_trained = [p.requires_grad for p in group["params"]]
            removed += is_trained.count(False)
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)  # Adagrad has it from the start
            for name in {"params", "param_names"} & group.keys():
                group[name][:] = compress(group[name], is_trained)  # in place: LBFGS keeps the list
    return removed


def check_optimizers_hold(optimizers: list[Optimizer], model: nn.Module) -> None:
    """Check that each trainable parameter of the model is in an optimizer, and none that is not the model's.

    Raises:
        ValueError: A parameter would not be trained, or the optimizer trains one that nobody uses.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    absent = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if absent:
        raise ValueError(
            f"{len(absent)} trainable parameters, {absent[0]} among them, are in no optimizer and would not be "
            "trained. `configure_optimizers` must collect the parameters when it is called, after the adapters are "
            "injected, for example with `self.parameters()`; a list made in `__init__` does not know the adapters."
        )
    foreign = held - {id(p) for p in model.parameters()}
    if foreign:
        raise ValueError(
            f"The optimizer holds {len(foreign)} parameters that the module does not have (any more). "
            "`configure_optimizers` must collect the parameters when it is called."
        )


def check_adapters_act(model: nn.Module) -> None:
    """Check that a forward computes with all adapters, without which they have no gradient.

    Raises:
        ValueError: Some are merged or disabled; they are left as they are.
    """
    foreign = {name: place.module for name, place in adapter_places(model).items() if not place.is_ours}
    layers: dict[str, nn.Module] = {**foreign, **adapter_layers(model)}
    merged = [name for name, layer in layers.items() if getattr(layer, "merged", False) is True]
    if merged:
        raise ValueError(
            f"{len(merged)} of {len(layers)} adapters are merged into the base's weights, {merged[0]} among them, and "
            "would not be trained. Call `unmerge_adapters(model)` first; to train new adapters on the merged weights, "
            "`remove_adapters(model, keep_merged=True)`."
        )
    disabled = [
        name
        for name, layer in layers.items()
        if getattr(layer, "enabled", True) is False or getattr(layer, "disable_adapters", False) is True
    ]
    if disabled:
        raise ValueError(
            f"{len(disabled)} of {len(layers)} adapters are disabled, {disabled[0]} among them, and would not be "
            "trained. Fit outside of `with adapters_disabled(model)`; leave layers out with `exclude_modules`."
        )


def trained_outside(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is trainable in a module outside of the part that the adapters were put into (``adapter_root()``)."""
    inside = {id(p) for p in (*adapter_root(module).parameters(), *adapter_parameters(module).values())}
    return {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in inside}


def warn_of_trained_outside(module: nn.Module, *, at_the_end: bool = False) -> None:
    """Warn of what is trained in full because nobody has frozen it, and is in no adapter folder."""
    names = list(trained_outside(module))
    if not names:
        return
    text = (
        f"{len(names)} trainable parameters, {names[0]} among them, lie outside of the "
        f"{type(adapter_root(module)).__name__} that the adapters are in. "
    )
    if at_the_end:
        text += "The adapter folder does not hold what they have learned; checkpoints do: load it from one."
    else:
        text += (
            "They are trained in full. Checkpoints hold them, the adapter folder does not. Freeze them; or put the "
            "adapters into the whole module (no `adapter_root()`), with these in `modules_to_train`; or load what is "
            "trained from a checkpoint."
        )
    rank_zero_warn(text)


def warn_of_low_rates(optimizers: list[Optimizer], model: nn.Module) -> None:
    """Warn where Adam trains adapters at a rate for whole models, at which they learn next to nothing in silence."""
    if not has_adapters(model):
        return
    config = present_config(model)
    usual = config.usual_rates
    if usual is None:
        return
    adapters = {id(p) for p in adapter_parameters(model).values()}
    rates = [
        max(float(group["lr"]), float(group.get("initial_lr", 0.0)))
        for optimizer in optimizers
        if "Adam" in type(optimizer).__name__
        for group in optimizer.param_groups
        if any(id(p) in adapters for p in group["params"])
    ]
    if rates and max(rates) <= usual[0] / 5:
        rank_zero_warn(
            f"The optimizer trains the adapters at a rate of {max(rates):g}. That suits a whole model; {config.title} "
            f"mostly learns at {usual[0]:g} to {usual[1]:g} with Adam, and next to nothing at this rate. Raise the "
            "rate that your `configure_optimizers` gives, or return "
            f"`build_optimizer(self, OptimizerConfig(lr={usual[0]:g}))`, "
            "which has rates of their own for heads."
        )


class GradientWatch:
    """Watches the first optimizer steps of a run until the adapters have a gradient.

    Args:
        patience: Optimizer steps for which all gradients may be zero. They are so in sound runs: in the first step
            behind a head that starts at zero, or for a batch whose hinge loss is zero.
    """

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self._zero_steps = 0
        self._done = False
        self._had_backward = False

    def after_backward(self) -> None:
        """Take note of a backward: without one, a step's gradients are missing because there was no loss."""
        self._had_backward = True

    def check(self, model: nn.Module, optimizer: Optimizer, any_rank: _AnyRank = list) -> str | None:
        """Look at the gradients before an optimizer step; costs nothing once they have been seen.

        Args:
            model: The model with the adapters.
            optimizer: The optimizer that is about to step; adapters that it does not hold are not its matter.
            any_rank: Says for a list of flags which are set on any rank; for ranks that see pieces of the gradients.

        Returns:
            A warning about adapters without a gradient, if some have one and some have not.

        Raises:
            RuntimeError: The backward pass reached no adapter, or brought only zeros for ``patience`` steps.
        """
        if self._done:
            return None
        had_backward, self._had_backward = self._had_backward, False
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = {
            name: [p.grad for p in place.adapter_parameters().values() if id(p) in held]
            for name, place in adapter_places(model).items()
        }
        layers = {name: gradients for name, gradients in layers.items() if gradients}
        # A batch need not name all of a set's adapters.
        owners = {name: part.adapter for name, part in named_updates(model).items()}
        named = {owners.get(name) for name, gradients in layers.items() if any(g is not None for g in gradients)}
        layers = {name: gradients for name, gradients in layers.items() if owners.get(name) in named} or layers
        if not layers:
            return None
        nonzero = [
            any(g is not None and bool((local_part(g) != 0).any()) for g in gradients) for gradients in layers.values()
        ]
        reached = any(g is not None for gradients in layers.values() for g in gradients)
        had_backward, reached, *nonzero = any_rank([had_backward, reached, *nonzero])
        without = [name for name, flag in zip(layers, nonzero, strict=True) if not flag]
        if len(without) < len(layers):
            self._done = True
            if not without:
                return None
            return (
                f"{len(without)} of {len(layers)} adapters got no gradient at first, {without[0]} among them. That is "
                "right for modules that the batch did not use (experts). A linear whose weight is read without calling "
                "it never gets one, and its adapter never acts: name it in `exclude_modules`."
            )
        if not had_backward:  # `training_step` gave no loss, by which Lightning skips a batch
            return None
        self._zero_steps += 1
        if not reached or self._zero_steps >= self.patience:
            found = "has a gradient" if not reached else f"had a gradient other than zero in {self._zero_steps} steps"
            raise RuntimeError(
                f"None of the {len(layers)} adapters {found}, so nothing would be trained. Likely causes: reentrant "
                "gradient checkpointing over a frozen input (set `use_reentrant=False` or call "
                "`model.enable_input_require_grads()`), a `torch.no_grad()` around the backbone, a `detach()`, or a "
                "loss that does not depend on the backbone."
            )
        return None


def set_train_mode(model: nn.Module) -> None:
    """Set train mode, but leave frozen normalisation layers with running statistics in evaluation mode.

    Their statistics belong to the base: they are not saved with the adapter, so they must not change.
    """
    model.train()
    trained = {id(m) for module in trained_modules(model).values() for m in module.modules()}
    for module in model.modules():
        has_statistics = getattr(module, "running_mean", None) is not None
        if has_statistics and id(module) not in trained:
            module.eval()
