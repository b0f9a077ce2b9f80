"""Keep in checkpoints what is neither trained nor the frozen base's: changed buffers, metrics, extra state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genlora_lightning.distributed.shards import plain_name, trained_tensors
from genlora_lightning.fields import shown
from genlora_lightning.injection.places import adapter_parameters, adapter_places
from genlora_lightning.overrides import forget, note, noted

_START = "state at the start"
_WARNED = "warned of frozen parameters that change"
_WARNED_OF_BUFFERS = "warned of buffers that change"
# Of each tensor so many values are compared, at equal distances: what changes as a whole, or by rows, is seen by them.
_MOST_VALUES = 4096


def note_start(module: nn.Module, *, anew: bool = False) -> None:
    """Remember what of a module's state is the base's, before anything is trained or loaded; only the first time.

    Args:
        module: A module with adapters.
        anew: Whether they are new: what was noted is of an earlier base then.
    """
    for warned in (_WARNED, _WARNED_OF_BUFFERS):  # each run says it once
        forget(module, warned)
    if anew or noted(module, _START) is None:
        states = {**_buffers(module), **_frozen(module), **_beside(module, module.state_dict())}
        note(module, _START, {name: _sample(value) for name, value in states.items() if _comparable(value)})


def other_state(module: nn.Module, state_dict: Mapping[str, Any], *, look_at_frozen: bool) -> dict[str, Any]:
    """What a checkpoint must hold beside what is trained, by plain names.

    These are the persistent buffers that have changed since :func:`note_start`, and entries of the state dict that
    are neither parameters nor buffers: ``get_extra_state``, states of torchmetrics. Frozen parameters that have
    changed (a teacher that follows the student) may be as large as the base; they are not kept, but named in a warning.

    Args:
        module: The module with the adapters.
        state_dict: What it was about to save.
        look_at_frozen: Whether the frozen parameters lie whole on this process.
    """
    start: dict[str, Tensor] = noted(module, _START) or {}
    frozen = _frozen(module) if look_at_frozen and not noted(module, _WARNED) else {}
    changed = [name for name, parameter in frozen.items() if name in start and _differs(start[name], parameter)]
    if changed:
        note(module, _WARNED, True)
        warnings.warn(
            f"{len(changed)} frozen parameters have changed since the adapters were put in, {changed[0]} among them. "
            "Checkpoints do not hold them, so a run that is resumed begins with those of the base. If they are a "
            "teacher's, make them buffers, which are kept.",
            stacklevel=2,
        )
    found = {**_buffers(module), **_beside(module, state_dict)}
    return {
        name: value
        for name, value in found.items()
        if not (name in start and _comparable(value) and not _differs(start[name], value))
    }


def warn_of_changed_buffers(module: nn.Module) -> None:
    """Warn, once in a run, of buffers of the frozen base that have changed: adapter folders do not hold them."""
    start: dict[str, Tensor] = noted(module, _START) or {}
    if not start or noted(module, _WARNED_OF_BUFFERS):
        return
    held = trained_tensors(module)
    metrics = tuple(f"{plain_name(name)}." for name, part in module.named_modules() if _is_metric(part))
    changed = [
        name
        for name, buffer in _buffers(module).items()
        if name in start and name not in held and not name.startswith(metrics)
        if _comparable(buffer) and _differs(start[name], buffer)
    ]
    if changed:
        note(module, _WARNED_OF_BUFFERS, True)
        warnings.warn(
            f"{len(changed)} buffers of the frozen base have changed, {changed[0]} among them. Checkpoints hold them, "
            "an adapter folder does not: loaded into the base, the adapter acts beside the base's own values. If "
            "outputs depend on them (statistics of normalisation layers in train mode, spectral_norm), load from a "
            "checkpoint, keep their modules in evaluation mode, or name these in `modules_to_train`.",
            stacklevel=2,
        )


def load_other_state(module: nn.Module, values: Mapping[str, Any], source: str) -> None:
    """Load what :func:`other_state` has kept.

    Args:
        module: The module.
        values: What was kept.
        source: The file, for messages.

    Raises:
        ValueError: A buffer has another shape here, or a part of the module does not take its state.
    """
    buffers = _buffers(module)
    kept = {name: value for name, value in values.items() if name in buffers}
    for name, value in kept.items():
        if not isinstance(value, Tensor) or value.shape != buffers[name].shape:
            what = f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"the value {shown(value)}"
            raise ValueError(
                f"{source} has {what} for the buffer {name}, which has the shape {tuple(buffers[name].shape)} here. "
                "Use the module that was trained; if it is the same, the file is damaged."
            )
    rest = {name: value for name, value in values.items() if name not in buffers}
    if rest:
        try:
            module.load_state_dict(rest, strict=False)
        except Exception as error:  # of the module's own code, which reads what it wrote
            raise ValueError(
                f"{source} holds state that this {type(module).__name__} does not take ({shown(sorted(rest))}): "
                f"{error!r}. Use the module that was trained; if it is the same, the file is damaged."
            ) from error
    with torch.no_grad():
        for name, value in kept.items():
            buffers[name].copy_(value)


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {
        plain_name(f"{prefix}.{name}" if prefix else name): buffer
        for prefix, part in module.named_modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and name not in part._non_persistent_buffers_set
    }


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    adapters = {id(p) for p in adapter_parameters(module).values()}  # some of theirs are fixed; checkpoints hold them
    own = module.named_parameters()
    return {plain_name(name): p for name, p in own if not p.requires_grad and id(p) not in adapters}


def _is_metric(module: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "torchmetrics" for cls in type(module).__mro__)


def _beside(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a state dict that are no parameters and no buffers, and do not belong to an adapted layer's base."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    own = {plain_name(name) for name, _ in tensors}
    adapted = tuple(f"{plain_name(name)}." for name in adapter_places(module))
    return {
        name: value
        for name, value in state_dict.items()
        if name not in own and not name.startswith(adapted) and not _is_part_of_one(name, own)
    }


def _is_part_of_one(name: str, names: set[str]) -> bool:
    """Whether an entry such as ``weight.absmax`` describes a (quantized) tensor."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in names for length in range(1, len(parts)))


def _comparable(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) and value.device.type != "meta" and value.numel() > 0


def _sample(tensor: Tensor) -> Tensor:
    values = tensor.detach().reshape(-1)
    return values[:: max(1, values.numel() // _MOST_VALUES)].cpu().clone()


def _differs(start: Tensor, value: Tensor) -> bool:
    now = _sample(value)
    start = start.to(now.dtype)  # the run's precision may have converted it
    return start.shape != now.shape or not bool(((start == now) | ((start != start) & (now != now))).all())
