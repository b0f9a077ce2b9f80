"""Import a LoRA adapter in PEFT's format: the same tensors, as an adapter of this library."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.lora import LoRAConfig
from genlora_lightning.injection.inject import adapter_layers, inject_adapters, inject_layers
from genlora_lightning.injection.names import plain_modules
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.injection.restoring import restored_after_error
from genlora_lightning.injection.state import load_adapter_state
from genlora_lightning.injection.targets import match_modules
from genlora_lightning.injection.token_rows import token_rows
from genlora_lightning.interop.lora_files import LoRAFiles, LoRALayer, read_lora
from genlora_lightning.interop.lora_sites import stack_from_peft, stack_wrapper, unlike_peft
from genlora_lightning.layers.experts import stack_of_matrices
from genlora_lightning.layers.sites import site_of
from genlora_lightning.text import natural_key


def import_lora(model: nn.Module, folder: str | os.PathLike[str]) -> InjectionReport:
    """Load a LoRA adapter that PEFT wrote into its base model, in place, to use it or to train on.

    Nothing is lost: A and B keep every bit, and so do modules that it saves in full; ``alpha`` and ``scaling`` are
    PEFT's ``lora_alpha`` and ``use_rslora``, for each linear its own (``rank_pattern``, ``alpha_pattern``);
    ``tokens_to_train`` are its ``trainable_token_indices``, and ``target_parameters`` what PEFT calls so.
    :func:`~genlora_lightning.export_lora` writes it back as it was.

    Args:
        model: The base model the LoRA was trained on, without adapters.
        folder: The LoRA adapter's folder.

    Returns:
        What is adapted.

    Raises:
        FileNotFoundError: There is no such adapter.
        ValueError: It is damaged, no LoRA, or a kind of LoRA that is more than ``ΔW = s·B·A`` (DoRA, trained biases,
            convolutions that it takes for others), or the model is not its base or has adapters already. Then the model
            is as it was.
    """
    if adapter_layers(model):
        raise ValueError("The model already has adapters. Call `remove_adapters(model)` first.")
    files = _with_stacks(model, read_lora(folder), folder)
    configs: dict[str, AdapterConfig] = {**_configs(files)}
    (config, *others) = {id(config): config for config in configs.values()}.values()
    _check_sites(model, files, folder)
    with restored_after_error(model):
        try:
            if others:
                trained = match_modules(model, config.modules_to_train, "modules_to_train")
                modules = dict(plain_modules(model))
                adapted = {id(modules[name]): "adapted, too" for name in configs if name in modules}
                rows = {name: own for name, (_, own) in token_rows(model, config, adapted).items()}
                report = inject_layers(model, configs | rows, trained)
            else:
                report = inject_adapters(model, config)
        except ValueError as error:
            raise ValueError(f"The LoRA in {folder} does not fit this {type(model).__name__}: {error}") from error
        load_adapter_state(model, _state(files), str(folder))
    return report


def _with_stacks(model: nn.Module, files: LoRAFiles, folder: str | os.PathLike[str]) -> LoRAFiles:
    """The same with the LoRA of each stack of matrices by its parameter's name, and not by that of PEFT's wrapper."""
    layers = dict(files.layers)
    for module_name, module in plain_modules(model) if files.target_parameters else ():
        names = {own: f"{module_name}.{own}".removeprefix(".") for own in module._parameters}
        adapted = [own for own, name in names.items() if _is_named(name, files.target_parameters)]
        for own in adapted:
            stack = stack_of_matrices(module, own)
            if stack is None:
                raise ValueError(
                    f"The LoRA in {folder} has `target_parameters` with {names[own]}, which is no stack of matrices: "
                    "other parameters are not adapted here. Merge it with PEFT, or train it with the layer's name in "
                    "`target_modules` instead."
                )
            pair = layers.pop(stack_wrapper(module_name, own, adapted), None)
            number = stack.shape.num_matrices
            if pair is None or len(pair.A) % number or pair.site != "linear":
                found = "no LoRA of it" if pair is None else f"A of {len(pair.A)} rows for its {number} matrices"
                raise ValueError(
                    f"The LoRA in {folder} does not fit this {type(model).__name__}: its `target_parameters` name "
                    f"{names[own]}, and it has {found}."
                )
            layers[names[own]] = LoRALayer(*stack_from_peft(pair.A, pair.B, number), "stack")
    return replace(files, layers={name: layers[name] for name in sorted(layers, key=natural_key)})


def _is_named(parameter: str, wanted: Iterable[str]) -> bool:
    """Whether PEFT finds a parameter by one of some names."""
    return any(parameter == name or parameter.endswith(f".{name}") for name in wanted)


def _check_sites(model: nn.Module, files: LoRAFiles, folder: str | os.PathLike[str]) -> None:
    modules: dict[str, Any] = dict(plain_modules(model))
    for name, layer in files.layers.items():
        module = modules.get(name)
        site = None if module is None else site_of(module)
        if module is None or site is None:
            continue  # which the injection tells
        reason = unlike_peft(module)
        padding = getattr(module, "padding_idx", None) if layer.site == "embedding" else None
        if site.noun != layer.site:
            reason = f"it is of the kind {site.noun} here, and the LoRA is for the kind {layer.site}"
        elif padding is not None and bool(layer.B[padding : padding + 1].any()):
            reason = f"it updates the row of `padding_idx` ({padding}), which is fixed here"
        elif name in files.bases and not torch.equal(files.bases[name].to(module.weight), module.weight):
            reason = "PEFT saved the embedding itself, too, and its values are others: it was resized or trained"
        if reason is not None:
            raise ValueError(f"The LoRA in {folder} does not fit this {type(model).__name__}: {name}: {reason}.")


def _configs(files: LoRAFiles) -> dict[str, LoRAConfig]:
    """The configuration of each layer: one object for all that have the same rank and alpha."""
    stacks = [name for name, layer in files.layers.items() if layer.site == "stack"]
    made: dict[tuple[int, float], LoRAConfig] = {}
    found = {}
    for name, layer in files.layers.items():
        key = rank, alpha = layer.A.shape[-2], files.alpha_of(name)
        if key not in made:
            made[key] = LoRAConfig(
                rank=rank,
                alpha=alpha,
                scaling="sqrt_rank" if files.use_rslora else "rank",
                dropout=files.dropout,
                target_modules=[own for own in files.layers if own not in stacks],
                target_parameters=stacks,
                modules_to_train=list(files.modules_to_save),
                tokens_to_train={name: list(rows.tokens) for name, rows in files.token_rows.items()},
            )
        found[name] = made[key]
    return found


def _state(files: LoRAFiles) -> dict[str, Tensor]:
    state = dict(files.saved)
    for name, layer in files.layers.items():
        state[f"{name}.update.A.matrix"] = layer.A
        state[f"{name}.update.B.matrix"] = layer.B.mT
    for name, table in files.token_rows.items():
        state[f"{name}.update.table.rows"] = table.rows
    return state
