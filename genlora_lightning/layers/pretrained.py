"""Have transformers save models that hold adapted layers by the names that their bases have without them."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from genlora_lightning.overrides import note, noted

_INSTALLED = "saves_by_base_names"


def save_by_base_names(is_ours: Callable[[nn.Module], bool]) -> None:
    """Override transformers' ``save_pretrained``, if transformers is in use; models without adapted layers see nothing.

    By the names in the state dict, ``q_proj.base_layer.weight``, ``from_pretrained`` would find no weight for
    ``q_proj`` and make a random one. The method is that of the class, because a model does not know of the larger ones
    that it is a part of, and each of them may be saved.

    Args:
        is_ours: Whether a module is an adapted one, with what it adapts as ``base_layer``, and ``merged``.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return
    cls: Any = transformers.PreTrainedModel
    original = cls.save_pretrained
    if noted(original, _INSTALLED):
        return

    @wraps(original)
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(model, *args, **kwargs)
        places = {n: m for n, m in model.named_modules(remove_duplicate=False) if is_ours(m)}
        if places:
            given.arguments["state_dict"] = _by_base_names(model, places, given.arguments.get("state_dict"))
        return original(*given.args, **given.kwargs)

    note(save_pretrained, _INSTALLED, True)
    cls.save_pretrained = save_pretrained


def _by_base_names(model: Any, places: dict[str, Any], state: dict[str, Any] | None) -> dict[str, Any]:
    """The base by its own names, and the adapters' tensors beside it.

    The base with merged adapters is saved merged, and without theirs. An adapted model loads what is saved, as
    transformers' Trainer has it do when it goes on from a checkpoint.

    Raises:
        ValueError: The base is quantized: transformers takes the names from the model then. Or a stack of experts is
            adapted and not merged: transformers stores experts by other names, and would take its tensors for theirs.
    """
    stacks = [name for name, module in places.items() if not module.merged and hasattr(module, "stacks")]
    if stacks:
        raise ValueError(
            f"transformers stores the experts of a mixture one by one, and would take the adapter's tensors in "
            f"{stacks[0]} for theirs. Keep what was trained with `save_adapter(model, folder)`, save the merged model "
            "with `save_merged(model, folder)`, or take the adapters off first; nothing was saved."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "transformers cannot save a quantized model with adapters so that it loads again. Keep what was trained "
            "with `save_adapter(model, folder)`; nothing was saved."
        )
    renamed = {}
    for name, tensor in (model.state_dict() if state is None else state).items():
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        if place is None:
            renamed[name] = tensor
        elif name.startswith(f"{place}.base_layer."):
            renamed[place + name.removeprefix(f"{place}.base_layer")] = tensor
        elif not places[place].merged:
            renamed[name] = tensor
    if not all(layer.merged for layer in places.values()):
        warnings.warn(
            "`save_pretrained` saves the base, and the adapters' tensors beside it, which `from_pretrained` leaves "
            "out: it gives the base without them. Keep what was trained with `save_adapter(model, folder)`, or save "
            "the merged model with `save_merged(model, folder)`.",
            stacklevel=3,
        )
    return renamed
