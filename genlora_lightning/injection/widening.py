"""Cast a model to a wider dtype for as long as its adapters are merged, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from genlora_lightning.injection.full_training import surround_with, trained_modules
from genlora_lightning.overrides import forget, note, noted

_MARK = "dtypes before merging"


class _Dtypes(NamedTuple):
    """What a model had: of each floating point parameter and buffer by name, and around each module trained in full."""

    tensors: dict[str, torch.dtype]
    around: dict[str, torch.dtype | None]


def widen(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model with adapters to a wider dtype, and remember on it what it had.

    Args:
        model: The model, which keeps the record until :func:`restore_dtypes` or :func:`forget_dtypes`; if there is one
            of an earlier call, that one stays.
        dtype: float32 or float64; it must hold the present values exactly.

    Raises:
        ValueError: ``dtype`` is neither, or too narrow for a tensor, which the message names. Nothing is changed then.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"`dtype` must be torch.float32 or torch.float64, got {dtype}. For a narrower copy on disk use "
            "`save_merged`."
        )
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floating = {name: t for name, t in tensors.items() if t.is_floating_point()}
    for name, tensor in floating.items():
        if torch.promote_types(tensor.dtype, dtype) != dtype:
            raise ValueError(f"`dtype` is {dtype}, which cannot hold the values of {name} ({tensor.dtype}) exactly.")
    if noted(model, _MARK) is None:
        around = {name: surround_with(module, None) for name, module in trained_modules(model).items()}
        note(model, _MARK, _Dtypes({name: tensor.dtype for name, tensor in floating.items()}, around))
    model.to(dtype)


def restore_dtypes(model: nn.Module) -> None:
    """Take back :func:`widen`, also of parts of a model; a part that was exchanged meanwhile stays as it is."""
    for part in list(model.modules()):
        before: _Dtypes | None = forget(part, _MARK)
        if before is None:
            continue
        tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        trained = trained_modules(part)
        for name, around in before.around.items():
            if name in trained:
                surround_with(trained[name], around)
        for name, dtype in before.tensors.items():
            if name in tensors:
                tensors[name].data = tensors[name].data.to(dtype)


def forget_dtypes(model: nn.Module) -> None:
    """Leave a model in the dtype that :func:`widen` gave it, for good."""
    for part in model.modules():
        forget(part, _MARK)
