"""Look into the quantized weights of frozen layers: what they stand for, and what they hold.

bitsandbytes keeps a matrix as integers of another shape or dtype beside scales, torchao as a tensor class that poses as
the matrix. A weight's *codes* are the integers, or floats of 8 bits, as they were when the model was loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is one of bitsandbytes' or torchao's."""
    return hasattr(weight, "quant_state") or hasattr(weight, "SCB") or hasattr(weight, "qdata")


def matrix_size(weight: Tensor) -> torch.Size:
    """The shape of the matrix that a weight stands for; its own if it is not quantized."""
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    return weight.shape if shape is None else torch.Size(shape)


def codes(weight: Tensor) -> Tensor | None:
    """The codes of a quantized weight, flat, as they were when it was loaded; ``None`` if that is not known.

    On CPUs with bfloat16 arithmetic bitsandbytes packs 4-bit codes anew in the first forward without gradients.
    """
    inner = getattr(weight, "qdata", weight)
    if type(inner) is not Tensor and inner is not weight:
        return None
    inner = inner.detach()
    state = getattr(weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        unpack = _unpack()
        if unpack is None:
            return None
        inner, _ = unpack(inner, copy.copy(state))
    return inner.reshape(-1)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew for CPUs with bfloat16 arithmetic, and unpack them, in place.

    Its product with packed weights has no backward, so a training that goes on after a validation would learn nothing
    below the last layer, and gives other outputs by the rounding of the scales. What merges into packed weights takes
    them for others.

    Raises:
        RuntimeError: A weight is packed, and this release of bitsandbytes has no way back.
    """
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            unpack = _unpack()
            if unpack is None:
                raise RuntimeError(
                    "The 4-bit weights were packed for this CPU by a forward without gradients, and this bitsandbytes "
                    "cannot unpack them. Load the model again and adapt it before its first forward, or update "
                    "bitsandbytes."
                )
            weight.data, weight.quant_state = unpack(weight.data, state)


def _unpack() -> Any:
    """What undoes bitsandbytes' packing; ``None`` in releases that have no such function."""
    from bitsandbytes import functional

    return getattr(functional, "_convert_weight_packed_for_cpu_inverse", None)


def weight_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters, with the scales and tables of quantized ones; each storage once."""
    found: dict[int, int] = {}
    for parameter in model.parameters():
        for tensor in _tensors(parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a parameter holds, in its attributes, too."""
    if isinstance(value, Tensor) and not hasattr(value, "qdata"):
        yield value.detach()
    inside = vars(value).values() if hasattr(value, "__dict__") else ()
    for item in inside:
        if isinstance(item, Tensor) or hasattr(item, "absmax"):
            yield from _tensors(item)
