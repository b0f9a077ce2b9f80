"""Plans that share what they count: a step on fake tensors takes seconds, and a file of tests plans few models."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any

import pytest
from torch import nn

from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.planning import plan
from genlora_lightning.planning.activations import StepMemory

_FOUND: dict[Hashable, StepMemory] = {}


def _counted_once(count: Callable[..., StepMemory]) -> Callable[..., StepMemory]:
    @wraps(count)
    def found(model: nn.Module, *args: Any, **settings: Any) -> StepMemory:
        parameters = ((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters())
        checkpointing = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
        adapters = (repr(layer.config) for layer in adapter_layers(model).values())
        asked = (args, *sorted(settings.items()))
        key = (count.__name__, str(model), model.training, *parameters, *checkpointing, *adapters, asked)
        if key not in _FOUND:
            _FOUND[key] = count(model, *args, **settings)
        return _FOUND[key]

    return found


@pytest.fixture
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the step of a model, with its adapters, in its mode, once for all plans of it."""
    for name in ("count_generation", "count_step"):
        monkeypatch.setattr(plan, name, _counted_once(getattr(plan, name)))
