"""Save and load adapter folders, atomically, with every tensor and the base accounted for."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.artifacts.adapter_folder import (
    ADAPTER_FILES,
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    StoredAdapter,
    adapter_place,
    check_layers,
    config_entries,
    manifest_bytes,
    read_adapter,
)
from genlora_lightning.artifacts.hub import push_folder
from genlora_lightning.artifacts.model_card import CARD_FILE, model_card
from genlora_lightning.artifacts.other_state import warn_of_changed_buffers
from genlora_lightning.artifacts.peft_folder import (
    PeftRecord,
    is_peft_folder,
    load_peft_folder,
    peft_record,
    write_peft_folder,
)
from genlora_lightning.artifacts.writing import checked_tensors, library_versions, new_folder
from genlora_lightning.backbone.identity import (
    BaseCheck,
    base_identity,
    describe_base,
    identity_of_part,
    require_same_base,
)
from genlora_lightning.backbone.tasks import label_names, name_labels
from genlora_lightning.injection.full_training import trained_modules
from genlora_lightning.injection.held import held_root
from genlora_lightning.injection.inject import (
    adapter_configs,
    adapter_layers,
    check_configuration,
    inject_adapters,
    inject_layers,
)
from genlora_lightning.injection.named import check_no_set
from genlora_lightning.injection.places import adapter_parameters, plain_name
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.injection.restoring import restored_after_error
from genlora_lightning.injection.state import adapter_state_dict, load_adapter_state, widen_to_stored
from genlora_lightning.storage.digests import dtype_name, sha256
from genlora_lightning.storage.paths import local_path

# PEFT looks for its own file of this name, and says no more than the kind that it does not know.
_NOT_PEFT = "no PEFT folder; `genlora convert ADAPTER BASE OUT` makes one"


@dataclass
class AdapterRecord:
    """What an adapter folder says of a model, taken from it before or after its tensors are spread over processes.

    Attributes:
        state: The adapter's tensors by name.
        configs: The configuration of each adapted linear.
        base: The base's identity (:func:`~genlora_lightning.backbone.identity.base_identity`).
        layers: ``[out_features, in_features]`` of each adapted layer; of a stack of matrices with their number first.
        sites: What those of them are that are no linears.
        trained_modules: The names of the tensors of each module trained in full.
        base_is_transformers: Whether the base is one of transformers' models.
        label_names: Names of a classifier's classes, if they have any.
    """

    state: dict[str, Tensor]
    configs: dict[str, AdapterConfig]
    base: dict[str, Any]
    layers: dict[str, list[int]]
    sites: dict[str, str]
    trained_modules: dict[str, list[str]]
    base_is_transformers: bool
    label_names: list[str] | None = None


def adapter_record(model: nn.Module, base: dict[str, Any] | None = None) -> AdapterRecord | PeftRecord:
    """What :func:`save_adapter` saves of a model; the tensors are the model's own, not copies.

    Args:
        model: A model with adapters.
        base: Its base's identity, if it is known already.

    Raises:
        ValueError: The model has no adapters.

    Warns:
        UserWarning: Something else is trainable, or a buffer of the base has changed in a run; it is not saved.
    """
    found = held_root(model)
    if found is not None:
        _warn_of_unsaved(model)
        return peft_record(*found, base)
    state = adapter_state_dict(model)
    layers = adapter_layers(model)
    _warn_of_unsaved(model)
    return AdapterRecord(
        state=state,
        configs=adapter_configs(model),
        base=base_identity(model) if base is None else base,
        layers={name: layer.shape.sizes for name, layer in layers.items()},
        sites={name: layer.noun for name, layer in layers.items() if layer.named_only},
        trained_modules={
            name: [plain_name(f"{name}.{own}") for own in module.state_dict()]
            for name, module in trained_modules(model).items()
        },
        base_is_transformers=type(model).__module__.startswith("transformers."),
        label_names=label_names(model),
    )


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None
) -> Path:
    """Save a model's adapters, and the modules trained in full, to a folder; the base is not saved.

    The folder's files are those of :mod:`genlora_lightning.artifacts.adapter_folder`. It is written beside its
    destination, flushed to the disk and put in its place in one step: whenever the process is killed, there is the old
    adapter or the new one, complete (:mod:`genlora_lightning.storage.atomic`). Files of yours in an older adapter's
    folder, such as a tokenizer's, are kept.

    Args:
        model: A model with adapters, merged or not.
        folder: Where to save; replaced if it is an adapter folder already.
        training: Facts to keep with the adapter, such as steps and ``metrics``; JSON values.

    Returns:
        The folder's path.

    Raises:
        ValueError: The model has no adapters, a tensor to save is not finite, ``training`` is no JSON, or the folder
            could not be loaded: the tensors are not those that the configuration makes.
        FileExistsError: ``folder`` exists and is no adapter folder; nothing of yours is overwritten.
        OSError: It cannot be written, for example because the disk is full; then nothing is left behind.
    """
    return write_adapter(adapter_record(model), folder, training=training)


def write_adapter(
    content: AdapterRecord | PeftRecord, folder: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write an adapter folder; see :func:`save_adapter`."""
    if isinstance(content, PeftRecord):
        return write_peft_folder(content, folder, training=training)
    folder = local_path(folder, "adapter folder")
    state = checked_tensors(content.state, folder)
    try:
        num_trained = check_layers(
            {name: MatrixShape.of(shape) for name, shape in content.layers.items()},
            content.configs,
            content.trained_modules,
            state,
        )
    except ValueError as error:
        raise ValueError(
            f"The adapter could not be loaded from {folder}, and was not saved: {error} A layer or its configuration "
            "was changed after the injection."
        ) from error
    with new_folder(folder, state, training) as (staging, facts):
        _write(staging, content, state, facts, num_trained)
    return folder


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, base_check: BaseCheck = "error", replace: bool = False
) -> InjectionReport:
    """Load an adapter folder into its base model, in place; adapters are injected if the model has none yet.

    All of it is proved before a weight is touched: digests of the files, that the model is the base the adapter was
    trained on (its configuration, all names and shapes, and sampled values of the weights), and names, shapes and
    dtypes of the adapter's tensors, in both directions. The base is proved first, before anything is injected. If
    anything is wrong, the model is as it was.

    Args:
        model: The base model the adapter was trained on, with or without adapters of the same configuration. An adapter
            of a module that holds such a model (a LightningModule, say) is loaded without the prefix of its names.
        folder: A folder that :func:`save_adapter` wrote, or one in PEFT's format: then PEFT puts its own adapters in,
            and the base is proved if a run of this library wrote the folder. Or the name of one on the Hugging Face
            Hub (``org/name``, ``org/name@revision``, ``hf://org/name``), of which the adapter's files are fetched.
        base_check: What to do if the base is another one: ``"error"``, ``"warn"``, or ``"off"``: do not look.
            ``"unquantized"``: an error, but the unquantized form of a quantized base will do: to merge into it.
        replace: Whether adapters that the model has already, and that act, may lose their values.

    Returns:
        What is adapted.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        WrongBaseError: The adapter was trained on another base; the message names both and how they differ.
        ValueError: A file is damaged or of another format, the adapter does not fit the model, the model's adapters
            are merged, or they act and ``replace`` is not given.
    """
    check_no_set(model)
    present = adapter_layers(model)
    merged = [name for name, layer in present.items() if layer.merged]
    if merged:
        raise ValueError(
            f"{len(merged)} adapters of this model are merged into its weights, {merged[0]} among them, and would "
            "go on to act beside the loaded ones. Call `unmerge_adapters(model)` first, or load into a fresh base."
        )
    if is_peft_folder(place := adapter_place(folder)):
        return load_peft_folder(model, place, base_check=base_check, replace=replace)
    stored = fitted(read_adapter(folder), model)
    try:
        check_configuration(model, stored.configs)
    except ValueError as error:
        raise ValueError(f"The adapter in {folder} cannot be loaded: {error}") from error
    is_proved = base_check != "off" and require_same_base(
        stored.base, base_identity(model, without=stored.trained_modules), f"The adapter in {folder}", base_check
    )
    acting = None if replace else next((name for name, layer in present.items() if layer.acts()), None)
    if acting is not None:
        raise ValueError(
            f"This model has adapters that were trained or loaded before, {acting} among them, and {folder} would take "
            "their place: a model has one adapter at a time. Give `replace=True`, or call `remove_adapters(model)` "
            "first; `merge_adapters` keeps what they do."
        )
    several = len({id(config) for config in stored.configs.values()}) > 1
    with restored_after_error(model):
        try:
            if is_proved or several:
                report = inject_layers(model, stored.configs, stored.trained_modules, stored.tensors)
            else:  # that the configuration chooses the same modules is all that speaks for this base
                report = inject_adapters(model, stored.config)
        except (ValueError, RuntimeError) as error:  # the latter: no memory for the sizes that it claims
            raise ValueError(
                f"The adapter in {folder} does not fit this {type(model).__name__}: {error} It was trained on "
                f"{describe_base(stored.base)}."
            ) from error
        widen_to_stored(model, stored.tensors)
        _check_dtypes(adapter_state_dict(model), stored.tensors, Path(folder))
        load_adapter_state(model, stored.tensors, str(folder))
    if stored.label_names:
        name_labels(model, stored.label_names)
    return report


