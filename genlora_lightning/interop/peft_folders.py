"""Convert adapters to and from PEFT folders of kind GENLORA, without loss; PEFT itself is not needed.

The tensors are the same in both, under names that follow from each other. ``genlora_lightning.interop.peft`` makes the
kind known to PEFT.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.genlora.config import GenLoRAConfig
from genlora_lightning.artifacts.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from genlora_lightning.artifacts.model_card import CARD_FILE
from genlora_lightning.backbone.identity import base_model_name
from genlora_lightning.backbone.tasks import class_tasks, is_transformers_model, transformers_base
from genlora_lightning.fields import shown
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.inject import adapter_configs, adapter_layers, inject_layers, require_adapters
from genlora_lightning.injection.named import check_one_active
from genlora_lightning.injection.names import plain_modules
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.injection.restoring import restored_after_error
from genlora_lightning.injection.state import adapter_state_dict, load_adapter_state
from genlora_lightning.injection.targets import match_modules
from genlora_lightning.interop.lora_files import has_mark
from genlora_lightning.storage.folders import check_replaceable, write_folder
from genlora_lightning.storage.paths import local_path
from genlora_lightning.text import natural_key

PEFT_TYPE = "GENLORA"
PREFIX = "genlora_"
_BASE = "base_model.model."
_MARK = "genlora_peft"
_is_export = partial(has_mark, _MARK)

# Our names of what PEFT's users know by another.
_PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "modules_to_train": "modules_to_save"}
# Settings of a folder that our adapters do not have; with these values they say nothing.
_WITHOUT_MEANING: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}

_PATTERNS = ("layers_to_transform", "rank_pattern", "alpha_pattern")

_CARD = """\
# GenLoRA adapter for PEFT

PEFT learns this kind of adapter from genlora-lightning (`pip install genlora-lightning peft`). Import it first;
without it PEFT stops with `KeyError: 'GENLORA'`.

```python
import genlora_lightning.interop.peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this/folder")
```

