"""Say why an update cannot be added into a layer's weight, and what to do about it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

# What torch's older ways of computing a weight leave on a module, by the class of their hook, and what takes it off.
_COMPUTED_BY = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(base_layer)",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(base_layer)",
    "BasePruningMethod": 'torch.nn.utils.prune.remove(base_layer, "weight")',
}


def obstacle_in_weight(base: nn.Module, weight: Tensor, shape: torch.Size, name: str = "weight") -> str | None:
    """Why a layer's weight is nothing that an update can be added to; ``None`` if it is.

    Args:
        base: The layer.
        weight: Its weight.
        shape: Of the update, as the layer would store it.
        name: The weight's, in the layer.
    """
    if parametrize.is_parametrized(base, name):
        return _computed(base, f'torch.nn.utils.parametrize.remove_parametrizations(base_layer, "{name}")')
    hooks = [cls.__name__ for hook in base._forward_pre_hooks.values() for cls in type(hook).__mro__]
    remedy = next((_COMPUTED_BY[name] for name in hooks if name in _COMPUTED_BY), None)
    if remedy is not None:
        return _computed(base, remedy)
    if not (name in base._parameters or name in base._buffers):
        return _computed(base, f"base_layer.{name} = torch.nn.Parameter(base_layer.{name})")
    # A quantized or sharded weight may be of a subclass of Tensor that poses as an ordinary matrix.
    is_plain = type(weight.data) is Tensor and weight.is_floating_point()
    if not is_plain or weight.shape != shape or weight.dtype.itemsize < 2:
        return (
            f"its weight is stored as {tuple(weight.shape)} {weight.dtype} ({type(weight.data).__name__}); merging "
            f"needs {tuple(shape)} floating point values. The weight is probably quantized or sharded: load the model "
            "unquantized and whole, then merge (`genlora merge` with the original base)."
        )
    if weight.is_meta:
        return "its weight has no memory (it is offloaded, or was not loaded yet): load the model whole, then merge."
    return None


def obstacle_in_hooks(base: nn.Module) -> str | None:
    """Why what a layer computes may be something else than its class says; ``None`` if there are no hooks."""
    if base._forward_hooks or base._forward_pre_hooks:
        hook = next(iter((*base._forward_hooks.values(), *base._forward_pre_hooks.values())))
        name = getattr(hook, "__qualname__", type(hook).__name__)
        return (
            f"it has forward hooks ({name}), which may change what it takes or gives. Remove them, merge, and put them "
            "on again if they only look."
        )
    return None


def _computed(base: nn.Module, remedy: str) -> str:
    parts = [name for name, _ in base.named_parameters() if name != "bias"]
    return (
        f"its weight is computed in each forward, from {', '.join(parts)}: what is added to it would be lost. Make it "
        f"a weight of its own first: `{remedy}`, with the layer's `base_layer`."
    )
