"""Read an adapter folder and prove that each file is what was written; no model is needed.

==============================  ==========================================================================
``adapter_model.safetensors``   the tensors
``adapter_config.json``         format, version, the name of the base, and the adapter's configuration with its kind;
                                where linears have several (ranks of their own, parts adapted one by one), further
                                ones with the names of their linears
``README.md``                   a model card, free to be edited
``manifest.json``               size and SHA-256 of the first two, the base's identity, the adapted layers and which of
                                them are no linears, versions, facts of the training, and the SHA-256 of all that
==============================  ==========================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from genlora_lightning._version import __version__
from genlora_lightning.adapters.base import MatrixShape
from genlora_lightning.adapters.config import AdapterConfig
from genlora_lightning.adapters.kinds import read_config
from genlora_lightning.artifacts import format1
from genlora_lightning.artifacts.hub import local_folder
from genlora_lightning.artifacts.model_card import CARD_FILE
from genlora_lightning.backbone.identity import IDENTITY_SHAPE
from genlora_lightning.errors import DamagedFileError
from genlora_lightning.fields import shown
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.sites import adapt, without_memory
from genlora_lightning.layers.ties import Ties
from genlora_lightning.storage.atomic import find_folder
from genlora_lightning.storage.digests import sha256
from genlora_lightning.storage.documents import check_document, is_matrix_shape

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
ADAPTER_FILES = [CONFIG_FILE, WEIGHTS_FILE, MANIFEST_FILE, CARD_FILE]
FORMAT = "genlora"
PEFT_FORMAT = "genlora-peft"  # of a manifest beside PEFT's files
FORMAT_VERSION = 2

_AGAIN = (
    "It was edited, or bits of it have flipped, or it was replaced while it was read. Read it again, copy the adapter "
    "again, or use another checkpoint."
)

_MANIFEST_SHAPE: dict[Any, Any] = {
    "created": str,
    "versions": {str: str},
    "training": dict,
    "base": IDENTITY_SHAPE,
    "layers": {str: is_matrix_shape},
    "sites?": {str: str},
    "trained_modules": {str: [str]},
    "label_names?": [str],
    "files": {
        CONFIG_FILE: {"bytes": int, "sha256": str},
        WEIGHTS_FILE: {"bytes": int, "sha256?": str, "header_sha256?": str},
    },
    "tensors?": {str: str},
}


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter folder that was read and verified.

    Args:
        folder: Where it lies.
        config: Its kind, and how its matrices are made; where there are several, the first.
        configs: That of each adapted linear.
        tensors: Its tensors, by their names in the model's state dict.
        layers: Shape of each adapted layer.
        sites: What those of them are that are no linears: ``"embedding"``, ``"convolution"``.
        trained_modules: Modules trained in full, with the names of their tensors.
        base: Identity of the base; see :func:`~genlora_lightning.backbone.identity.base_identity`.
        training: Facts of the training, such as steps and metrics.
        versions: Of Python and the libraries that wrote it.
        created: When it was written; ISO 8601, UTC.
        label_names: Names of a classifier's classes, in the order of their numbers; empty where there are none.
    """

    folder: Path
    config: AdapterConfig
    configs: dict[str, AdapterConfig]
    tensors: dict[str, Tensor]
    layers: dict[str, MatrixShape]
    sites: dict[str, str]
    trained_modules: dict[str, list[str]]
    base: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]
    created: str
    label_names: list[str] = field(default_factory=list)

    def adapted(self) -> Iterator[tuple[str, AdaptedLayer, list[str]]]:
        """Make the adapters of the linears, one after another, as :class:`StoredLayers` does: name, layer, own ones.

        Raises:
            DamagedFileError: The tensors of one are not all there, or do not fit its shape.
        """
        stored = StoredLayers(self.configs, self.tensors)
        for name, shape in self.layers.items():
            try:
                yield name, *stored.make(name, shape)
            except (KeyError, RuntimeError, ValueError) as error:
                raise DamagedFileError(
                    f"The tensors of {name} in {self.folder} are incomplete or do not fit together ({error!r})."
                ) from error


class StoredLayers:
    """Makes the adapters of linears out of stored tensors, on base layers without memory.

    Args:
        configs: The configuration of each linear.
        tensors: The stored tensors.
    """

    def __init__(self, configs: Mapping[str, AdapterConfig], tensors: Mapping[str, Tensor]) -> None:
        self._configs = configs
        self._tensors = tensors
        self._ties = Ties(tensors)

    def without_values(self, name: str, shape: MatrixShape) -> AdaptedLayer:
        """Make the adapter of a linear, tied to those before it."""
        layer = adapt(without_memory(shape), self._configs[name])
        self._ties.tie(name, layer)
        return layer

    def make(self, name: str, shape: MatrixShape) -> tuple[AdaptedLayer, list[str]]:
        """Make the adapter of a linear with its values.

        Returns:
            The layer, and which of its parameters are stored with it, and not with a linear before it.

        Raises:
            KeyError: A tensor is missing.
            RuntimeError: One has another shape.
        """
        layer = self.without_values(name, shape)
        own = [own for own, parameter in layer.adapter_parameters().items() if parameter.is_meta]
        layer.load_state_dict({key: self._tensors[f"{name}.{key}"] for key in own}, strict=False, assign=True)
        return layer, own


