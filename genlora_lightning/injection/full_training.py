"""Train modules in full beside the adapters, in float32 inside a base of 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from genlora_lightning.injection.names import plain_modules
from genlora_lightning.overrides import forget, note, noted, put_on, take_off

# The mark goes where the module goes, while a name depends on the root that one starts from. It holds what is needed to
# take the module out again.
_MARK = "trained in full"
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ``modules_to_train`` named, by name, each once."""
    return {name: module for name, module in plain_modules(model) if noted(module, _MARK)}


def train_in_full(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Make all of some modules of a model trainable, and mark them.

    A module in bfloat16 or float16 is cast to float32, because an optimizer's small steps are lost in the few bits of
    its weights; its inputs are cast to float32 and its outputs back, so that the base around it does not notice. A
    later cast of the whole model leaves it as it is. A weight that is tied to one outside the modules (a head to its
    embedding) becomes the module's own, so that nothing is trained that was not named.
    """
    inside = {id(inner) for module in modules for inner in module.modules() if inner is not module}
    outermost = [module for module in modules if id(module) not in inside]
    own = {id(inner) for module in outermost for inner in module.modules()}
    foreign = {id(p) for m in model.modules() if id(m) not in own for p in m.parameters(recurse=False)}
    # Found out before anything is cast: two of the modules may share a weight.
    low = [next((p.dtype for p in module.parameters() if p.dtype in _LOW_PRECISION), None) for module in outermost]
    for module, dtype in zip(outermost, low, strict=True):
        for inner in module.modules():
            for name, parameter in inner.named_parameters(recurse=False):
                if id(parameter) in foreign:
                    setattr(inner, name, nn.Parameter(parameter.detach().clone()))
        module.requires_grad_(True)
        if dtype is not None:
            module.float()
        note(module, _MARK, (dtype, _cast_around(module, dtype)))
        # An instance attribute: a parent's `_apply`, which every cast and move goes through, calls its children's.
        put_on(module, _apply=partial(_apply_but_keep_float32, module))


def surround_with(module: nn.Module, dtype: torch.dtype | None) -> torch.dtype | None:
    """Tell a module trained in full the dtype of the model around it, after that model was cast.

    Args:
        module: A module that :func:`train_in_full` marked.
        dtype: bfloat16 or float16; ``None`` for a dtype that the module's own float32 needs no casts for.

    Returns:
        What it was before, in the same terms.
    """
    before: torch.dtype | None
    before, handles = noted(module, _MARK)
    for handle in handles:
        handle.remove()
    note(module, _MARK, (dtype, _cast_around(module, dtype)))
    return before


def original_dtype(module: nn.Module) -> torch.dtype | None:
    """The 16-bit dtype that a module trained in full had in its base; ``None`` if it was not cast."""
    dtype: torch.dtype | None = noted(module, _MARK)[0]
    return dtype


def stop_training_in_full(module: nn.Module) -> None:
    """Undo :func:`train_in_full`: freeze the module and round its trained values to its original dtype."""
    dtype, handles = noted(module, _MARK)
    for handle in handles:
        handle.remove()
    forget(module, _MARK)
    take_off(module, "_apply")
    module.requires_grad_(False)
    if dtype is not None:
        module.to(dtype)


def _cast_around(module: nn.Module, dtype: torch.dtype | None) -> list[Any]:
    """Register the hooks that a module in float32 needs in a model of 16 bits."""
    if dtype is None:
        return []
    return [
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True),
        module.register_forward_hook(partial(_cast_outputs, dtype)),
    ]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _cast(args, torch.float32), {name: _cast(value, torch.float32) for name, value in kwargs.items()}


def _cast_outputs(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return _cast(output, dtype)


def _apply_but_keep_float32(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    # What is done to the base around: a cast down or up changes what it gives and takes; a move does not.
    device = next((p.device for p in module.parameters()), None)
    narrowed = fn(torch.zeros(1, dtype=torch.float32, device=device)).dtype
    widened = fn(torch.zeros(1, dtype=torch.bfloat16, device=device)).dtype
    if narrowed in _LOW_PRECISION or widened not in _LOW_PRECISION:
        surround_with(module, narrowed if narrowed in _LOW_PRECISION else None)

    def keep_float32(tensor: Tensor) -> Tensor:
        # Not cast and put back: FSDP2 takes note of each parameter that is.
        result = fn(tensor)
        return tensor.to(result.device) if result.dtype in _LOW_PRECISION and tensor.is_floating_point() else result

    type(module)._apply(module, keep_float32, recurse)  # type: ignore[no-untyped-call]
    return module
