"""Import a LoRA adapter in PEFT's format: the same tensors, as an adapter of this library."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.injection.inject import adapter_layers, inject_adapters
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.injection.restoring import restored_after_error
from genlora_lightning.injection.state import load_adapter_state
from genlora_lightning.interop.lora_files import LoRAFiles, read_lora


def import_lora(model: nn.Module, folder: str | os.PathLike[str]) -> InjectionReport:
    """Load a LoRA adapter that PEFT wrote into its base model, in place, to use it or to train on.

    Nothing is lost: A and B keep every bit, and so do modules that it saves in full; ``alpha`` and ``scaling`` are
    PEFT's ``lora_alpha`` and ``use_rslora``. :func:`~genlora_lightning.export_lora` writes it back as it was. Where the
    layers' ranks or scalings differ (``rank_pattern``, ``alpha_pattern``), the lower ranks are filled up with zeros and
    B is multiplied by the ratio of the scalings: ΔW is then equal to rounding.

    Args:
        model: The base model the LoRA was trained on, without adapters.
        folder: The LoRA adapter's folder.

    Returns:
        What is adapted.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It is damaged, no LoRA, or a kind of LoRA that is more than ``ΔW = s·B·A`` (DoRA, trained biases,
            adapted embeddings or convolutions), or the model is not its base or has adapters already. Then the model is
            as it was.
    """
    if adapter_layers(model):
        raise ValueError("The model already has adapters. Call `remove_adapters(model)` first.")
    files = read_lora(folder)
    config = lora_config(files)
    with restored_after_error(model):
        try:
            report = inject_adapters(model, config)
        except ValueError as error:
            raise ValueError(f"The LoRA in {folder} does not fit this {type(model).__name__}: {error}") from error
        load_adapter_state(model, _state(files, config), str(folder))
    return report


def lora_config(files: LoRAFiles) -> LoRAConfig:
    """Make the configuration of an adapter that holds a LoRA: its highest rank, with the scaling of that rank."""
    rank = max(layer.A.shape[0] for layer in files.layers.values())
    first = next(layer for layer in files.layers.values() if layer.A.shape[0] == rank)
    return LoRAConfig(
        rank=rank,
        alpha=first.alpha,
        scaling="sqrt_rank" if files.use_rslora else "rank",
        dropout=files.dropout,
        target_modules=list(files.layers),
        modules_to_train=list(files.modules_to_save),
    )


@torch.no_grad()
def _state(files: LoRAFiles, config: LoRAConfig) -> dict[str, Tensor]:
    state = dict(files.saved)
    for name, layer in files.layers.items():
        missing = config.rank - layer.A.shape[0]
        B = layer.B if layer.scaling == config.scaling_factor else layer.B * (layer.scaling / config.scaling_factor)
        state[f"{name}.update.A.matrix"] = nn.functional.pad(layer.A, (0, 0, 0, missing)) if missing else layer.A
        state[f"{name}.update.B.matrix"] = nn.functional.pad(B.T, (0, 0, 0, missing)) if missing else B.T
    return state