`genlora convert FOLDER BASE OUT` makes an adapter folder of genlora-lightning out of it, without loss.
"""


def peft_fields(config: GenLoRAConfig) -> dict[str, Any]:
    """Say a configuration in PEFT's terms: the fields of ``GenLoraConfig``.

    Raises:
        ValueError: It has ``layers_to_transform``, ``rank_pattern``, ``alpha_pattern``, ``elastic`` or what else those
            do not say.
    """
    if config.keep_zeros:
        raise ValueError(
            "`keep_zeros` is set, which PEFT's GenLoraConfig does not say: merge the adapter into the base instead "
            "(`genlora merge`)."
        )
    if config.elastic:
        raise ValueError(
            f"`elastic` is {config.elastic}, which PEFT's GenLoraConfig does not say: cut the adapter to one of these "
            "ranks first (`genlora slice`)."
        )
    for name in (*_PATTERNS, "tokens_to_train", "share_over_experts", "target_rows"):
        if getattr(config, name):
            raise ValueError(
                f"`{name}` is {shown(getattr(config, name))}, which PEFT's GenLoraConfig does not say as this library "
                "does. Name the linears in `target_modules`, and give all of them one rank and alpha."
            )
    values: dict[str, Any] = {_PEFT_NAMES.get(name, name): value for name, value in config.to_dict().items()}
    del values["kind"]
    values["use_rslora"] = values.pop("scaling") == "sqrt_rank"
    # A name there is a module; here all that is in it is left out, too.
    excluded = values["exclude_modules"]
    inner = "|".join(map(re.escape, excluded))
    values["exclude_modules"] = rf"(.*\.)?({inner})(\..*)?" if excluded else None
    values["modules_to_save"] = values["modules_to_save"] or None
    return values


def from_peft_fields(values: Mapping[str, Any]) -> GenLoRAConfig:
    """Make a configuration from ``GenLoraConfig``'s fields; those that are no GenLoRA's are ignored.

    Raises:
        ValueError: A value is out of its range, or a ``GenLoRAConfig`` cannot say it; the message uses PEFT's names.
        TypeError: A value has the wrong type.
    """
    for name, meaningless in _WITHOUT_MEANING.items():
        if values.get(name) not in meaningless:
            raise ValueError(
                f"`{name}` is {shown(values[name])}, which an adapter of this library cannot say: "
                f"leave it at {meaningless[0]!r}."
            )
    excluded = values.get("exclude_modules")
    if isinstance(excluded, str):
        raise ValueError(
            f"`exclude_modules` is the regular expression {shown(excluded)}; an adapter of this library takes a list."
        )
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(GenLoRAConfig):
        value = values.get(_PEFT_NAMES.get(field.name, field.name))
        if value is not None:
            fields[field.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
    fields["scaling"] = "sqrt_rank" if values.get("use_rslora", True) else "rank"
    try:
        return GenLoRAConfig(**fields)
    except (ValueError, TypeError) as error:
        text = re.sub(r"`(\w+)`", lambda match: f"`{_PEFT_NAMES.get(match[1], match[1])}`", str(error))
        raise type(error)(text) from None


@torch.no_grad()
def export_peft(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a model's GenLoRA adapters as a PEFT folder of kind GENLORA, bit for bit.

    ``PeftModel.from_pretrained`` loads it once :mod:`genlora_lightning.interop.peft` is imported. Names are relative to
    the transformers model, if ``model`` is or holds one.

    Args:
        model: A model with adapters.
        folder: Where to write; replaced if it holds an earlier one.

    Returns:
        The folder.

    Raises:
        ValueError: The model has no adapters, they are of another kind, one is on no linear, or parts were adapted with
            several configurations, which such a folder cannot say.
        FileExistsError: ``folder`` exists and holds something else.
        OSError: It cannot be written; then nothing is left behind.
    """
    require_adapters(model)
    check_one_active(model)
    base = transformers_base(model) or model
    # Which linears are adapted is listed below.
    config = dataclasses.replace(_one_config(adapter_configs(base)), layers_to_transform=None)
    check_replaceable(folder, _is_export, "PEFT folder")
    other = next((name for name, layer in adapter_layers(base).items() if layer.named_only), None)
    if other is not None:
        raise ValueError(
            f"{other} is no linear, and the GENLORA of PEFT adapts linears alone; nothing was written. `export_lora` "
            "writes what PEFT's LoRA takes."
        )
    layers = list(adapter_layers(base))
    trained = list(trained_modules(base))
    state = {
        f"{_BASE}{_to_peft(name, layers)}": tensor.detach().cpu().contiguous().clone()
        for name, tensor in adapter_state_dict(base).items()
    }
    # PEFT takes a name also as the end of a longer one; a regular expression must match all of it.
    others = [name for name, _ in plain_modules(base) if name not in layers]
    is_ambiguous = any(name.endswith(f".{own}") for name in others for own in layers)
    description = {
        "peft_type": PEFT_TYPE,
        "task_type": _task(base, trained),
        "base_model_name_or_path": base_model_name(base),
        "inference_mode": True,
        "bias": "none",
        **peft_fields(config),
        "target_modules": "|".join(map(re.escape, layers)) if is_ambiguous else layers,
        "exclude_modules": None,
        "modules_to_save": trained or None,
    }

    def write(staging: Path) -> None:
        save_file(state, staging / WEIGHTS_FILE, metadata={"format": "pt", _MARK: "1"})
        (staging / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (staging / CARD_FILE).write_text(_CARD, encoding="utf-8")

    return write_folder(folder, write, _is_export, "PEFT folder")


def import_peft(model: nn.Module, folder: str | os.PathLike[str]) -> InjectionReport:
    """Load a PEFT folder of kind GENLORA into its base model, in place, as adapters of this library.

    Args:
        model: The base model, without adapters.
        folder: The folder that ``PeftModel.save_pretrained`` or :func:`export_peft` wrote.

    Returns:
        What is adapted.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        ValueError: It is of another kind or damaged, says what our adapters cannot (trained biases), or does not fit
            the model, or the model has adapters already. Then the model is as it was.
    """
    if adapter_layers(model):
        raise ValueError("The model already has adapters. Call `remove_adapters(model)` first.")
    folder = local_path(folder, "PEFT folder")
    if not is_peft_folder(folder):
        raise ValueError(f"{folder} is no PEFT folder of kind {PEFT_TYPE}, or its {CONFIG_FILE} is damaged.")
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    state = _read_state(folder)
    layers = sorted({name.partition(".update.")[0] for name in state if ".update." in name}, key=natural_key)
    try:
        what = {"target_modules": layers, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        config = from_peft_fields({**values, **what})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is of no adapter of this library: {error}") from error
    with restored_after_error(model):
        try:
            report = inject_layers(
                model, dict.fromkeys(layers, config), match_modules(model, config.modules_to_train, "modules_to_train")
            )
        except ValueError as error:
            raise ValueError(f"The adapter in {folder} does not fit this {type(model).__name__}: {error}") from error
        load_adapter_state(model, state, str(folder))
    return report


def is_peft_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is PEFT's, of kind GENLORA."""
    try:
        return bool(json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"] == PEFT_TYPE)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def peft_tensors(folder: str | os.PathLike[str]) -> set[str]:
    """Names in the model of the tensors of a PEFT folder.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: It is damaged.
    """
    return set(_read_state(local_path(folder, "PEFT folder")))


def _one_config(configs: Mapping[str, AdapterConfig]) -> GenLoRAConfig:
    (first, *others) = {id(config): config for config in configs.values()}.values()
    if not isinstance(first, GenLoRAConfig):
        raise ValueError(
            f"The adapters are of kind {first.kind!r}, not {GenLoRAConfig.kind!r}: `export_lora` writes them for PEFT."
        )
    for other in others:
        differences = first.differences(other)
        if set(differences) - {"target_modules", "exclude_modules", "modules_to_train", "layers_to_transform"}:
            raise ValueError(
                f"The model has adapters of several configurations ({differences}), and a PEFT folder says one. Use "
                "`export_lora`, which writes ranks layer by layer."
            )
    return first


def _task(base: nn.Module, trained: list[str]) -> str | None:
    """PEFT's name of the task, if it is known, and if PEFT takes no head for trained that was not."""
    tasks = list(class_tasks(type(base).__name__)) if is_transformers_model(base) else []
    if len(tasks) != 1:
        return None
    heads = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
    implied = [name for name, _ in plain_modules(base) if name.rpartition(".")[2] in heads.get(tasks[0], ())]
    return tasks[0] if set(implied) <= set(trained) else None


def _to_peft(name: str, layers: list[str]) -> str:
    """The name of a tensor in PEFT's file: ``q_proj.update.A.latent`` is ``q_proj.genlora_A.latent`` there."""
    layer, between, own = name.partition(".update.")
    return f"{layer}.{PREFIX}{own}" if between and layer in layers else name


def _read_state(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no complete PEFT folder: it has no {WEIGHTS_FILE}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or incomplete: {error!s:.500}.") from error
    state = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_BASE)
        if name == key or not tensor.isfinite().all():
            raise ValueError(f"{path} holds {key}, which is {'no name of PEFT' if name == key else 'not finite'}.")
        state[re.sub(rf"\.{PREFIX}([AB])\.", r".update.\1.", name)] = tensor
    return state