def check_layers(
    layers: Mapping[str, MatrixShape],
    configs: Mapping[str, AdapterConfig],
    trained_modules: Mapping[str, list[str]],
    tensors: Mapping[str, Tensor],
) -> int:
    """Check that tensors are those that configurations make for linears of some shapes: that they will load.

    Args:
        layers: The shape of each linear.
        configs: The configuration of each.
        trained_modules: Modules trained in full, with the names of their tensors.
        tensors: The tensors.

    Returns:
        How many of the adapters' values are trained.

    Raises:
        ValueError: One is missing, left over or of another shape; the message names it.
    """
    expected: dict[str, Any] = {name: None for names in trained_modules.values() for name in names}
    named: dict[nn.Parameter, str] = {}
    stored = StoredLayers(configs, tensors)
    for name, shape in layers.items():
        for own, parameter in stored.without_values(name, shape).adapter_parameters().items():
            named.setdefault(parameter, f"{name}.{own}")
    expected |= {name: parameter.shape for parameter, name in named.items()}
    missing, unexpected = [n for n in expected if n not in tensors], [n for n in tensors if n not in expected]
    shapes = [n for n, shape in expected.items() if shape is not None and n in tensors and tensors[n].shape != shape]
    for names, what in ((missing, "is missing"), (unexpected, "belongs to none"), (shapes, "has another shape")):
        if names:
            raise ValueError(f"The configuration disagrees with {len(names)} tensors: {names[0]} {what}.")
    return sum(parameter.numel() for parameter in named if parameter.requires_grad)


def manifest_bytes(values: Mapping[str, Any]) -> bytes:
    """Write a manifest: readable JSON whose last entry, ``sha256``, is the SHA-256 of the same JSON without it."""
    return _json({**values, "sha256": sha256(_json(values))})


def adapter_place(path: str | os.PathLike[str], what: str = "adapter folder") -> Path:
    """Where a reader finds an adapter: a local path, or the folder into which it was fetched from the Hugging Face Hub.

    Args:
        path: A path, or ``org/name``, ``org/name@revision`` or ``hf://org/name`` on the Hub.
        what: What it is the place of, for messages.

    Raises:
        ValueError: It is the URL of another remote store.
        OSError: The Hub cannot be reached, gives no access, or has no such adapter (``FileNotFoundError``).
    """
    return find_folder(local_folder(path, what, ADAPTER_FILES))


def read_adapter(folder: str | os.PathLike[str]) -> StoredAdapter:
    """Read an adapter folder and verify all of it.

    The files are read one after another. If another process replaces the folder meanwhile, they are of two adapters,
    which is found as damage is; a second reading then succeeds.

    Args:
        folder: The folder, or its name on the Hugging Face Hub: ``org/name``, ``org/name@revision``, ``hf://org/name``.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        DamagedFileError: A file is not what was written.
        ValueError: The folder is of another library, or of a newer release.
    """
    place = adapter_place(folder)
    files = {CONFIG_FILE: _config_bytes(place)}
    description = _parse_description(place / CONFIG_FILE, files[CONFIG_FILE])
    for name in (MANIFEST_FILE, WEIGHTS_FILE):
        path = place / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{place} is no complete adapter folder: it has no {name}, and nothing in it can be verified. Copy the "
                "whole folder again."
            )
        files[name] = path.read_bytes()
    manifest = _parse_manifest(place / MANIFEST_FILE, files[MANIFEST_FILE])
    is_format1 = manifest["format_version"] == format1.VERSION
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        expected = manifest["files"][name]
        if is_format1 and name == WEIGHTS_FILE:
            unchanged = format1.is_same_file(files[name], expected.get("header_sha256"), manifest.get("tensors"))
        else:
            unchanged = sha256(files[name]) == expected.get("sha256")
        if not unchanged:
            raise DamagedFileError(
                f"{place / name} is damaged: it has another SHA-256 than when it was written ({len(files[name]):,} "
                f"bytes, and {expected['bytes']:,} were written). {_AGAIN}"
            )
    try:
        tensors = safetensors.torch.load(files[WEIGHTS_FILE])
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise DamagedFileError(f"{place / WEIGHTS_FILE} is no readable safetensors file: {error!s:.500}.") from error
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise DamagedFileError(f"{place / WEIGHTS_FILE} is damaged: {broken[0]} holds NaN or infinite values.")
    config, others = _read_configs(place / CONFIG_FILE, description)
    return StoredAdapter(
        folder=place,
        config=config,
        configs={name: others.get(name, config) for name in manifest["layers"]},
        tensors=format1.upgraded_names(tensors) if is_format1 else tensors,
        layers={name: MatrixShape.of(shape) for name, shape in manifest["layers"].items()},
        sites=manifest.get("sites", {}),
        trained_modules=manifest["trained_modules"],
        base=manifest["base"],
        training=manifest["training"],
        versions=manifest["versions"],
        created=manifest["created"],
        label_names=manifest.get("label_names", []),
    )


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """The configuration of the adapter in a folder; nothing else of it is read or verified.

    Raises:
        FileNotFoundError: There is no such folder or no configuration in it.
        ValueError: The configuration cannot be read, is another library's, or comes from a newer release.
    """
    place = adapter_place(folder)
    return _read_configs(place / CONFIG_FILE, _parse_description(place / CONFIG_FILE, _config_bytes(place)))[0]


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder is an adapter folder of ours, or of PEFT's with our manifest, damaged or not, or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    formats = ((CONFIG_FILE, FORMAT), (MANIFEST_FILE, PEFT_FORMAT))
    return any(_says(folder / name, "format") == value for name, value in formats)


