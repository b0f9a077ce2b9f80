"""Write and read adapter folders in PEFT's own format, with a manifest of ours beside its files.

``adapter_config.json`` and ``adapter_model.safetensors`` are PEFT's: ``PeftModel.from_pretrained`` loads them and does
not look at ``manifest.json``, which holds their sizes and SHA-256, the base's identity and the facts of the training.
Folders that PEFT wrote have none; they are read, too, and nothing about them is proved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from genlora_lightning.artifacts.adapter_folder import (
    CONFIG_FILE,
    FORMAT,
    MANIFEST_FILE,
    PEFT_FORMAT,
    WEIGHTS_FILE,
    manifest_bytes,
)
from genlora_lightning.artifacts.model_card import CARD_FILE
from genlora_lightning.artifacts.writing import checked_tensors, library_versions, new_folder
from genlora_lightning.backbone.identity import (
    IDENTITY_SHAPE,
    BaseCheck,
    base_identity,
    describe_base,
    require_same_base,
    without_samples,
)
from genlora_lightning.distributed.shards import tensors_trained_in_full, trained_tensors
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.fields import shown
from genlora_lightning.injection.held import Held, held_root
from genlora_lightning.injection.inject import adapter_layers
from genlora_lightning.injection.peft_adapters import PeftAdapter, inject_peft, peft_root
from genlora_lightning.injection.places import adapter_places, base_name
from genlora_lightning.injection.report import InjectionReport
from genlora_lightning.injection.restoring import restored_after_error
from genlora_lightning.injection.state import check_adapter_state
from genlora_lightning.storage.atomic import find_folder
from genlora_lightning.storage.digests import sha256
from genlora_lightning.storage.documents import check_document
from genlora_lightning.storage.paths import local_path

_VERSION = 1
_MANIFEST_SHAPE: dict[Any, Any] = {
    "created": str,
    "versions": {str: str},
    "training": dict,
    "base": IDENTITY_SHAPE,
    "trained_modules": [str],
    "files": {CONFIG_FILE: {"bytes": int, "sha256": str}, WEIGHTS_FILE: {"bytes": int, "sha256": str}},
}


@dataclass
class PeftRecord:
    """What a folder says of PEFT's adapters in a model, taken before or after its tensors are spread over processes.

    Attributes:
        state: The tensors by their names in the model.
        keys: The name in the model of each tensor in PEFT's file.
        config: What PEFT's configuration file says.
        base: The base's identity.
        trained_modules: The base's modules of which copies were trained.
    """

    state: dict[str, Tensor]
    keys: dict[str, str]
    config: dict[str, Any]
    base: dict[str, Any]
    trained_modules: list[str]


def peft_record(root: nn.Module, held: Held, base: dict[str, Any] | None = None) -> PeftRecord:
    """What a folder is to hold of a model; the tensors are the model's own, not copies."""
    config = {**PeftAdapter.of(held.config).values, "inference_mode": True}
    if config.get("task_type") is None:  # from which PEFT's AutoPeftModel makes the base
        cls = type(root)
        config["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    tensors = trained_tensors(root)
    places = adapter_places(root)
    # Parameters of the base that are trained where they are (`bias`) are the adapter's, and in its files.
    trained = [base_name(name, places) for name in held.trainable]
    return PeftRecord(
        state={name: tensors[name] for name in held.keys.values()},
        keys=held.keys,
        config=config,
        base=without_samples(base_identity(root) if base is None else base, trained),
        trained_modules=list(tensors_trained_in_full(root)),
    )


def write_peft_folder(
    content: PeftRecord, folder: str | os.PathLike[str], *, training: Mapping[str, Any] | None = None
) -> Path:
    """Write an adapter folder in PEFT's format, in one step; see :func:`~genlora_lightning.save_adapter`."""
    folder = local_path(folder, "adapter folder")
    state = checked_tensors(content.state, folder)
    stored = {key: state[name] for key, name in content.keys.items()}
    if len({id(tensor) for tensor in stored.values()}) < len(stored):  # which the file's format refuses
        stored = {key: tensor.clone() for key, tensor in stored.items()}
    with new_folder(folder, state, training) as (staging, facts):
        files = {
            CONFIG_FILE: (json.dumps(content.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(),
            WEIGHTS_FILE: safetensors.torch.save(stored, {"format": "pt"}),
        }
        for name, data in files.items():
            (staging / name).write_bytes(data)
        (staging / CARD_FILE).write_text(_card(content), encoding="utf-8")
        manifest = {
            "format": PEFT_FORMAT,
            "format_version": _VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": library_versions(),
            "training": facts,
            "base": content.base,
            "trained_modules": content.trained_modules,
            "files": {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in files.items()},
        }
        (staging / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))
    return folder


def _card(content: PeftRecord) -> str:
    name = content.base["name"]
    front = ["---", *([f"base_model: {json.dumps(name)}"] if name else []), "library_name: peft", "---"]
    text = [
        f"# PEFT adapter ({content.config['peft_type']})",
        "",
        f"For {describe_base(content.base)}.",
        "`PeftModel.from_pretrained(base, folder)` loads it; `genlora verify` proves that it is complete.",
    ]
    return "\n".join([*front, "", *text, ""])


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StoredPeft:
    """A folder in PEFT's format that was read.

    Args:
        folder: Where it lies.
        config: What PEFT's configuration file says.
        tensors: The tensors by PEFT's names.
        digests: SHA-256 of both files.
        manifest: Ours, verified; ``None`` where PEFT wrote the folder.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    digests: dict[str, str]
    manifest: dict[str, Any] | None


def is_peft_folder(folder: Path) -> bool:
    """Whether a folder holds a configuration of PEFT."""
    try:
        values = json.loads((find_folder(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
        return isinstance(values["peft_type"], str) and "format" not in values
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def read_peft_folder(folder: str | os.PathLike[str]) -> StoredPeft:
    """Read a folder in PEFT's format, and compare it with our manifest if there is one.

    Raises:
        FileNotFoundError: A file is missing.
        DamagedFileError: A file is not what was written, or cannot be read.
        ValueError: The manifest is of a newer release.
    """
    place = find_folder(local_path(folder, "adapter folder"))
    files: dict[str, bytes] = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (place / name).is_file():
            other = " It holds adapter_model.bin, a pickle: load it with PEFT and save it again."
            is_pickle = (place / "adapter_model.bin").is_file()
            raise FileNotFoundError(f"{place} is no adapter folder: it has no {name}.{other if is_pickle else ''}")
        files[name] = (place / name).read_bytes()
    manifest = _read_manifest(place / MANIFEST_FILE) if (place / MANIFEST_FILE).is_file() else None
    digests = {name: sha256(data) for name, data in files.items()}
    for name, data in files.items() if manifest is not None else ():
        assert manifest is not None
        if manifest["files"][name]["sha256"] != digests[name]:
            raise DamagedFileError(
                f"{place / name} is damaged: it has another SHA-256 than when it was written ({len(data):,} bytes, and "
                f"{manifest['files'][name]['bytes']:,} were written). Copy the adapter again, or use another one."
            )
    try:
        config = json.loads(files[CONFIG_FILE].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{place / CONFIG_FILE} is damaged or incomplete: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise DamagedFileError(f"{place / CONFIG_FILE} is damaged, or not PEFT's: it has no `peft_type`.")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise DamagedFileError(f"{place / CONFIG_FILE} has `modules_to_save` {shown(saved)}, which must name modules.")
    try:
        tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedFileError(f"{place / WEIGHTS_FILE} is no readable safetensors file: {error!s:.500}.") from error
    return StoredPeft(folder=place, config=config, tensors=tensors, digests=digests, manifest=manifest)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    data = path.read_bytes()
    try:
        values = json.loads(data.decode("utf-8"))
        unchanged = manifest_bytes({name: value for name, value in values.items() if name != "sha256"}) == data
    except (ValueError, RecursionError, AttributeError) as error:
        raise DamagedFileError(f"{path} is damaged or incomplete: {error}.") from error
    if values.get("format") not in (PEFT_FORMAT, FORMAT):
        return None  # of somebody else, whose name it has by chance
    if values.get("format_version") != _VERSION:
        raise ValueError(
            f"{path} has format version {shown(values.get('format_version'))}; this release reads version {_VERSION}. "
            "It was probably written by a newer release: update genlora-lightning."
        )
    if not unchanged:
        raise DamagedFileError(f"{path} is damaged: it has another SHA-256 than when it was written.")
    check_document(str(path), values, _MANIFEST_SHAPE)
    return dict(values)


@torch.no_grad()
def load_peft_folder(
    model: nn.Module, folder: str | os.PathLike[str], *, base_check: BaseCheck = "error", replace: bool = False
) -> InjectionReport:
    """Load a folder in PEFT's format into its base, in place; see :func:`~genlora_lightning.load_adapter`.

    Raises:
        FileNotFoundError: A file is missing.
        WrongBaseError: The adapter was trained on another base, as far as our manifest says it.
        ValueError: A file is damaged, the adapter does not fit the model, or the model has adapters already.
    """
    stored = read_peft_folder(folder)
    broken = [name for name, tensor in stored.tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise DamagedFileError(f"{stored.folder / WEIGHTS_FILE} holds NaN or infinite values: {broken[0]}.")
    if adapter_layers(model) or (held_root(model) is not None and not replace):
        raise ValueError(
            f"This model has adapters already, and {folder} would take their place: a model has one adapter at a time. "
            "Give `replace=True` for adapters of the same configuration, or call `remove_adapters(model)` first."
        )
    try:
        adapter = PeftAdapter.from_dict(stored.config)
    except ValueError as error:
        raise ValueError(f"{stored.folder / CONFIG_FILE}: {error}") from error
    if stored.manifest is not None and base_check != "off":
        present = base_identity(peft_root(model), without=stored.manifest["trained_modules"])
        require_same_base(stored.manifest["base"], present, f"The adapter in {folder}", base_check)
    with restored_after_error(model):
        try:
            report = inject_peft(model, adapter)
        except ValueError as error:
            raise ValueError(f"The adapter in {folder} does not fit this {type(model).__name__}: {error}") from error
        found = held_root(model)
        assert found is not None
        tensors = trained_tensors(found[0])
        expected = {key: tensors[name] for key, name in found[1].keys.items()}
        check_adapter_state(expected, stored.tensors, str(folder))
    for key, tensor in expected.items():
        tensor.copy_(stored.tensors[key])
    return report
