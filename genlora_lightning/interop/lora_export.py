"""Export a model's adapters as a standard LoRA adapter in PEFT's format.

Shapes: R rank of the generated adapter, r rank of the exported one, I in_features, O out_features.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from genlora_lightning.adapters.low_rank import truncate_factors
from genlora_lightning.artifacts.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, StoredAdapter
from genlora_lightning.backbone.identity import base_model_name
from genlora_lightning.backbone.tasks import class_tasks, is_transformers_model, transformers_base
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_configs, adapter_layers, require_adapters
from genlora_lightning.injection.named import check_one_active
from genlora_lightning.injection.names import plain_modules, plain_name
from genlora_lightning.interop.lora_files import has_mark
from genlora_lightning.interop.lora_sites import stack_to_peft, stack_wrapper, to_peft, unlike_peft
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.experts import AdaptedStack
from genlora_lightning.layers.linear import is_conv1d
from genlora_lightning.layers.sites import matrix_shape
from genlora_lightning.layers.token_rows import AdaptedRows
from genlora_lightning.storage.folders import check_replaceable, write_folder
from genlora_lightning.text import text_table

_PREFIX = "base_model.model."
_MARK = "genlora_export"
_is_export = partial(has_mark, _MARK)
# The values that vLLM accepts for `--max-lora-rank`; it serves all ranks up to that.
_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# PEFT trains and loads these modules in full whenever it is told the task, named or not.
_IMPLIED_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
# PEFT refuses a LoRA on these linears of models of these types, whose fused kernels read their weights.
_REFUSED_BY_PEFT = {"conv1d", "out_proj"}
_MAMBA_TYPES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


@dataclass(frozen=True, kw_only=True)
class ExportRow:
    """One adapted linear of a :class:`LoRAExport`: exported rank, share of ‖ΔW‖² that is kept, bytes of its A and B."""

    module: str
    rank: int
    energy_kept: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LoRAExport:
    """What :func:`export_lora` wrote; ``print`` it for a table.

    Args:
        folder: The folder.
        rank: Rank of every layer, PEFT's ``r`` and ``lora_alpha``.
        rows: The adapted linears.
        modules_to_save: Modules that were trained in full and are saved with the adapter.
        task_type: PEFT's name of the task, if it is known.
        named_only: Of the layers those that are no linears: embeddings and convolutions.
        target_parameters: Stacks of matrices among the rows: PEFT's name for them.
        token_rows: Embeddings of which rows are trained in full.
    """

    folder: Path
    rank: int
    rows: tuple[ExportRow, ...]
    modules_to_save: tuple[str, ...]
    task_type: str | None
    named_only: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    token_rows: tuple[str, ...] = ()

    @property
    def served_rank(self) -> int | None:
        """What vLLM's ``--max-lora-rank`` must be at least; ``None`` if it serves no such rank."""
        return next((rank for rank in _SERVED_RANKS if rank >= self.rank), None)

    def server_hint(self) -> str:
        """What a LoRA server must be told for this adapter."""
        if self.named_only:
            return f"LoRA servers take linears, and not {self.named_only[0]}: load it with PEFT, or merge it."
        if self.token_rows:
            return (
                f"LoRA servers take no rows of an embedding ({', '.join(self.token_rows)}), which PEFT does: use PEFT, "
                "or merge it into the base."
            )
        if self.modules_to_save:
            names = ", ".join(self.modules_to_save)
            return (
                f"vLLM serves no adapter with modules trained in full ({names}): load it with PEFT, or merge it into "
                "the base."
            )
        if self.target_parameters:
            return (
                "The experts' updates are in PEFT's form of them (`target_parameters`), of which servers are not known "
                "to load: use PEFT, or merge it into the base."
            )
        if self.served_rank is None:
            return (
                f"vLLM serves ranks up to {_SERVED_RANKS[-1]}, not {self.rank}: export with a lower `rank`, or merge "
                "the adapter into the base."
            )
        return f"vLLM: --enable-lora --max-lora-rank {self.served_rank}"

    def __str__(self) -> str:
        rows = [(row.module, str(row.rank), f"{row.energy_kept:.6f}", f"{row.bytes:,}") for row in self.rows]
        total = sum(row.bytes for row in self.rows)
        saved = f" Trained in full: {', '.join(self.modules_to_save)}." if self.modules_to_save else ""
        return "\n".join(
            [
                text_table(("module", "rank", "energy kept", "bytes"), rows),
                f"LoRA adapter of rank {self.rank} for {len(self.rows)} layers, {total:,} bytes, in {self.folder}."
                + saved,
                self.server_hint(),
            ]
        )


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | os.PathLike[str], *, rank: int | None = None) -> LoRAExport:
    """Write a model's adapters as a LoRA adapter that PEFT, and every server that reads its format, loads.

    The export is exact: A and B are generated once, the scaling is multiplied into B, and ``lora_alpha`` equals ``r``.
    All tensors are float32. Modules trained in full become PEFT's ``modules_to_save``. Names are relative to the
    transformers model, if ``model`` is or holds one.

    Args:
        model: A model with adapters, merged or not.
        folder: Where to write; replaced if it holds an earlier export.
        rank: Lower the rank to this one: of each update the largest singular values are kept, which is the best
            approximation of that rank. The report says which share of ‖ΔW‖² each layer keeps. ``None``: exact.

    Returns:
        Rank, energy kept and bytes of each layer, and the flag that a server needs.

    Raises:
        ValueError: The model has no adapters, or several act on it at once, ``rank`` is not in 1 … the adapter's rank,
            a value is not finite, an adapted layer stands in several places of the model, which the format cannot
            say, or PEFT is known to refuse a LoRA on it or to compute another one.
        FileExistsError: ``folder`` exists and is not an export of ours.
        OSError: It cannot be written; then nothing is left behind.
    """
    require_adapters(model)
    check_one_active(model)
    full_rank = max(config.rank for config in adapter_configs(model).values() if not config.is_derived)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full_rank):
        raise ValueError(f"`rank` must be an integer from 1 to the adapter's rank {full_rank}, got {rank!r}.")
    check_replaceable(folder, _is_export, "LoRA adapter")
    base = transformers_base(model) or model
    present = adapter_layers(base)
    _check_places(base)
    _check_taken_by_peft(base, present)
    layers = {name: layer for name, layer in present.items() if not layer.config.is_derived}

    state, rows, settings = _lora_tensors(layers, rank)
    row_tensors, tokens = _token_rows(base, {n: la for n, la in present.items() if isinstance(la, AdaptedRows)})
    state |= row_tensors
    alphas = {name: layer.active_config.alpha for name, layer in layers.items()} if settings else None
    trained = _outermost(trained_modules(base))
    for name, module in trained.items():
        for key, tensor in module.state_dict().items():
            stored = tensor.float() if tensor.is_floating_point() else tensor
            state[f"{_PREFIX}{plain_name(f'{name}.{key}')}"] = stored
    task = _task_type(base, list(layers), list(trained))
    # PEFT takes a name also as the end of a longer name; linears that it would adapt beside ours are excluded.
    others = [
        name
        for name, module in plain_modules(base)
        if matrix_shape(module) is not None
        and not name.endswith(".base_layer")
        and any(name.endswith(f".{own}") for own in layers)
    ]
    stacks = [name for name, layer in layers.items() if isinstance(layer, AdaptedStack)]
    config = _peft_config(
        rows,
        settings,
        alphas,
        stacks=stacks,
        base_model_name_or_path=base_model_name(base),
        task_type=task,
        fan_in_fan_out=any(is_conv1d(layer.base_layer) for layer in layers.values()),
        exclude_modules=others or None,
        modules_to_save=list(trained) or None,
        **({"trainable_token_indices": tokens} if tokens else {}),
    )
    path = write_folder(folder, lambda staging: _write(staging, state, config), _is_export, "LoRA adapter")
    return LoRAExport(
        folder=path,
        rank=config["r"],
        rows=tuple(rows),
        modules_to_save=tuple(trained),
        task_type=task,
        named_only=tuple(n for n, layer in layers.items() if layer.named_only and n not in stacks),
        target_parameters=tuple(stacks),
        token_rows=tuple(tokens),
    )