def push_adapter(
    folder: str | os.PathLike[str], repo: str, *, private: bool | None = None, revision: str | None = None
) -> str:
    """Upload an adapter folder to the Hugging Face Hub, in one commit, after all of it was verified.

    Its own files go there, and no other that lies in the folder. :func:`load_adapter` loads it by its name there.

    Args:
        folder: The folder.
        repo: ``org/name``; made if it is not there.
        private: Whether a new repository is private; the account's default if ``None``.
        revision: The branch; made if it is not there. The main one if ``None``.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        ValueError: A file is damaged or of another format, or ``repo`` is no name that the Hub could have.
        OSError: The Hub cannot be reached, or gives no access.
    """
    stored = read_adapter(local_path(folder, "adapter folder").absolute())
    return push_folder(stored.folder, repo, ADAPTER_FILES, private=private, revision=revision)


def adapter_bytes(folder: str | os.PathLike[str]) -> int:
    """Size of an adapter folder on disk, in bytes."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _warn_of_unsaved(model: nn.Module) -> None:
    saved = {id(p) for module in trained_modules(model).values() for p in module.parameters()}
    saved |= {id(p) for p in adapter_parameters(model).values()}
    held = held_root(model)
    if held is not None:  # biases, too, if PEFT is told to train them
        stored = set(held[1].keys.values())
        saved |= {id(p) for name, p in held[0].named_parameters() if plain_name(name) in stored}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if lost:
        warnings.warn(
            f"{len(lost)} trainable parameters, {lost[0]} among them, are neither adapters nor in `modules_to_train`: "
            "an adapter folder does not hold them, and it will not load into a base whose values for them are others. "
            "Freeze them, or name their modules in `modules_to_train`.",
            stacklevel=4,
        )
    warn_of_changed_buffers(model)


def _write(
    staging: Path, content: AdapterRecord, state: dict[str, Tensor], training: dict[str, Any], num_trained: int
) -> None:
    base = content.base
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "peft_type": _NOT_PEFT,
        "base_model": base["name"],
        **config_entries(content.configs),
    }
    files = {
        CONFIG_FILE: (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode(),
        WEIGHTS_FILE: safetensors.torch.save(state, {"format": "pt"}),
    }
    for name, data in files.items():
        (staging / name).write_bytes(data)
    versions = library_versions()
    trained = num_trained + sum(state[own].numel() for names in content.trained_modules.values() for own in names)
    card = model_card(
        configs=list({id(config): config for config in content.configs.values()}.values()),
        base=base,
        training=training,
        versions=versions,
        num_layers=len(content.layers),
        num_trained=trained,
        num_fixed=sum(tensor.numel() for tensor in state.values()) - trained,
        base_is_transformers=content.base_is_transformers,
    )
    (staging / CARD_FILE).write_text(card, encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "training": training,
        "base": base,
        "layers": content.layers,
        **({"sites": content.sites} if content.sites else {}),
        "trained_modules": content.trained_modules,
        **({} if content.label_names is None else {"label_names": content.label_names}),
        "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()},
    }
    (staging / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))


def fitted(stored: StoredAdapter, model: nn.Module) -> StoredAdapter:
    """A stored adapter by this model's names, if it was saved from a module that holds such a model.

    All its names then begin with one prefix, that of the model in the module: ``"lm."``.
    """
    # Parameters too, of which some hold stacks of matrices.
    modules = {plain_name(name) for name, _ in (*model.named_modules(), *model.named_parameters())} - {""}
    names = [*stored.layers, *stored.trained_modules]
    # Adapted linears are there under the same name, with adapters and without.
    if not names or modules.issuperset(names):
        return stored
    parts = names[0].split(".")
    prefixes = (".".join(parts[:end]) + "." for end in range(1, len(parts)))
    for prefix in prefixes:
        if all(name.startswith(prefix) and name.removeprefix(prefix) in modules for name in names):
            break
    else:
        return stored
    return replace(
        stored,
        tensors={name.removeprefix(prefix): tensor for name, tensor in stored.tensors.items()},
        layers={name.removeprefix(prefix): shape for name, shape in stored.layers.items()},
        sites={name.removeprefix(prefix): site for name, site in stored.sites.items()},
        configs={name.removeprefix(prefix): config for name, config in stored.configs.items()},
        trained_modules={
            name.removeprefix(prefix): [own.removeprefix(prefix) for own in tensors]
            for name, tensors in stored.trained_modules.items()
        },
        base=identity_of_part(stored.base, prefix),
    )


def _check_dtypes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse what a cast would spoil; a cast to a wider dtype keeps every value."""
    wrong = [
        f"{name}: stored {dtype_name(state[name].dtype)}, needed {dtype_name(tensor.dtype)}"
        for name, tensor in expected.items()
        if name in state and torch.promote_types(state[name].dtype, tensor.dtype) != tensor.dtype
    ]
    if wrong:
        raise ValueError(
            f"The adapter in {folder} does not fit this model: {len(wrong)} tensors would lose digits in its "
            f'dtype ({", ".join(wrong[:4])}). It was probably trained with `precision="64-true"`: cast the base '
            "to float64 before (`model.double()`), and the adapters come in float64, too. Nothing was loaded."
        )
