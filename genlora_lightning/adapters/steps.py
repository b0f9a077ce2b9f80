"""Have an optimizer step along directions that the adapters' modules say, and ask the modules for figures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from genlora_lightning.adapters.base import AdapterModule, adapter_modules
from genlora_lightning.overrides import note, noted

_HOOKED = "modules that say directions"


def hook_steps(model: nn.Module, optimizer: Optimizer) -> None:
    """Give an optimizer, in each of its steps, the directions that a model's adapters say in place of gradients.

    It happens where nothing comes after it but the optimizer's own arithmetic: after the averaging between ranks, a
    gradient scaler's unscaling and clipping; where the step is given a closure, after each call of that. A parameter
    without a gradient is left out, as the optimizer does. Kinds whose directions are the gradients cost nothing, and a
    second call for the same model does nothing. The Lightning callback and ``build_optimizer`` call it.

    Args:
        model: A model with adapters.
        optimizer: Any torch optimizer; of the model's parameters those that it holds are its matter.
    """
    modules = [m for m in adapter_modules(model) if _says_directions(m)]
    hooked: set[int] = noted(optimizer, _HOOKED, set())
    modules = [m for m in modules if id(m) not in hooked]
    if not modules:
        return
    note(optimizer, _HOOKED, hooked | {id(m) for m in modules})

    def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            _turn(modules, optimizer)
            return None

        def then_turn() -> Any:
            result = closure()
            _turn(modules, optimizer)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": then_turn}
        return (args[0], then_turn, *args[2:]), kwargs

    optimizer.register_step_pre_hook(before_step)


def _says_directions(module: AdapterModule) -> bool:
    return type(module).directions.__func__ is not AdapterModule.directions.__func__  # type: ignore[attr-defined]


@torch.no_grad()
def largest_diagnostics(model: nn.Module) -> dict[str, Tensor]:
    """For each figure that a model's adapters give of themselves, by name, the largest one; it stays on the device."""
    found: dict[str, list[Tensor]] = {}
    for module in adapter_modules(model):
        for name, value in module.diagnostics().items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack([value.to(values[0].device) for value in values]).max() for name, values in found.items()}


@torch.no_grad()
def _turn(modules: list[AdapterModule], optimizer: Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    # Optimizers that unscale by themselves (fused ones, with a gradient scaler) have the scale, and scaled gradients.
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    alike: dict[tuple[Any, ...], list[tuple[AdapterModule, Tensor]]] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.grad is not None and id(parameter) in held:
                key = type(module), name, parameter.shape, parameter.device, parameter.dtype
                alike.setdefault(key, []).append((module, parameter.grad))
    for (cls, name, _, device, _), members in alike.items():
        owners, gradients = [module for module, _ in members], [gradient for _, gradient in members]
        with torch.autocast(device.type, enabled=False):
            if scale is None:
                found = cls.directions(owners, name, gradients)
            else:
                here = scale.to(device)
                found = [here * one for one in cls.directions(owners, name, [g / here for g in gradients])]
        for gradient, direction in zip(gradients, found, strict=True):
            if direction is not gradient:
                gradient.copy_(direction)
