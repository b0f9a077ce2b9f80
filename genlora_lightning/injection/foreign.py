"""Meet other libraries' ways with a model: refuse their adapters, and save for transformers by its own names."""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import Any

from torch import nn

from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.overrides import put_on, take_off

# Libraries whose modules take the place of linears, with linears of their own inside.
_ADAPTER_LIBRARIES = ("peft", "loralib")


def check_no_foreign_adapters(model: nn.Module) -> None:
    """Check that no other library has put adapters into a model: theirs would be taken for linears of the model.

    Raises:
        ValueError: One has; the message names the first place.
    """
    for name, module in model.named_modules():
        library = next((c.__module__.partition(".")[0] for c in type(module).__mro__ if _is_foreign(c)), None)
        if library is not None:
            kind = f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}"
            raise ValueError(
                f"The model has adapters of {library} ({name or 'itself'} is a {kind}), whose parts would be taken for "
                "linears of the base. Load the base without them, or merge them into it first: "
                "`model = peft_model.merge_and_unload()`, or `.unload()` to drop them. To train adapters of PEFT, give "
                "the model without them and PEFT's configuration to `AdapterFinetuning(config)`, which puts them in."
            )


def _is_foreign(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _ADAPTER_LIBRARIES


def save_by_base_names(model: nn.Module) -> None:
    """Have the transformers models in a model that was adapted save their base by the names that it has without us.

    By the names in the state dict, ``q_proj.base_layer.weight``, ``from_pretrained`` would find no weight for
    ``q_proj`` and make a random one.
    """
    for module in model.modules():
        if hasattr(module, "base_model_prefix") and hasattr(module, "save_pretrained"):
            put_on(module, save_pretrained=partial(_save_pretrained, module))


def stop_saving_by_base_names(model: nn.Module) -> None:
    """Undo :func:`save_by_base_names`."""
    for module in model.modules():
        take_off(module, "save_pretrained")


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' ``save_pretrained``: the base by its own names, and the adapters' tensors beside it.

    The base with merged adapters is saved merged, and without theirs. An adapted model loads what is saved, as
    transformers' Trainer has it do when it goes on from a checkpoint.

    Raises:
        ValueError: The base is quantized: transformers takes the names from the model then.
    """
    given = inspect.signature(type(model).save_pretrained).bind(model, *args, **kwargs)
    places = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, AdaptedLayer)}
    if not places:
        return type(model).save_pretrained(*given.args, **given.kwargs)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "transformers cannot save a quantized model with adapters so that it loads again. Keep what was trained "
            "with `save_adapter(model, folder)`; nothing was saved."
        )
    state = given.arguments.get("state_dict")
    renamed = {}
    for name, tensor in (model.state_dict() if state is None else state).items():
        place = next((place for place in places if name.startswith(f"{place}.")), None)
        if place is None:
            renamed[name] = tensor
        elif name.startswith(f"{place}.base_layer."):
            renamed[place + name.removeprefix(f"{place}.base_layer")] = tensor
        elif not places[place].merged:
            renamed[name] = tensor
    given.arguments["state_dict"] = renamed
    if not all(layer.merged for layer in places.values()):
        warnings.warn(
            "`save_pretrained` saves the base, and the adapters' tensors beside it, which `from_pretrained` leaves "
            "out: it gives the base without them. Keep what was trained with `save_adapter(model, folder)`, or save "
            "the merged model with `save_merged(model, folder)`.",
            stacklevel=2,
        )
    return type(model).save_pretrained(*given.args, **given.kwargs)
