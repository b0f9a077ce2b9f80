"""Write a transformers model with its adapters merged as a folder that everybody loads without this library."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genlora_lightning.artifacts.model_folder import copy_tokenizer
from genlora_lightning.backbone.tasks import transformers_base
from genlora_lightning.injection.full_training import original_dtype, trained_modules
from genlora_lightning.injection.inject import adapter_layers, require_adapters
from genlora_lightning.injection.merging import (
    MergeReport,
    MergeRow,
    measure_drift,
    naming,
    warn_of_losses,
    warn_of_reads,
)
from genlora_lightning.injection.names import plain_modules, plain_name
from genlora_lightning.layers.adapted import AdaptedLayer, is_place
from genlora_lightning.layers.experts import AdaptedExperts
from genlora_lightning.storage.folders import check_replaceable, write_folder

# In a merged folder: which files were written, with their sizes and times, so that only what is unchanged is replaced.
_RECORD_FILE = "genlora_merge.json"


def save_merged(model: nn.Module, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> MergeReport:
    """Write a transformers model with its adapters merged, as a folder that ``from_pretrained`` loads without us.

    The model in memory is not changed. Modules trained in full are included; a head that training untied from its
    embedding is saved as its own, and the configuration says so. If the base was loaded from a local folder, its
    tokenizer's files are copied.

    Args:
        model: A transformers model with adapters, or a module (such as a LightningModule) that holds one.
        folder: Where to write. An empty folder is replaced, and one that this function wrote if no file of it was
            changed or added since.
        dtype: Of all floating point weights; each weight's own if ``None``. The sums are computed in float32 and
            rounded once.

    Returns:
        The drift of each linear.

    Raises:
        ValueError: There are no adapters, no transformers model, a quantized or sharded base, a value that is not
            finite, or weights whose tie the training has undone where the architecture cannot say so.
        FileExistsError: The folder holds something else.
        OSError: It cannot be written; then nothing is left behind.

    Warns:
        MergeReadWeightWarning: A module computes with the weight of an adapted layer beside calling it.
        MergeRoundingWarning: A linear lost more than 10 % of its update.
    """
    require_adapters(model)
    base: Any = transformers_base(model)
    if base is None:
        raise ValueError(
            f"This {type(model).__name__} holds no transformers model with all the adapters, so there is no Hugging "
            "Face folder to write. Use `merge_adapters`, then `remove_adapters(model, keep_merged=True)`, and save "
            "the state dict."
        )
    if getattr(base.config, "quantization_config", None) is not None:
        raise ValueError(
            "The base is quantized, and merging into it would round the update away. Load the original, unquantized "
            "base model and merge into that: `genlora merge ADAPTER ORIGINAL OUT`, or `load_adapter(original, adapter, "
            'base_check="unquantized")` and this. Or call the base\'s `dequantize()` before.'
        )
    check_replaceable(folder, _is_unchanged_merge, "merged model")
    warn_of_reads(model)
    state, rows = _merged_state(base, dtype)
    clean = _without_adapters(base, state)
    copied: list[str] = []

    def write(staging: Path) -> None:
        clean.save_pretrained(staging)
        copied.extend(copy_tokenizer(base, staging))
        record = {"format": "genlora-merged", "format_version": 1, "files": _files(staging)}
        (staging / _RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    path = write_folder(folder, write, _is_unchanged_merge, "merged model")
    report = MergeReport(rows=tuple(rows), folder=path, copied=tuple(copied))
    warn_of_losses(report)
    return report


def _is_unchanged_merge(folder: Path) -> bool:
    """Whether :func:`save_merged` wrote a folder, and nobody has changed or added a file since.

    A model that was trained on and saved to the same folder has the same names and sizes, and is not ours to replace.
    """
    try:
        record = json.loads((folder / _RECORD_FILE).read_text(encoding="utf-8"))
        return bool(record["files"] == _files(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _files(folder: Path) -> dict[str, list[int]]:
    """Size and time of writing (ns) of all that is in a folder, but for other folders and the record of it."""
    entries = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    # A link is an entry of its own, wherever it points to.
    found = {name: path.lstat() for name, path in entries.items() if path.is_symlink() or not path.is_dir()}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items() if name != _RECORD_FILE}


def _merged_state(base: nn.Module, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], list[MergeRow]]:
    """The state dict of the base without adapters, by the names it has there; tied weights stay one tensor."""
    layers = adapter_layers(base)
    merged: dict[int, Tensor] = {}
    of_tied: dict[Hashable, Tensor] = {}
    rows = []
    for name, layer in layers.items():
        if layer.merged_with not in of_tied:
            with naming(name):
                of_tied[layer.merged_with] = layer.merged_weight(dtype)
        weight = merged[id(layer)] = of_tied[layer.merged_with]
        rows.append(measure_drift(name, layer, weight))
    trained_dtype = {
        id(p): original_dtype(module) for module in trained_modules(base).values() for p in module.parameters()
    }
    state: dict[str, Tensor] = {}
    cast: dict[int, Tensor] = {}
    own = {id(p) for layer in layers.values() for p in layer.adapter_parameters().values()}
    places = {name: m for name, m in plain_modules(base, remove_duplicate=False) if is_place(m)}
    alone = {name: m for name, m in places.items() if isinstance(m, AdaptedLayer)}
    sums = {f"{name}.base_layer.{layer.parameter}": merged[id(layer)] for name, layer in alone.items()}
    for name, module in places.items():
        if isinstance(module, AdaptedExperts):
            sums |= {f"{name}.base_layer.{own}": merged[id(stack)] for own, stack in module.stacks.items()}
    for own_name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) in own:
            continue
        name = plain_name(own_name)
        parent = next((place for place in places if name.startswith(f"{place}.")), None)
        key = name if parent is None else parent + name.removeprefix(f"{parent}.base_layer")
        if name in sums:
            state[key] = sums[name]
            continue
        if id(tensor) not in cast:
            target = (dtype or trained_dtype.get(id(tensor)) or tensor.dtype) if tensor.is_floating_point() else None
            cast[id(tensor)] = tensor.detach().to(target) if target is not None else tensor.detach()
        state[key] = cast[id(tensor)]
    return state, rows


def _without_adapters(base: Any, state: dict[str, Tensor]) -> Any:
    """A model of the base's class and configuration that holds the given tensors themselves, not copies."""
    config = copy.deepcopy(base.config)
    if getattr(config, "tie_word_embeddings", False) and _head_is_untied(base, state):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        clean = type(base)(config)
    clean.load_state_dict(state, assign=True)
    clean.tie_weights()
    for name, tensor in clean.state_dict().items():
        if tensor.data_ptr() != state[name].data_ptr() and not torch.equal(tensor, state[name]):
            raise ValueError(
                f"{name} is tied to another weight in {type(base).__name__}, and training gave it values of its own, "
                "which a folder of this architecture cannot hold. Nothing was written; export a LoRA adapter instead."
            )
    if getattr(base, "generation_config", None) is not None:
        clean.generation_config = base.generation_config
    return clean


def _head_is_untied(base: Any, state: dict[str, Tensor]) -> bool:
    names = {id(m): name for name, m in plain_modules(base)}
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or embedding is None:
        return False
    return state[f"{names[id(head)]}.weight"] is not state[f"{names[id(embedding)]}.weight"]
