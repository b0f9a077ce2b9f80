"""Say what PEFT's LoRA calls the factors of each site, and where it would compute something else.

============  ==========================================================================
linear        ``lora_A.weight (r, in)``, ``lora_B.weight (out, r)``
embedding     ``lora_embedding_A (r, num_embeddings)``, ``lora_embedding_B (dim, r)``
convolution   ``lora_A.weight (r, in, *kernel)``, ``lora_B.weight (out, r, 1, …)``
stack         ``lora_A.weight (E·r, in)``, ``lora_B.weight (out, r·E)``, of E matrices
============  ==========================================================================

Of an embedding PEFT's A is our B, transposed, and its B is our A: ΔW is ``(num_embeddings, dim)`` here. A stack is a
parameter, and its tensors have the name of a wrapper around the parameter's module.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from genlora_lightning.layers import convolution, embedding
from genlora_lightning.layers.adapted import AdaptedLayer

_NAME = re.compile(r"(.+)\.(?:lora_(?P<own>[AB])\.weight|lora_embedding_(?P<other>[AB]))")


def to_peft(name: str, layer: AdaptedLayer, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Lay out A ``(r, in)`` and B ``(out, r)`` of a layer as PEFT stores them, by PEFT's names."""
    base = layer.base_layer
    if isinstance(base, nn.Embedding):
        return {f"{name}.lora_embedding_A": B.T, f"{name}.lora_embedding_B": A.T}
    if isinstance(layer, convolution.AdaptedConv):
        A = layer.to_stored(A)
        B = B.reshape(*B.shape, *[1] * (A.ndim - 2))
    return {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}


def from_peft(key: str, tensor: Tensor) -> tuple[str, str, str, Tensor] | None:
    """Read a tensor of PEFT's file: the layer's name, its site, ``"A"`` or ``"B"``, and the matrix as it is here.

    ``None`` if the name is none of a factor's, or the shape none that it can have.
    """
    found = _NAME.fullmatch(key)
    if found is None:
        return None
    if found["other"]:
        return (found[1], "embedding", "B" if found["other"] == "A" else "A", tensor.T) if tensor.dim() == 2 else None
    if tensor.dim() == 2:
        return found[1], "linear", found["own"], tensor
    is_points = found["own"] == "A" or set(tensor.shape[2:]) == {1}
    if not 3 <= tensor.dim() <= 5 or not is_points:
        return None
    return found[1], "convolution", found["own"], tensor.flatten(1)


def stack_to_peft(wrapper: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Lay out A ``(E, r, in)`` and B ``(E, out, r)`` of a stack as PEFT stores them, by the names in its wrapper.

    PEFT has A's rows by matrix, then by rank, and B's columns by rank, then by matrix.
    """
    return {f"{wrapper}.lora_A.weight": A.flatten(0, 1), f"{wrapper}.lora_B.weight": B.permute(1, 2, 0).flatten(1)}


def stack_from_peft(A: Tensor, B: Tensor, num_matrices: int) -> tuple[Tensor, Tensor]:
    """Read A ``(E, r, in)`` and B ``(E, out, r)`` of a stack of E matrices as PEFT stores them."""
    rank = A.shape[0] // num_matrices
    A = A.reshape(num_matrices, rank, A.shape[1])
    return A, B.reshape(B.shape[0], rank, num_matrices).permute(2, 0, 1)


def stack_wrapper(module: str, parameter: str, adapted: Sequence[str]) -> str:
    """The name that PEFT's wrapper of a parameter has.

    It puts one around the other, for the module's parameters in turn; the last one's stands in the module's place.

    Args:
        module: The name of the module whose parameter it is.
        parameter: The parameter's name in it.
        adapted: The adapted ones among its parameters, in their order.
    """
    return module + ".base_layer" * (len(adapted) - 1 - adapted.index(parameter))


def unlike_peft(module: nn.Module) -> str | None:
    """Why PEFT's LoRA on a module computes something else than an adapter here; ``None`` if it is the same."""
    if isinstance(module, nn.Embedding):
        if not _scales_as_peft(module):
            return f"the forward of {type(module).__name__} gives other rows than PEFT takes"
    elif isinstance(module, nn.MultiheadAttention):
        return "PEFT's LoRA of an nn.MultiheadAttention adapts its `out_proj`, too"
    elif isinstance(module, _ConvNd):
        if module.groups != 1:
            return f"PEFT's LoRA of a convolution with groups ({module.groups}) has another A"
        if set(module.dilation) != {1} or module.padding_mode != "zeros":
            return f"PEFT leaves out its dilation {module.dilation} and padding mode {module.padding_mode!r}"
        if convolution.has_own_forward(module):
            return f"{type(module).__name__} has a forward of its own, beside which PEFT adds a plain convolution"
    return None


@torch.no_grad()
def _scales_as_peft(module: nn.Embedding) -> bool:
    """Whether rows are multiplied by ``embed_scale``, where there is one, and taken by the ids themselves."""
    if module.weight.is_meta:
        return True
    device, scale = module.weight.device, float(getattr(module, "embed_scale", 1.0))
    table = torch.randn(len(module.weight), 3, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.arange(min(4, len(table)), device=device).flip(0)[None]
    try:
        given = embedding.rows_by(module, table, (ids,), {})
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):  # it takes something else
        return False
    return given.shape == (*ids.shape, 3) and torch.allclose(given.float(), scale * table[ids], rtol=0.01, atol=1e-4)
