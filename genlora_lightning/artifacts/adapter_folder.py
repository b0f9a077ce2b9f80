"""Adapter folders as files: what is in them, and the proof that it is what was written. No model is needed.

==============================  ==========================================================================
``adapter_model.safetensors``   the tensors
``adapter_config.json``         format, version, the name of the base, and the adapter's configuration with its kind
``README.md``                   a model card, free to be edited
``manifest.json``               SHA-256 of each tensor, of the safetensors header and of the configuration, the base's
                                identity, the adapted linears, versions, facts of the training; and of its own text
==============================  ==========================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
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
from genlora_lightning.layers.adapted import AdaptedLayer
from genlora_lightning.layers.sites import adapt
from genlora_lightning.storage.atomic import find_folder
from genlora_lightning.storage.digests import DamagedFileError, is_sealed, sha256, tensor_digest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
CARD_FILE = "README.md"
FORMAT = "genlora"
FORMAT_VERSION = 2

_SHOWN = 4
_READS = 5  # while another process replaces the folder


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter folder that was read and verified.

    Args:
        folder: Where it lies.
        config: Its kind, and how its matrices are made.
        tensors: Its tensors, by their names in the model's state dict.
        layers: Shape of each adapted linear.
        trained_modules: Modules trained in full, with the names of their tensors.
        base: Identity of the base; see :func:`~genlora_lightning.backbone.identity.base_identity`.
        training: Facts of the training, such as steps and metrics.
        versions: Of Python and the libraries that wrote it.
        created: When it was written; ISO 8601, UTC.
    """

    folder: Path
    config: AdapterConfig
    tensors: dict[str, Tensor]
    layers: dict[str, MatrixShape]
    trained_modules: dict[str, list[str]]
    base: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]
    created: str

    def layer(self, name: str) -> AdaptedLayer:
        """The adapter of one linear, on a base layer without memory."""
        return stored_layer(name, self.layers[name], self.config, self.tensors)


def stored_layer(name: str, shape: MatrixShape, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> AdaptedLayer:
    """The adapter of a linear of a shape out of stored tensors, on a base layer without memory.

    Raises:
        KeyError: A tensor is missing.
        RuntimeError: One has another shape.
    """
    layer = empty_layer(shape, config)
    state = {own: tensors[f"{name}.{own}"] for own in layer.adapter_parameters()}
    layer.load_state_dict(state, strict=False, assign=True)
    return layer


def empty_layer(shape: MatrixShape, config: AdapterConfig) -> AdaptedLayer:
    """An adapted linear of a shape, all of it without memory."""
    return adapt(nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta"), config)


def read_adapter(folder: str | os.PathLike[str]) -> StoredAdapter:
    """Read an adapter folder and verify all of it.

    Raises:
        FileNotFoundError: There is no such folder, or a file of it is missing.
        DamagedFileError: A file is not what was written, or they disagree.
        ValueError: The folder is of another library, or of a newer release.
    """
    folder = Path(folder)
    for attempt in range(_READS):
        place = find_folder(folder)
        before = _identity(place)
        try:
            return _read(place)
        except (OSError, ValueError):
            # A writer may have put a new folder in the place between two of the reads; then it is read again.
            if attempt == _READS - 1 or _identity(find_folder(folder)) == before:
                raise
    raise AssertionError


def read_adapter_config(folder: str | os.PathLike[str]) -> AdapterConfig:
    """The configuration of the adapter in a folder; nothing else of it is read or verified.

    Raises:
        FileNotFoundError: There is no such folder or no configuration in it.
        ValueError: The configuration cannot be read, is another library's, or comes from a newer release.
    """
    return _parse_config(find_folder(folder) / CONFIG_FILE)[0]


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder is an adapter folder of ours, damaged or not, or empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    try:
        return bool(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _read(folder: Path) -> StoredAdapter:
    config, config_bytes = _parse_config(folder / CONFIG_FILE)
    manifest = _parse_manifest(folder / MANIFEST_FILE)
    tensors = _read_weights(folder / WEIGHTS_FILE, manifest)
    try:
        stored = StoredAdapter(
            folder=folder,
            config=config,
            tensors=tensors,
            layers={name: MatrixShape(*shape) for name, shape in manifest["layers"].items()},
            trained_modules=manifest["trained_modules"],
            base=manifest["base"],
            training=manifest["training"],
            versions=manifest["versions"],
            created=manifest["created"],
        )
        digest = manifest["files"][CONFIG_FILE]["sha256"]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise DamagedFileError(f"{folder / MANIFEST_FILE} lacks what belongs there: {error!r}.") from error
    _check_config(stored)
    if sha256(config_bytes) != digest:
        raise DamagedFileError(
            f"{folder / CONFIG_FILE} is not the one that was written with the weights (its SHA-256 differs): it was "
            "edited, or bits of it have flipped. Copy the adapter again, or use another checkpoint."
        )
    return stored


def _parse_config(path: Path) -> tuple[AdapterConfig, bytes]:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no adapter folder {path.parent}.")
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in path.parent.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"{path.parent} is no adapter folder: it has no {CONFIG_FILE} (it holds {held}).")
    data = path.read_bytes()
    description = _parse_json(path, data)
    if description.get("format") != FORMAT:
        peft_type = description.get("peft_type")
        hint = f" It is a PEFT adapter of type {peft_type}." if peft_type else ""
        raise ValueError(f"{path} does not describe an adapter of this library.{hint}")
    _check_version(path, description)
    try:
        config = description["config"]
        if description["format_version"] == format1.VERSION:
            config = format1.upgraded_config(config)
        return read_config(config), data
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} holds no valid configuration: {error}") from error


def _parse_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.parent} is no complete adapter folder: it has no {path.name}, without which nothing in it can be "
            "verified. Copy the whole folder again."
        )
    data = path.read_bytes()
    manifest = _parse_json(path, data)
    _check_version(path, manifest)
    if not is_sealed(data):
        raise DamagedFileError(
            f"{path} is damaged: its own SHA-256 differs. It was edited, or bits of it have flipped. Copy the adapter "
            "again, or use another checkpoint."
        )
    return manifest


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise DamagedFileError(f"{path} ({len(data):,} bytes) is damaged or incomplete: {error}.") from error
    return values if isinstance(values, dict) else {}