@torch.no_grad()
def write_stored_lora(stored: StoredAdapter, folder: Path) -> None:
    """Write an adapter folder that was read as a LoRA adapter for a server, without its base.

    What only PEFT needs to know of the base (which other linears a name fits, how they are stored) is not in it.

    Args:
        stored: The adapter.
        folder: An empty folder.

    Raises:
        ValueError: It holds modules trained in full, which no server takes, a value that is not finite, or names of a
            module around the base.
    """
    import transformers

    if stored.sites:
        name, site = next(iter(stored.sites.items()))
        raise ValueError(
            f"The adapter in {stored.folder} has layers that LoRA servers do not take: {name} is no linear, but of the "
            f"kind {site}. `genlora export-lora` writes it for PEFT; or merge it into its base (`genlora merge`)."
        )
    names = ", ".join(stored.trained_modules)
    if names:
        raise ValueError(
            f"The adapter in {stored.folder} has modules trained in full ({names}), which LoRA servers do not take. "
            "Merge it into its base (`genlora merge`), and serve that."
        )
    if not hasattr(transformers, stored.base["class"]):
        raise ValueError(
            f"The adapter in {stored.folder} has the names of a {stored.base['class']}, which is no model of "
            "transformers. `genlora export-lora` finds those of the base, and writes what servers load."
        )
    state, rows, settings = _lora_tensors({name: layer for name, layer, _ in stored.adapted()}, None)
    alphas = {name: config.alpha for name, config in stored.configs.items()} if settings else None
    tasks = class_tasks(stored.base["class"])
    config = _peft_config(
        rows, settings, alphas, base_model_name_or_path=stored.base["name"], task_type=tasks[0] if tasks else None
    )
    _write(folder, state, config)


