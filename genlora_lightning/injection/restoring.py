"""Undo what a failed load has done to a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from genlora_lightning.injection.held import held_root
from genlora_lightning.injection.inject import adapter_layers, remove_adapters


@contextmanager
def restored_after_error(model: nn.Module) -> Iterator[None]:
    """Context manager that takes back, after an error, what an injection inside it did to a model.

    That is: adapters and modules trained in full where there were none, which parameter stands where (training a tied
    module in full unties it), parameters' dtypes and ``requires_grad``, and dropout. Values that were written into
    parameters stay written, so a loader compares everything before it copies anything.

    Args:
        model: The model, or a module around it.
    """
    config_of = [(layer, layer.config) for layer in adapter_layers(model).values()]
    # The places of parameters, and their data: a cast of a module leaves the parameters and exchanges what is in them.
    places = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
    flags = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    was_held = held_root(model) is not None
    try:
        yield
    except BaseException:
        if (adapter_layers(model) and not config_of) or (held_root(model) is not None and not was_held):
            remove_adapters(model)
        for layer, config in config_of:
            if layer.config is not config:
                layer.set_dropout(config)
        for module, name, parameter in places:
            module._parameters[name] = parameter
        for parameter, flag, data in flags:
            if parameter.dtype != data.dtype:
                parameter.data = data
            parameter.requires_grad_(flag)
        raise