def _check_version(path: Path, values: Mapping[str, Any]) -> None:
    version = values.get("format_version")
    if version not in (format1.VERSION, FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {version!r}; this release ({__version__}) reads versions "
            f"{format1.VERSION} and {FORMAT_VERSION}. "
            "It was probably written by a newer release: update genlora-lightning."
        )


def _read_weights(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no complete adapter folder: it has no {path.name}.")
    data = path.read_bytes()
    again = "Copy the adapter again, or use another checkpoint."
    try:
        expected = manifest["files"][WEIGHTS_FILE]
        size, header, digests = expected["bytes"], expected["header_sha256"], manifest["tensors"]
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"{path.parent / MANIFEST_FILE} lacks what belongs there: {error!r}.") from error
    if len(data) != size:
        raise DamagedFileError(
            f"{path} is damaged or incomplete: it has {len(data):,} bytes, and {size:,} were written. {again}"
        )
    start = 8 + int.from_bytes(data[:8], "little")
    if sha256(data[:start]) != header:
        raise DamagedFileError(f"{path} is damaged: the SHA-256 of its header differs. {again}")
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise DamagedFileError(f"{path} ({size:,} bytes) is damaged or incomplete: {error}. {again}") from error
    broken = [name for name in tensors if digests.get(name) != tensor_digest(tensors[name])]
    broken += [name for name in digests if name not in tensors]
    if broken:
        raise DamagedFileError(
            f"{path} is damaged: {_some(broken, len(digests), 'tensors')} have another SHA-256 than when they were "
            f"written. {again}"
        )
    return format1.upgraded_names(tensors) if manifest["format_version"] == format1.VERSION else tensors


def _check_config(stored: StoredAdapter) -> None:
    """Compare the shapes that the configuration asks for with those of the tensors."""
    shapes: dict[MatrixShape, dict[str, tuple[int, ...]]] = {}
    needed: dict[str, tuple[int, ...]] = {}
    problem = None
    for layer, shape in stored.layers.items():
        if shape not in shapes:
            try:
                own = empty_layer(shape, stored.config).adapter_parameters()
            except ValueError as error:
                problem = f"{layer}: {error}"
                break
            shapes[shape] = {name: tuple(parameter.shape) for name, parameter in own.items()}
        needed |= {f"{layer}.{name}": value for name, value in shapes[shape].items()}
    of_modules = {name for names in stored.trained_modules.values() for name in names}
    wrong = [
        f"{name} is {tuple(stored.tensors[name].shape) if name in stored.tensors else 'not there'}, not {shape}"
        for name, shape in needed.items()
        if name not in stored.tensors or tuple(stored.tensors[name].shape) != shape
    ]
    wrong += [f"{name} has no place" for name in stored.tensors if name not in needed and name not in of_modules]
    if problem or wrong:
        raise DamagedFileError(
            f"{stored.folder / CONFIG_FILE} disagrees with the tensors: {problem or _some(wrong, len(needed), '')}. It "
            "was edited, or the files are of two adapters."
        )


def _some(items: list[str], total: int, what: str) -> str:
    shown = ", ".join(items[:_SHOWN]) + (", …" if len(items) > _SHOWN else "")
    return f"{len(items)} of {total} {what} ({shown})".replace("  ", " ")