def _lora_tensors(
    layers: dict[str, AdaptedLayer], rank: int | None
) -> tuple[dict[str, Tensor], list[ExportRow], dict[str, Any] | None]:
    """A and B of each layer by their names in the file, a row for each, and the scaling if it is not in B."""
    masked = next((name for name, layer in layers.items() if layer.config.keep_zeros), None)
    if masked is not None:
        raise ValueError(
            f"A LoRA cannot say what the adapter of {masked} does: with `keep_zeros` its update is B·A masked where "
            "the base's weight is 0, which is no product of low rank. Nothing was exported. Merge the adapter into the "
            "base instead (`genlora merge`)."
        )
    state: dict[str, Tensor] = {}
    rows = []
    settings = _lora_settings(layers, rank)
    for name, layer in layers.items():
        own = layer.active_config.rank
        A, B, energy = _exported_factors(layer, own if rank is None else min(rank, own), 1.0 if settings else None)
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"The update of {name} holds NaN or infinite values; nothing was exported.")
        rows.append(ExportRow(module=name, rank=A.shape[-2], energy_kept=energy, bytes=4 * (A.numel() + B.numel())))
        if isinstance(layer, AdaptedStack):
            module, _ = layer.weight_place
            holder, _, own_name = name.rpartition(".")
            adapted = [parameter for parameter in module._parameters if f"{holder}.{parameter}" in layers]
            own_tensors = stack_to_peft(stack_wrapper(holder, own_name, adapted), A, B)
        else:
            own_tensors = to_peft(name, layer, A, B)
        state |= {f"{_PREFIX}{key}": tensor for key, tensor in own_tensors.items()}
    return state, rows, settings