def stored_facts(folder: Path) -> dict[str, Any] | None:
    """What an adapter folder says of its training and when it was written, unproved; ``None`` if there is no adapter.

    Empty if its manifest cannot be read: there is something all the same.
    """
    place = find_folder(folder)
    if not place.is_dir() or not any(place.iterdir()) or not is_adapter_folder(place):
        return None
    try:
        manifest = json.loads((place / MANIFEST_FILE).read_text(encoding="utf-8"))
        return {"created": manifest["created"], **manifest["training"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _says(path: Path, name: str) -> Any:
    """What a file says under a name; ``None`` if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _config_bytes(folder: Path) -> bytes:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {folder}.")
    path = folder / CONFIG_FILE
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG_FILE} (it holds {held}).")
    return path.read_bytes()


def _parse_description(path: Path, data: bytes) -> dict[str, Any]:
    description = _parse_json(path, data)
    if description.get("format") != FORMAT:
        peft_type = description.get("peft_type")
        hint = f" It is a PEFT adapter of type {peft_type:.40}." if isinstance(peft_type, str) else ""
        raise ValueError(f"{path} does not describe an adapter of this library.{hint}")
    _check_version(path, description)
    return description


def config_entries(configs: Mapping[str, AdapterConfig]) -> dict[str, Any]:
    """What an adapter folder says of the configuration of each linear: the first, and others with their linears."""
    groups: list[tuple[AdapterConfig, list[str]]] = []
    for name, config in configs.items():
        same = next((names for other, names in groups if not other.differences(config, run_only=True)), None)
        if same is None:
            groups.append((config, [name]))
        else:
            same.append(name)
    (first, _), *others = sorted(groups, key=lambda group: group[0].is_derived)  # a user's own is the first
    entries: dict[str, Any] = {"config": first.to_dict()}
    if others:
        entries["other_configs"] = [{"config": config.to_dict(), "layers": names} for config, names in others]
    return entries


def other_configs(entries: Mapping[str, Any]) -> dict[str, AdapterConfig]:
    """The configurations of linears that :func:`config_entries` wrote beside the first, by the linears' names.

    Raises:
        KeyError, TypeError, ValueError: They are damaged.
    """
    others: dict[str, AdapterConfig] = {}
    for entry in entries.get("other_configs", ()):
        others |= dict.fromkeys(entry["layers"], read_config(entry["config"]))
    return others


def _read_configs(path: Path, description: Mapping[str, Any]) -> tuple[AdapterConfig, dict[str, AdapterConfig]]:
    """The configuration, and those of linears that have another one."""
    try:
        if description["format_version"] == format1.VERSION:
            config = description["config"]
            check_document(str(path), config, dict, "config")
            description = {**description, "config": format1.upgraded_config(config)}
        return read_config(description["config"]), other_configs(description)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} holds no valid configuration: {error}") from error


def _parse_manifest(path: Path, data: bytes) -> dict[str, Any]:
    manifest = _parse_json(path, data)
    _check_version(path, manifest)
    if manifest["format_version"] == format1.VERSION:
        unchanged = format1.is_unchanged(data)
    else:  # each byte of it follows from the values
        try:
            unchanged = manifest_bytes({name: value for name, value in manifest.items() if name != "sha256"}) == data
        except ValueError:  # values that were never written: infinite ones, lone surrogates
            unchanged = False
    if not unchanged:
        raise DamagedFileError(f"{path} is damaged: it has another SHA-256 than when it was written. {_AGAIN}")
    check_document(str(path), manifest, _MANIFEST_SHAPE)
    return manifest


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} ({len(data):,} bytes) is damaged or incomplete: {error}. {_AGAIN}") from error
    return values if isinstance(values, dict) else {}


def _check_version(path: Path, values: Mapping[str, Any]) -> None:
    version = values.get("format_version")
    if type(version) is not int or version not in (format1.VERSION, FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {shown(version)}; this release ({__version__}) reads versions "
            f"{format1.VERSION} and {FORMAT_VERSION}. "
            "It was probably written by a newer release: update genlora-lightning."
        )
