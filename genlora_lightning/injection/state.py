"""Collect, compare and load the tensors that an adapter consists of, by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_layers, require_adapters
from genlora_lightning.injection.named import check_one_active
from genlora_lightning.injection.places import adapter_parameters, plain_name

_SHOWN = 4


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Everything that was trained, by its name in ``model.state_dict()``, and nothing of the frozen base.

    These are the adapters' parameters (fixed centres and widths too, so that nothing is ever regenerated from a seed)
    and the parameters and persistent buffers of modules trained in full. The tensors are the model's own, not copies.

    Raises:
        ValueError: The model has no adapters, or several act on it at once.
    """
    check_one_active(model)
    require_adapters(model)
    state: dict[str, Tensor] = {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}
    for module_name, module in trained_modules(model).items():
        for name, tensor in module.state_dict().items():
            state[plain_name(f"{module_name}.{name}")] = tensor
    return state


def check_adapter_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes of a stored adapter with those that a model needs.

    Raises:
        ValueError: A tensor is missing, left over, or has another shape; the message names the first ones, says where
            they came from and what the likely cause is.
    """
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if not (missing or unexpected or shapes):
        return
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing ({_first(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} tensors have no place in the model ({_first(unexpected)})")
    if shapes:
        first = [f"{n}: stored {tuple(state[n].shape)}, needed {tuple(expected[n].shape)}" for n in shapes]
        problems.append(f"{len(shapes)} tensors have another shape ({_first(first)})")
    wrapped = _wrapped_in(expected, state)
    if wrapped:
        raise ValueError(
            f"The adapter in {source} does not fit this model: {wrapped}. Load it into that part, or inject into the "
            "part that it was saved from (a LightningModule's `adapter_root()`). Nothing was loaded."
        )
    raise ValueError(
        f"The adapter in {source} does not fit this model: {'; '.join(problems)}. It was probably trained on another "
        "base model, or with another kind of adapter, other `target_modules` or sizes. Nothing was loaded."
    )


def widen_to_stored(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make adapters float64 that are stored so, where the base is float64, too: as ``precision="64-true"`` leaves them.

    Args:
        model: The model; its adapters are float32, as they are made.
        state: The stored tensors, by their names in the model.
    """
    wide = [name for name, tensor in state.items() if tensor.dtype == torch.float64]
    for name, layer in adapter_layers(model).items() if wide else ():
        if layer.base_weight.dtype == torch.float64 and any(own.startswith(f"{name}.update.") for own in wide):
            layer.update.double()


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Check a stored adapter with :func:`check_adapter_state`, then copy it into the model, in place."""
    expected = adapter_state_dict(model)
    check_adapter_state(expected, state, source)
    for name, tensor in expected.items():
        tensor.copy_(state[name])


def _wrapped_in(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """What to say if the names differ by a prefix only: one of the two models is a part of the other."""
    for inner, outer, words in (
        (expected, state, "its tensors have the prefix {!r}, so it was saved from a module that holds such a model"),
        (state, expected, "this model's tensors have the prefix {!r}, so it was saved from a part of such a model"),
    ):
        first = next(iter(inner), "")
        for prefix in {name.removesuffix(first) for name in outer if name.endswith(f".{first}")}:
            if {prefix + name for name in inner} == set(outer):
                return words.format(prefix)
    return None


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