def _token_rows(base: Any, layers: Mapping[str, AdaptedRows]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """Rows that are trained in full by their names in the file, and PEFT's ``trainable_token_indices``."""
    state: dict[str, Tensor] = {}
    tokens: dict[str, list[int]] = {}
    seen: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        first = seen.setdefault(layer.table, name)
        reason = None
        if not isinstance(layer.base_layer, nn.Embedding) and layer.bias is not None:
            reason = "PEFT leaves out the bias of a linear with such rows"
        elif first is not name and not _ties_as_peft(base, first):
            reason = f"it is tied to {first}, which PEFT finds only in a transformers model with `tie_word_embeddings`"
        if reason is not None:
            raise ValueError(
                f"PEFT's `trainable_token_indices` cannot say what the rows of {name} do: {reason}. Nothing was "
                "exported. Merge the adapter into the base instead."
            )
        if first is name:
            state[f"{_PREFIX}{name}.token_adapter.trainable_tokens_delta"] = layer.table.rows
            tokens[name] = [*layer.tokens]
    return state, tokens


def _ties_as_peft(base: Any, name: str) -> bool:
    """Whether PEFT gives what is tied to the embedding of a name the same rows."""
    if not getattr(getattr(base, "config", None), "tie_word_embeddings", False):
        return False
    return base.get_input_embeddings() is dict(plain_modules(base)).get(name)


def _write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt", _MARK: "1"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _lora_settings(layers: dict[str, AdaptedLayer], rank: int | None) -> dict[str, Any] | None:
    """PEFT's words for the scaling, if they say it for all layers; else it is multiplied into B."""
    configs = [layer.active_config for layer in layers.values()]
    if rank is not None and any(rank != config.rank for config in configs):
        return None
    # `rank_pattern` and `alpha_pattern` say ranks and alphas layer by layer, and there is one word for the rule.
    own = [config.lora_settings() for config in configs]
    is_one_rule = all(settings is not None for settings in own) and len({config.scaling for config in configs}) == 1
    return own[0] if is_one_rule else None


def _exported_factors(layer: AdaptedLayer, rank: int, scaling: float | None) -> tuple[Tensor, Tensor, float]:
    A, B = layer.factors()
    B = (layer.scaling if scaling is None else scaling) * B
    if rank == layer.active_config.rank or not (A.isfinite().all() and B.isfinite().all()):
        return A, B, 1.0
    return truncate_factors(A, B, rank)


def _peft_config(
    rows: list[ExportRow],
    settings: dict[str, Any] | None,
    alphas: Mapping[str, float] | None,
    stacks: list[str] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    stacks = stacks or []
    ranks = {row.module: row.rank for row in rows}
    rank = max(ranks.values())
    settings = settings or {"lora_alpha": rank}
    alphas = alphas or dict(ranks)  # the scaling, alpha/r, is 1 for all
    patterns = {"rank_pattern": _others(ranks, rank), "alpha_pattern": _others(alphas, settings["lora_alpha"])}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        **settings,
        **{name: values for name, values in patterns.items() if values},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": [name for name in ranks if name not in stacks],
        **({"target_parameters": stacks} if stacks else {}),
        "exclude_modules": None,
        "modules_to_save": None,
        "inference_mode": True,
        **facts,
    }


def _others(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """The linears with another value than the usual one, by expressions that PEFT matches with them alone."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _task_type(base: nn.Module, adapted: list[str], trained: list[str]) -> str | None:
    if not is_transformers_model(base):
        return None
    for task in class_tasks(type(base).__name__):
        implied = _IMPLIED_HEADS.get(task)
        if implied is None:
            return task
        # PEFT would miss the tensors of a head that we did not train, and leave the adapters in one that it trains.
        heads = {name for name, _ in plain_modules(base) if any(name == i or name.endswith(f".{i}") for i in implied)}
        if heads <= set(trained) and not any(a.startswith(f"{head}.") for a in adapted for head in heads):
            return task
    return None


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {
        name: module for name, module in modules.items() if not any(name.startswith(f"{other}.") for other in modules)
    }


def _check_places(base: nn.Module) -> None:
    first: dict[int, str] = {}
    for name, module in plain_modules(base, remove_duplicate=False):
        if not isinstance(module, AdaptedLayer):
            continue
        if id(module) in first:
            raise ValueError(
                f"{name} and {first[id(module)]} are one adapted linear in two places. A LoRA adapter would adapt only "
                "one of them; nothing was exported. Merge the adapter into the base instead."
            )
        first[id(module)] = name


def _check_taken_by_peft(base: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    for name, layer in layers.items():
        reason = unlike_peft(layer.base_layer)
        if reason is not None:
            raise ValueError(
                f"A LoRA cannot say what the adapter of {name} does: {reason}. Nothing was exported. Merge the adapter "
                "into the base instead."
            )
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    refused = [name for name in layers if name.rpartition(".")[2] in _REFUSED_BY_PEFT]
    if model_type in _MAMBA_TYPES and refused:
        raise ValueError(
            f"PEFT refuses a LoRA on {len(refused)} of the adapted linears ({refused[0]}) in a model of type "
            f"{model_type!r}, so nothing was exported. Merge the adapter into the base (`save_merged`), or train it "
            f"with `exclude_modules={sorted({name.rpartition('.')[2] for name in refused})}`."
        )
