"""Refuse models that hold other libraries' adapters."""

from __future__ import annotations

from torch import nn

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
